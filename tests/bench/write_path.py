"""What it costs to write tokens into a cache: nanoseconds of a layer's K or V in each type, of the libraries in each
folder given.

python tests/bench/write_path.py STOCK/bin OURS/bin [--threads 2] [--shapes 3:64,2:64,2:128,8:128] [--n-tokens 1,512]
    [--types f16,q8_0,...] [--token MS --layers N]
A shape is KV heads:head size. A graph writes the same values into many caches, so that the time of one includes its
barrier, as in a model. Builds take turns, each in a process of its own; medians over rounds. --token and --layers: a
token at depth 0 takes so long in a model of N layers; the last column is the share of it that K and V in this type, by
the last build, take above f16.
"""

from __future__ import annotations

import argparse
import ctypes as c
import json
import sys
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from process import Process, in_turns, median_time, parser_of_builds

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "native"))

TYPES_SHOWN = "f16,q8_0,q5_1,q4_0,iq4_nl,q6_32,k5_64,t4_64,k4_64,t3_64,k3_64,t2_64,k2_64,q3_64,q2_64"
N_CACHE = 32  # of a graph
N_ROW = 1024  # of a cache
F32, I64 = 0, 27


class Writes:
    """A graph that writes n_tokens rows of n_heads * head_dim values into each of N_CACHE caches."""

    def __init__(self, ggml: Any, name: str, n_heads: int, head_dim: int, n_tokens: int, n_threads: int) -> None:
        from attention import TYPES, Graph

        self.ggml = ggml
        p, base, n = c.c_void_p, ggml.base, n_heads * head_dim
        base.ggml_set_rows.restype, base.ggml_set_rows.argtypes = p, [p, p, p, p]
        of_cache = N_ROW * base.ggml_row_size(TYPES[name], n)
        self.ctx = base.ggml_init(ggml.params(N_CACHE * (of_cache + 4096) + 8 * n_tokens * n + (16 << 20), None, False))
        x = np.random.default_rng(0).standard_normal((n_tokens, n), np.float32)
        to = np.arange(n_tokens, dtype=np.int64)
        src = base.ggml_new_tensor_4d(self.ctx, F32, n, n_tokens, 1, 1)
        rows = base.ggml_new_tensor_4d(self.ctx, I64, n_tokens, 1, 1, 1)
        for tensor, data in ((src, x), (rows, to)):
            c.memmove(base.ggml_get_data(tensor), data.ctypes.data, data.nbytes)
        writes = []
        for _ in range(N_CACHE):
            cache = base.ggml_new_tensor_4d(self.ctx, TYPES[name], n, N_ROW, 1, 1)
            writes.append(base.ggml_set_rows(self.ctx, cache, src, rows))
        self.run = Graph(ggml, self.ctx, writes, n_threads).run

    def free(self) -> None:
        self.ggml.base.ggml_free(self.ctx)


def one_build(folder: Path) -> None:
    """In a process of its own: for each line of JSON that comes in, prints nanoseconds; null if it has no such type."""
    from attention import Ggml

    ggml, last, writes = Ggml(folder), "", None
    for line in sys.stdin:
        case = json.loads(line)
        if not ggml.knows(case[0]):
            print("null", flush=True)
            continue
        if line != last:
            if writes:
                writes.free()
            last, writes = line, Writes(ggml, *case)
        print(1e9 * median_time([writes.run], 0.05) / N_CACHE, flush=True)


def main() -> None:
    parser = parser_of_builds(__doc__)
    parser.add_argument("--shapes", default="3:64,2:64,2:128,8:128")
    parser.add_argument("--n-tokens", default="1,512")
    parser.add_argument("--types", default=TYPES_SHOWN)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--token", type=float, help="milliseconds")
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--build", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.build:
        one_build(options.folders[0])
        return
    names = ["f16", *(name for name in options.types.split(",") if name != "f16")]
    builds = [Process(__file__, folder, "--build") for folder in options.folders]
    share = f"{'of a token':>13}" if options.token else ""
    print("KV heads  head  tokens  type    " + "".join(f"{f'build {i}, ns':>14}" for i in range(len(builds))) + share)
    for n_heads, head_dim in (map(int, shape.split(":")) for shape in options.shapes.split(",")):
        for n_tokens in map(int, options.n_tokens.split(",")):
            f16 = 0.0
            for name in names:
                if n_heads * head_dim % (64 if name.endswith("_64") else 32):
                    continue
                case = [name, n_heads, head_dim, n_tokens, options.threads]
                ns = [median(of) if of else None for of in in_turns(builds, case, options.rounds)]
                f16 = f16 or ns[-1]
                line = f"{n_heads:8}  {head_dim:4}  {n_tokens:6}  {name:8}"
                line += "".join(f"{x:14.0f}" if x else f"{'-':>14}" for x in ns)
                if options.token and n_tokens == 1:
                    line += f"{2 * options.layers * (ns[-1] - f16) / 1e6 / options.token:13.1%}"
                print(line, flush=True)
    for build in builds:
        build.close()


if __name__ == "__main__":
    main()
