"""What conditioning K costs in decode: times of single tokens at the start of a context, with and without, in turns.

python tests/bench/conditioning.py MODEL.gguf [--pair q4_0/q4_0] [--threads 2] [--rounds 20] [--cpu-time]
Vectors of mean 0 and scale 1 cost what any cost. Per way: the fastest token and the median of each round's fastest.
--cpu-time counts processor time, for a busy machine.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

from kvtuner_gguf.kvectors import KVectors
from kvtuner_gguf.pair import Pair
from kvtuner_gguf.runtime import Context, Session

N_GEN = 32


def vectors(n_k: int, mean: bool, scale: bool) -> KVectors:
    return KVectors((0.0,) * n_k if mean else (), (1.0,) * n_k if scale else ())


def fastest_ms(ctx: Context, clock: Callable[[], float]) -> float:
    """Of N_GEN tokens, the first left out."""
    ctx.clear()
    times = []
    for pos in range(N_GEN + 1):
        start = clock()
        ctx.decode([(100 + pos, pos, 0)], [True])
        times.append(1e3 * (clock() - start))
    return min(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--pair", default="q4_0/q4_0", type=Pair.parse)
    parser.add_argument("--threads", default=2, type=int)
    parser.add_argument("--rounds", default=20, type=int)
    parser.add_argument("--cpu-time", action="store_true")
    options = parser.parse_args()

    with Session(options.model, n_threads=options.threads) as session:
        values_k = session.geometry(256).values_k
        ways = {"none": (False, False), "mean": (True, False), "scale": (False, True), "both": (True, True)}
        contexts = {}
        for name, way in ways.items():
            session.set_plan(
                [options.pair if n else Pair("", "") for n in values_k], [vectors(n // 256, *way) for n in values_k]
            )
            contexts[name] = Context(session, 256)
        times: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(options.rounds):
            for name, ctx in contexts.items():
                times[name].append(fastest_ms(ctx, time.process_time if options.cpu_time else time.perf_counter))
        for name, ctx in contexts.items():
            ratio = min(times[name]) / min(times["none"]), median(times[name]) / median(times["none"])
            print(
                f"{name:5}  best {min(times[name]):7.3f} ms  {ratio[0]:.3f}   median of rounds "
                f"{median(times[name]):7.3f} ms  {ratio[1]:.3f}"
            )
            ctx.close()


if __name__ == "__main__":
    main()
