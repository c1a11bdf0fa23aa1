"""Attention alone: milliseconds per call (the median), GB/s of the cache that it reads, and 10^9 values of it per
second and thread (Gv/s), of the libraries in each folder given.

python tests/bench/attention_op.py STOCK/bin OURS/bin [--threads 2] [--n-kv 8000] [--n-q 1] [--pairs all]
A call is one layer's attention for n_q tokens of each sequence. Builds take turns, each in a process of its own. The
caches of a case fill --mib together, so that they come from memory. "first/last" is the median over rounds, in which
each build calls for --seconds. "read" is the share of what as many threads read
with a plain sum over an array. The last columns divide the first build's time by the last one's: with the same types,
and with f16/f16. With --against-base the first build runs f16/f16 alone, in turns with every pair of the last one.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from statistics import median

from process import Process, in_turns, markdown, median_time, parser_of_builds

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "native"))

PAIRS = ("f16/f16", "q8_0/q8_0", "q8_0/q4_0", "q4_0/q4_0", "q3_64/q3_64", "q2_64/q2_64", "k3_64/t2_64", "t3_64/t2_64")
STOCK_TYPES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl")
OUR_TYPES = ("q6_32", "q3_32", "q3_64", "q2_32", "q2_64", "k5_64", "t4_64", "k4_64", "t3_64", "k3_64", "t2_64", "k2_64")
SHAPES = "64:3:1,64:1:1,80:4:1,96:4:1,128:1:1,128:4:1,128:8:1,256:8:1,128:4:4,128:4:16"
BASE = "f16/f16"


def read_speed(n_threads: int, mib: int = 256) -> float:
    """GB/s of the best of ten sums over an array, a part of it per thread."""
    import numpy as np

    parts = np.ones(mib * 2**17, np.int64).reshape(n_threads, -1)
    best = float("inf")
    with ThreadPoolExecutor(n_threads) as pool:
        for _ in range(10):
            start = time.perf_counter()
            list(pool.map(np.sum, parts))
            best = min(best, time.perf_counter() - start)
    return parts.nbytes / best / 1e9


def operators_of(folder: Path, case: dict, mib: float) -> list:
    """As many of the case as fill so many MiB, computed once."""
    from attention import Ggml, Operator

    ggml = Ggml(folder)
    size = cache_bytes(ggml, case)
    operators = [Operator(ggml, case)]
    for _ in range(1, min(64, round(mib * 2**20 / size))):  # the same values: encoding them takes long
        operators.append(Operator(ggml, case, inputs=operators[0].inputs))
    for operator in operators:
        operator.compute()
    return operators


def cache_bytes(ggml: object, case: dict) -> int:
    from attention import TYPES

    rows = case["n_kv"] * case["n_head_kv"] * case["n_stream"]
    return rows * sum(ggml.base.ggml_row_size(TYPES[case[side]], case["d" + side]) for side in "kv")


def one_case(text: str, folder: Path, mib: float) -> None:
    """In a process of its own: for each line of seconds that comes in, calls for so long, and prints their median in
    milliseconds, null if the library does not know a type; for a null the bytes of a call."""
    from attention import Ggml

    ggml, case = Ggml(folder), json.loads(text)
    known = ggml.knows(case["k"], case["v"])
    operators = operators_of(folder, case, mib) if known else []
    for line in sys.stdin:
        seconds = json.loads(line)
        if not known:
            print("null", flush=True)
        elif seconds is None:
            print(cache_bytes(ggml, case), flush=True)
        else:
            print(1e3 * median_time([operator.run for operator in operators], seconds), flush=True)


def case_of(shape: tuple[int, int, int], pair: str, n_kv: int, n_q: int, n_threads: int) -> dict | None:
    """One for tests/native/attention.py; None for types whose blocks the head does not fill.

    shape  head size, query heads of a KV head, sequences
    """
    d, n_gqa, n_stream = shape
    k, v = pair.split("/")
    if any(d % (1 if t in ("f32", "f16", "bf16") else 64 if t.endswith("_64") else 32) for t in (k, v)):
        return None
    return {"k": k, "v": v, "dk": d, "dv": d, "n_gqa": n_gqa, "n_head_kv": 3 if d == 64 else 2, "n_q": n_q,
            "n_kv": max(64, n_kv // n_stream), "n_stream": n_stream, "mask": "causal",
            "n_threads": n_threads}  # fmt: skip


def started(folders: Sequence[Path], cases: Sequence[dict], mib: float) -> list[Process]:
    """A build for each folder, which answers seconds with milliseconds, and null with bytes."""
    return [Process(__file__, folder, "--case", json.dumps(case), "--mib", mib) for folder, case in zip(folders, cases)]


def shapes_of(text: str) -> list[tuple[int, int, int]]:
    return [(d, n_gqa, n_stream) for d, n_gqa, n_stream in (map(int, s.split(":")) for s in text.split(","))]


def short(ms: float) -> str:
    return f"{ms:.2f}".removeprefix("0") if ms < 10 else f"{ms:.1f}"


def table(found: dict[tuple[int, int, int], dict[str, list[float | None]]], pairs: Sequence[str]) -> str:
    """In Markdown: milliseconds of the first build -> of the last one, by shapes and pairs."""
    rows = []
    for shape, of_pairs in found.items():
        times = [[t for t in of_pairs.get(pair, []) if t] for pair in pairs]
        cells = [" -> ".join(map(short, dict.fromkeys((t[0], t[-1])))) if t else "" for t in times]
        rows.append((", ".join(map(str, shape)), *cells))
    return markdown(("head size, query heads per KV head, sequences", *pairs), rows)


def main() -> None:
    parser = parser_of_builds(__doc__)
    parser.add_argument("--n-kv", type=int, default=8000)
    parser.add_argument("--n-q", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=0.2)
    parser.add_argument("--mib", type=float, default=64)
    parser.add_argument(
        "--pairs",
        default=",".join(PAIRS),
        help="'all': every pair of stock's types; 'ours': every pair with a type of ours",
    )
    parser.add_argument(
        "--against-base", action="store_true", help=f"the first build runs {BASE} only, beside each pair"
    )
    parser.add_argument("--shapes", default=SHAPES, help="head size:query heads of a KV head:sequences, comma between")
    parser.add_argument("--markdown", action="store_true", help="ends with the table of docs/performance.md")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        one_case(options.case, options.folders[0], options.mib)
        return
    names = {
        "all": ["/".join(p) for p in product(STOCK_TYPES, STOCK_TYPES)],
        "ours": ["/".join(p) for p in product(STOCK_TYPES + OUR_TYPES, repeat=2) if {*p} & {*OUR_TYPES}],
    }.get(options.pairs, options.pairs.split(","))
    speed = read_speed(options.threads)
    print(f"{options.threads} threads read {speed:.1f} GB/s; n_kv {options.n_kv}, n_q {options.n_q}")
    print(
        "head  gqa  seqs  pair            "
        + "".join(f"{'ms':>10}{'GB/s':>8}{'read':>7}{'Gv/s':>7}" for _ in options.folders)
        + f"   first/last   first {BASE}/last"
    )
    shapes, pairs = shapes_of(options.shapes), [BASE, *(p for p in names if p != BASE)]
    all_ms: dict[tuple[int, int, int], dict[str, list[float | None]]] = {shape: {} for shape in shapes}
    for shape in shapes:
        base = 0.0
        for pair in pairs:
            case = case_of(shape, pair, options.n_kv, options.n_q, options.threads)
            if not case:
                continue
            base_case = {**case, **dict(zip("kv", BASE.split("/")))}
            cases = [base_case if options.against_base and i == 0 else case for i in range(len(options.folders))]
            builds = started(options.folders, cases, options.mib)
            sizes = [build.ask(None) for build in builds]
            times = in_turns(builds, options.seconds, options.rounds)
            for build in builds:
                build.close()
            ms = all_ms[shape][pair] = [median(t) if t else None for t in times]
            base = ms[0] if options.against_base else base or ms[0]
            values = case["n_kv"] * case["n_head_kv"] * case["n_stream"] * (case["dk"] + case["dv"])
            columns = "".join(
                f"{t:10.3f}{size / t / 1e6:8.1f}{size / t / 1e6 / speed:7.0%}{values / t / 1e6 / options.threads:7.1f}"
                if t
                else f"{'-':>10}{'-':>8}{'-':>7}{'-':>7}"
                for t, size in zip(ms, sizes)
            )
            turns = [first / last for first, last in zip(times[0], times[-1])]
            same = f"{median(turns):13.2f}" if turns and not options.against_base else f"{'-':>13}"
            print("{:4}  {:3}  {:4}".format(*shape), f" {pair:16}{columns}{same}{base / ms[-1]:20.2f}", flush=True)
    if options.markdown:
        print(table(all_ms, pairs))


if __name__ == "__main__":
    main()
