"""llama-bench of two or more builds in turns: tokens per second at each depth, medians, and ratios to the first build.

python tests/bench/attention.py MODEL.gguf STOCK/bin OURS/bin [--pairs q8_0/q8_0,...] [--depths 0,4096,8000] [--threads
1,2] [--rounds 3] The last columns divide the last build's speed by the first one's: with the same types; with f16/f16,
which is therefore always measured; and with q8_0/q8_0, if that is. --first-pairs leaves out what the first build is too
slow for.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
from pathlib import Path
from statistics import median

PAIRS = ("f16/f16", "q8_0/q8_0", "q8_0/q4_0", "q4_0/q4_0", "q5_1/iq4_nl", "q5_0/q4_1", "bf16/bf16", "f32/f32")
BASE = "f16/f16"
BASES = (BASE, "q8_0/q8_0")


def bench(folder: Path, model: Path, pair: str, depth: int, threads: int, tests: list[str]) -> dict[str, float]:
    """Test -> tokens per second, of one run."""
    k, v = pair.split("/")
    command = [
        str(folder / "llama-bench"),
        "-m",
        str(model),
        "-fa",
        "1",
        "-ctk",
        k,
        "-ctv",
        v,
        "-d",
        str(depth),
        "-t",
        str(threads),
        "-r",
        "1",
        "-o",
        "jsonl",
        *tests,
    ]
    env = {**os.environ, "LD_LIBRARY_PATH": str(folder)}
    lines = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout.splitlines()
    runs = [json.loads(line) for line in lines]
    return {f"pp{r['n_prompt']}" if r["n_prompt"] else f"tg{r['n_gen']}": r["avg_ts"] for r in runs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--pairs", default=",".join(PAIRS))
    parser.add_argument("--first-pairs", help="pairs that the first build runs; by default all")
    parser.add_argument("--depths", default="0,4096,8000")
    parser.add_argument("--threads", default="2")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--n-prompt", type=int, default=512)
    parser.add_argument("--n-gen", type=int, default=32)
    options = parser.parse_args()

    pairs = [BASE, *(p for p in options.pairs.split(",") if p != BASE)]
    of_first = {BASE, *(options.first_pairs or options.pairs).split(",")}
    tests = [x for flag, n in (("-p", options.n_prompt), ("-n", options.n_gen)) for x in (flag, str(n))]
    n = len(options.folders)
    print(
        "threads  depth  test    pair          "
        + "".join(f"{f'build {i}':>10}" for i in range(n))
        + "".join(f"{f'/ first {p}':>18}" for p in ("same", *BASES))
    )
    for threads in map(int, options.threads.split(",")):
        for depth in map(int, options.depths.split(",")):
            first: dict[tuple[str, str], float] = {}
            for pair in pairs:
                folders = [f if i or pair in of_first else None for i, f in enumerate(options.folders)]
                runs = [
                    [bench(f, options.model, pair, depth, threads, tests) if f else {} for f in folders]
                    for _ in range(options.rounds)
                ]
                for test in runs[0][-1]:
                    ts = [median(r[i][test] for r in runs) if test in runs[0][i] else None for i in range(n)]
                    if ts[0]:
                        first[test, pair] = ts[0]
                    numbers = "".join(f"{t:10.1f}" if t else f"{'-':>10}" for t in ts)
                    ratios = [ts[-1] / first[test, p] if (test, p) in first else None for p in (pair, *BASES)]
                    print(
                        f"{threads:7}  {depth:5}  {test:6}  {pair:13}{numbers}"
                        + "".join(f"{r:18.2f}" if r else f"{'-':>18}" for r in ratios),
                        flush=True,
                    )


if __name__ == "__main__":
    main()
