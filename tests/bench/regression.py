"""Whether a build is slower than one of before: attention, writing a token, and a whole model, in turns.

python tests/bench/regression.py BEFORE/bin OURS/bin [--model MODEL.gguf] [--threads 2] [--rounds 9] [--allow 0.05]
Prints for each case the quartiles of the rounds' ratios of times, after / before. A case is slower if their median is
above 1 + --allow and the lower quartile above half of that, in a second run as well. Ends with 1 if one is.
A build of before: `git worktree add ../before REV`, and the README's first command there up to `demo`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import attention_op
from process import Process, in_turns, llama_bench, parser_of_builds

SHAPES = ((64, 3, 1), (128, 6, 1))  # head size, query heads of a KV head, sequences
PAIRS = ("f16/f16", "q8_0/q8_0", "q4_0/q4_0", "k3_64/t2_64")
DEPTHS = ((256, 1), (8000, 1), (2048, 512))  # cells, tokens
TYPES = ("f16", "q8_0", "q4_0", "k3_64", "t2_64", "t4_64")
ROWS = ((3, 64), (2, 128))  # KV heads, head size
MODEL_ROUNDS = 5


def asked(builds: list[Process], question: Any, rounds: int) -> list[float]:
    """Ratios of times, after / before, a round each."""
    before, after = in_turns(builds, question, rounds)
    for build in builds:
        build.close()
    return [a / b for b, a in zip(before, after)]


def attention(options: argparse.Namespace, shape: tuple[int, int, int], pair: str, n_kv: int, n_q: int) -> list[float]:
    case = attention_op.case_of(shape, pair, n_kv, n_q, options.threads)
    assert case, f"{pair} does not fill heads of {shape[0]}"
    mib = 64 if n_kv > 1024 else 4
    return asked(attention_op.started(options.folders, [case, case], mib), 0.1, options.rounds)


def writing(options: argparse.Namespace, n_heads: int, head_dim: int, name: str, n_tokens: int) -> list[float]:
    script = str(Path(__file__).with_name("write_path.py"))
    builds = [Process(script, folder, "--build") for folder in options.folders]
    return asked(builds, [name, n_heads, head_dim, n_tokens, options.threads], options.rounds)


def model(options: argparse.Namespace, pair: str, test: str) -> list[float]:
    def speed(folder: Path) -> float:
        (found,) = llama_bench(folder, options.model, pair, 0, options.threads, test.split()).values()
        return found

    before, after = options.folders
    return [speed(before) / speed(after) for _ in range(MODEL_ROUNDS)]


def cases(options: argparse.Namespace) -> dict[str, Callable[[], list[float]]]:
    """What is timed -> the ratios of its rounds."""
    found: dict[str, Callable[[], list[float]]] = {}
    for shape in SHAPES:
        for pair in PAIRS:
            for n_kv, n_q in DEPTHS:
                name = f"attention {shape[0]}:{shape[1]}, {pair}, {n_q} over {n_kv}"
                found[name] = partial(attention, options, shape, pair, n_kv, n_q)
    for row in ROWS:
        for type_name in TYPES:
            for n in (1, 512):
                found[f"writing {row[0]}*{row[1]}, {type_name}, {n}"] = partial(writing, options, *row, type_name, n)
    if options.model:
        for pair in PAIRS:
            for test in ("-p 512 -n 0", "-p 0 -n 64"):
                found[f"model {pair}, {test}"] = partial(model, options, pair, test)
    return found


def is_slower(ratios: list[float], allow: float) -> bool:
    return median(ratios) > 1 + allow and quantiles(ratios)[0] > 1 + allow / 2


def main() -> int:
    parser = parser_of_builds(__doc__)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--allow", type=float, default=0.05)
    options = parser.parse_args()
    if len(options.folders) != 2:
        parser.error(f"{len(options.folders)} builds. Name two: the one of before, and the one to judge.")
    slower = []
    for name, ratios_of in cases(options).items():
        ratios = ratios_of()
        if again := is_slower(ratios, options.allow):
            ratios = ratios_of()
        is_worse = again and is_slower(ratios, options.allow)
        slower += [name] * is_worse
        print(f"{name:44}" + "".join(f"{q:7.2f}" for q in quantiles(ratios)) + "  slower" * is_worse, flush=True)
    print(f"{len(slower)} slower" + "".join(f"\n  {name}" for name in slower))
    return 1 if slower else 0


if __name__ == "__main__":
    sys.exit(main())
