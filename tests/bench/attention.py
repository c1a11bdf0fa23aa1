"""llama-bench of two or more builds in turns: tokens per second at each depth, medians, and ratios to the first build.

python tests/bench/attention.py MODEL.gguf STOCK/bin OURS/bin [--pairs q8_0/q8_0,...] [--depths 0,4096,8000] [--threads
1,2] [--rounds 3] The last columns divide the last build's speed by the first one's: with the same types; with f16/f16,
which is therefore always measured; and with q8_0/q8_0, if that is. --first-pairs leaves out what the first build is too
slow for.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from process import llama_bench, markdown, parser_of_sweeps

PAIRS = ("f16/f16", "q8_0/q8_0", "q8_0/q4_0", "q4_0/q4_0", "q5_1/iq4_nl", "q5_0/q4_1", "bf16/bf16", "f32/f32")
BASE = "f16/f16"
BASES = (BASE, "q8_0/q8_0")


def table(rows: dict[str, dict[str, list[float | None]]], pairs: Sequence[str]) -> str:
    """In Markdown: tokens per second of each build -> of the next, by tests and pairs."""
    cells = [
        (name, *(" -> ".join(f"{t:.0f}" for t in of_pairs[pair] if t) for pair in pairs))
        for name, of_pairs in rows.items()
    ]
    return markdown(("tokens/s", *pairs), cells)


def main() -> None:
    parser = parser_of_sweeps(__doc__, ",".join(PAIRS), "0,4096,8000", 3)
    parser.add_argument("--threads", default="2")
    parser.add_argument("--n-prompt", type=int, default=512)
    parser.add_argument("--n-gen", type=int, default=32)
    parser.add_argument("--markdown", action="store_true", help="ends with the table of docs/performance.md")
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
    rows: dict[str, dict[str, list[float | None]]] = {}
    for threads in map(int, options.threads.split(",")):
        for depth in map(int, options.depths.split(",")):
            first: dict[tuple[str, str], float] = {}
            for pair in pairs:
                folders = [f if i or pair in of_first else None for i, f in enumerate(options.folders)]
                runs = [
                    [llama_bench(f, options.model, pair, depth, threads, tests) if f else {} for f in folders]
                    for _ in range(options.rounds)
                ]
                for test in runs[0][-1]:
                    ts = [median(r[i][test] for r in runs) if test in runs[0][i] else None for i in range(n)]
                    rows.setdefault(f"{test} at depth {depth}, threads {threads}", {})[pair] = ts
                    if ts[0]:
                        first[test, pair] = ts[0]
                    numbers = "".join(f"{t:10.1f}" if t else f"{'-':>10}" for t in ts)
                    ratios = [ts[-1] / first[test, p] if (test, p) in first else None for p in (pair, *BASES)]
                    print(
                        f"{threads:7}  {depth:5}  {test:6}  {pair:13}{numbers}"
                        + "".join(f"{r:18.2f}" if r else f"{'-':>18}" for r in ratios),
                        flush=True,
                    )
    if options.markdown:
        print(table(rows, pairs))


if __name__ == "__main__":
    main()
