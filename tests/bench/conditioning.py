"""What conditioning K costs in decode: times of single tokens at the start of a context, with and without, in turns.

python tests/bench/conditioning.py MODEL.gguf [--pair q4_0/q4_0] [--threads 2] [--rounds 20] [--cpu-time]
Vectors of mean 0 and scale 1, and unit matrices, cost what any cost; a basis comes with the type of groups of as many
bits as --pair's K. Per way: the fastest token and the median of each round's fastest.
--cpu-time counts processor time, for a busy machine.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np

from kvtuner_gguf.codecs import CODECS, codec
from kvtuner_gguf.kvectors import KVectors
from kvtuner_gguf.pair import Pair
from kvtuner_gguf.runtime import Context, Session

N_GEN = 32
WAYS = ("none", "mean", "scale", "both", "basis")


def vectors(n_k: int, head_dim: int, way: str) -> KVectors:
    mean = (0.0,) * n_k if way in ("mean", "both", "basis") else ()
    if way == "basis":
        unit = 127 * np.eye(head_dim, dtype=np.int8)
        return KVectors(mean, basis=unit.tobytes() * (n_k // head_dim), basis_scale=(1 / 127,) * n_k)
    return KVectors(mean, (1.0,) * n_k if way in ("scale", "both") else ())


def in_groups(pair: Pair) -> Pair:
    """With the type of groups that is nearest to K's in bits."""
    groups = (c for c in CODECS.values() if c.groups)
    bits = codec(pair.type_k).bits_per_value
    return Pair(min(groups, key=lambda c: abs(c.bits_per_value - bits)).name, pair.type_v)


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
    parser.add_argument("--head-dim", default=64, type=int, help="of K")
    parser.add_argument("--threads", default=2, type=int)
    parser.add_argument("--rounds", default=20, type=int)
    parser.add_argument("--cpu-time", action="store_true")
    options = parser.parse_args()

    with Session(options.model, n_threads=options.threads) as session:
        values_k = session.geometry(256).values_k
        contexts = {}
        for name in WAYS:
            pair = in_groups(options.pair) if name == "basis" else options.pair
            session.set_plan(
                [pair if n else Pair("", "") for n in values_k],
                [vectors(n // 256, options.head_dim, name) for n in values_k],
            )
            contexts[name] = Context(session, 256)
        times: dict[str, list[float]] = {name: [] for name in WAYS}
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
