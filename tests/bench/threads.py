"""What waiting threads cost: tokens/s of prefill and decode, alone and with a second such program at the same time.

python tests/bench/threads.py MODEL.gguf [--spins libgomp,ours,0,10000] [--threads 2] [--rounds 3]
Threads of llama.cpp meet at a barrier after each operation; those that wait spin GOMP_SPINCOUNT times and then sleep.
"libgomp" is libgomp's own count, "ours" what the package sets. Every setting in turns, each run in a process of its
own; medians, and shares of the first setting.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

N_PROMPT, N_DECODE = 512, 64
LIBGOMP = "300000"  # if it is not told


def child(model: Path, threads: int, seconds: float) -> None:
    """In a process of its own: prints [prefill, decode] in tokens/s."""
    from kvtuner_gguf.runtime import Session

    session = Session(model, n_threads=threads)
    prefill: list[float] = []
    decode: list[float] = []
    with session.context(N_PROMPT + N_DECODE) as ctx:
        end = time.monotonic() + seconds
        while not prefill or time.monotonic() < end:
            ctx.clear()
            start = time.perf_counter()
            ctx.decode([(i % session.n_vocab, i, 0) for i in range(N_PROMPT)], [False] * (N_PROMPT - 1) + [True])
            middle = time.perf_counter()
            for i in range(N_DECODE):
                ctx.decode([(i % session.n_vocab, N_PROMPT + i, 0)], [True])
            prefill.append(N_PROMPT / (middle - start))
            decode.append(N_DECODE / (time.perf_counter() - middle))
    print(json.dumps([median(prefill), median(decode)]))


def run(options: argparse.Namespace, spin: str, n_programs: int) -> list[float]:
    """Mean [prefill, decode] of n_programs at once, in tokens/s of each."""
    env = {name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    env |= {} if spin == "ours" else {"GOMP_SPINCOUNT": LIBGOMP if spin == "libgomp" else spin}
    command = [
        sys.executable,
        __file__,
        str(options.model),
        "--threads",
        str(options.threads),
        "--seconds",
        str(options.seconds),
        "--child",
    ]
    programs = [
        subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        for _ in range(n_programs)
    ]
    results = [json.loads(p.communicate()[0]) for p in programs]
    return [sum(r[i] for r in results) / n_programs for i in range(2)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--spins", default="libgomp,ours,0,500,10000")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.model, options.threads, options.seconds)
        return
    spins = options.spins.split(",")
    results: dict[tuple[str, int], list[list[float]]] = {(spin, n): [] for spin in spins for n in (1, 2)}
    for _ in range(options.rounds):
        for (spin, n), found in results.items():
            found.append(run(options, spin, n))
    print(
        f"{'spins':>8}"
        + "".join(f"{name:>22}" for name in ("prefill alone", "decode alone", "prefill of two", "decode of two"))
    )
    first = [median(r[i] for r in results[spins[0], n]) for n in (1, 2) for i in range(2)]
    for spin in spins:
        now = [median(r[i] for r in results[spin, n]) for n in (1, 2) for i in range(2)]
        print(f"{spin:>8}" + "".join(f"{x:14.1f} ({x / f:4.2f}x)" for x, f in zip(now, first)), flush=True)


if __name__ == "__main__":
    main()
