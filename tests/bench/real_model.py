"""What plans do to a real model: KLD, and tasks of several kinds, beside usual pairs. Prints the README's table.

python tests/bench/real_model.py MODEL.gguf [--bits 4.5,3.5,3.25] [--tasks gsm8k,long:8192] [--work DIR]

Plans are those of `kvtuner-gguf calibrate` with its defaults. Everything is kept, so that the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gsm8k

PAIRS = ("q8_0/q8_0", "q8_0/q4_0", "q4_0/q4_0")


def kvtuner(*args: str | Path) -> str:
    """What the command prints; how far it is goes to the terminal."""
    start = time.monotonic()
    command = [sys.executable, "-m", "kvtuner_gguf", *map(str, args)]
    out = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    print(f"{' '.join(command[2:6])}: {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
    return out


def kept(path: Path, *args: str | Path) -> dict[str, Any]:
    """What a command prints as JSON, from the file if it ran before."""
    if not path.exists():
        unfinished = path.with_suffix(".part")
        unfinished.write_text(kvtuner(*args, "--json"))
        unfinished.replace(path)
    return json.loads(path.read_text())


def plan(model: Path, bits: str, work: Path) -> Path:
    path = work / f"plan-{bits}.json"
    if not path.exists():
        kvtuner("calibrate", model, "--bits", bits, "-o", path)
    return path


def task_set(name: str, work: Path) -> str | Path:
    """What `evaluate --tasks` takes: GSM8K's cases are fetched, all else is known to it."""
    if name != "gsm8k":
        return name
    path = work / "gsm8k.jsonl"
    if not path.exists():
        lines = "\n".join(gsm8k.tasks())
        path.write_text(f"{lines}\n")
    return path


def cell(row: dict[str, Any]) -> str:
    """Right answers, how many are lost and gained against f16, and how many are valid of those that were to be JSON."""
    valid = f", JSON {row['valid']['share']:.0%}" if row["valid"] else ""
    return f"{row['share']:.0%} +-{row['se']:.0%}, {row['lost']} + {row['gained']} of {row['n']}{valid}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--bits", default="4.5,3.5,3.25")
    parser.add_argument("--tasks", default="gsm8k,long:8192", help="sets of evaluate --tasks, gsm8k, or files")
    parser.add_argument("--work", type=Path, help="folder for what is kept [default: MODEL.real]")
    options = parser.parse_args()
    model, work = options.model, options.work or options.model.with_suffix(".real")
    work.mkdir(parents=True, exist_ok=True)

    plans = {f"plan of {bits} bits": plan(model, bits, work) for bits in options.bits.split(",")}
    asked = ["evaluate", *PAIRS, *plans.values(), "-m", model]
    names = {str(path): name for name, path in plans.items()}
    klds = {row["name"]: row for row in kept(work / "kld.json", *asked)["rows"]}
    sets = options.tasks.split(",") if options.tasks else []
    answers = []
    for name in sets:
        path = work / f"tasks-{Path(name).stem.replace(':', '-')}.json"  # Windows has no colon in names
        rows = kept(path, *asked, "--tasks", task_set(name, work))["rows"]
        answers.append({row["name"]: row for row in rows})

    print(f"| {model.name} | bits | KLD | same top token | {' | '.join(Path(s).stem for s in sets)} |")
    print("|---|---|---|---|" + "---|" * len(sets))
    for name in dict.fromkeys(["f16", *klds] if sets else klds):
        cells, kld = [names.get(name, name), "16.00", "0", ""], klds.get(name)
        if kld:
            cells[1:] = (
                f"{kld['bits_per_value']:.2f}",
                f"{kld['kld_mean']:.4f} +-{kld['kld_se']:.4f}",
                f"{kld['same_top']:.1%}",
            )
        print(f"| {' | '.join([*cells, *(cell(rows[name]) for rows in answers)])} |")


if __name__ == "__main__":
    main()
