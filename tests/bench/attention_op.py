"""Attention alone: milliseconds per call, and GB/s of the cache that it reads, of the libraries in each folder given.

python tests/bench/attention_op.py STOCK/bin OURS/bin [--threads 2] [--n-kv 8000]
Builds take turns, each in a process of its own; medians. The caches of a case fill --mib together, so that they come from memory.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "native"))

PAIRS = ("f16/f16", "q8_0/q8_0", "q8_0/q4_0", "q4_0/q4_0", "q5_1/iq4_nl")
SHAPES = ((64, 3, 1), (64, 1, 1), (80, 4, 1), (96, 4, 1), (128, 1, 1), (128, 4, 1), (128, 8, 1), (256, 8, 1), (128, 4, 4), (128, 4, 16))
"""Head size, query heads of a KV head, sequences."""


def measure(folder: Path, case: dict, mib: float, seconds: float) -> float:
    """Milliseconds per call."""
    from attention import Ggml, Operator

    ggml = Ggml(folder)
    size = cache_bytes(ggml, case)
    operators = [Operator(ggml, case, seed) for seed in range(max(1, min(64, round(mib * 2**20 / size))))]
    for operator in operators:
        operator.compute()
    n, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        for operator in operators:
            operator.run()
        n += len(operators)
    return 1e3 * (time.perf_counter() - start) / n


def cache_bytes(ggml: object, case: dict) -> int:
    from attention import TYPES

    rows = case["n_kv"] * case["n_head_kv"] * case["n_stream"]
    return rows * sum(ggml.base.ggml_row_size(TYPES[case[side]], case["d" + side]) for side in "kv")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--n-kv", type=int, default=8000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=0.5)
    parser.add_argument("--mib", type=float, default=64)
    parser.add_argument("--pairs", default=",".join(PAIRS))
    parser.add_argument("--shapes", default="", help="head size:heads:sequences, comma between")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        from attention import Ggml

        case = json.loads(options.case)
        ms = measure(options.folders[0], case, options.mib, options.seconds)
        print(json.dumps([ms, cache_bytes(Ggml(options.folders[0]), case)]))
        return
    print("head  gqa  seqs  pair          " + "".join(f"{'ms':>10}{'GB/s':>8}" for _ in options.folders) + "   first/last")
    shapes = [tuple(map(int, s.split(":"))) for s in options.shapes.split(",")] if options.shapes else SHAPES
    for d, n_gqa, n_stream in shapes:
        for pair in options.pairs.split(","):
            k, v = pair.split("/")
            if d % 32 and pair != "f16/f16":
                continue
            case = {"k": k, "v": v, "dk": d, "dv": d, "n_gqa": n_gqa, "n_head_kv": 3 if d == 64 else 2, "n_q": 1,
                    "n_kv": max(64, options.n_kv // n_stream), "n_stream": n_stream, "mask": "causal", "n_threads": options.threads}  # fmt: skip
            times: list[list[float]] = [[] for _ in options.folders]
            for _ in range(options.rounds):
                for i, folder in enumerate(options.folders):
                    command = [sys.executable, __file__, str(folder), "--case", json.dumps(case), "--mib", str(options.mib), "--seconds", str(options.seconds)]
                    ms, size = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
                    times[i].append(ms)
            ms = [median(t) for t in times]
            print(f"{d:4}  {n_gqa:3}  {n_stream:4}  {pair:14}" + "".join(f"{t:10.3f}{size / t / 1e6:8.1f}" for t in ms) + f"{ms[0] / ms[-1]:13.2f}", flush=True)


if __name__ == "__main__":
    main()
