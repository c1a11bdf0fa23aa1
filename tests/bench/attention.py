"""llama-bench of two or more builds in turns: tokens per second at each depth, medians, and ratios to the first build.

python tests/bench/attention.py MODEL.gguf STOCK/bin OURS/bin [--pairs q8_0/q8_0,...] [--depths 0,4096,8000] [--threads 1,2] [--rounds 3]
The last column divides by the first build's f16/f16 in the same test, which is therefore always measured.
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


def bench(folder: Path, model: Path, pair: str, depth: int, threads: int, tests: list[str]) -> dict[str, float]:
    """Test -> tokens per second, of one run."""
    k, v = pair.split("/")
    command = [str(folder / "llama-bench"), "-m", str(model), "-fa", "1", "-ctk", k, "-ctv", v, "-d", str(depth), "-t", str(threads), "-r", "1", "-o", "jsonl", *tests]
    env = {**os.environ, "LD_LIBRARY_PATH": str(folder)}
    lines = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout.splitlines()
    runs = [json.loads(line) for line in lines]
    return {f"pp{r['n_prompt']}" if r["n_prompt"] else f"tg{r['n_gen']}": r["avg_ts"] for r in runs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--pairs", default=",".join(PAIRS))
    parser.add_argument("--depths", default="0,4096,8000")
    parser.add_argument("--threads", default="2")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--n-prompt", type=int, default=512)
    parser.add_argument("--n-gen", type=int, default=32)
    options = parser.parse_args()

    pairs = [BASE, *(p for p in options.pairs.split(",") if p != BASE)]
    tests = ["-p", str(options.n_prompt), "-n", str(options.n_gen)]
    n = len(options.folders)
    print("threads  depth  test   pair          " + "".join(f"{f'build {i}':>10}" for i in range(n)) + f"   last/first   last/first {BASE}")
    for threads in map(int, options.threads.split(",")):
        for depth in map(int, options.depths.split(",")):
            base: dict[str, float] = {}
            for pair in pairs:
                runs = [[bench(folder, options.model, pair, depth, threads, tests) for folder in options.folders] for _ in range(options.rounds)]
                for test in runs[0][0]:
                    ts = [median(r[i][test] for r in runs) for i in range(n)]
                    base.setdefault(test, ts[0])
                    numbers = "".join(f"{t:10.1f}" for t in ts)
                    print(f"{threads:7}  {depth:5}  {test:5}  {pair:13}{numbers}{ts[-1] / ts[0]:13.2f}{ts[-1] / base[test]:13.2f}", flush=True)


if __name__ == "__main__":
    main()
