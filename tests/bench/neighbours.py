"""The neighbours' methods in a model's real forward pass, at as many real bits as ours and stock's: KLD from an f16
cache.

python tests/bench/neighbours.py [MODEL.gguf] [--bits 2.25,3.25,4.5] [--methods kivi,kvquant,...] [--contexts 2048x4]
    [-f TEXT] [--calibration TEXT] [--plan MODEL.planned.gguf]... [-c N_CTX] [--weights f16]
    [--json FILE]

The cache is f16, and what a method keeps of K and V is written into it, layer by layer, before attention reads it
(neighbour/cache.py); the methods, written from their papers, are in neighbour/coded.py and neighbour/chosen.py. Each
has, of its own parameters, those of the most real bits within the goal, and beside them those of codes of other bits
(or of another rank) that come next, since windows and codes cost alike; if all are above, the fewest. Rows "through the
harness" are our types by the same way: beside those of the real cache they show what the harness is worth.
Scored is the second half of each context; +- is the standard error over blocks of 256 tokens. Windows are counted at
the end of the context that is run, which is to their advantage: before it they are a larger part. What no token adds to
(tables, matrices, a plan's vectors) is counted at -c tokens [default: those of the context].
A method with windows, or with a say in what attention gets, is run 32 tokens at once; the tokens of a batch that it
would have let go of by then are exact until the next, and counted so.
--weights: with activations in 8 bits any rounding is amplified, and the noise floor is higher.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from ctypes import create_string_buffer
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from neighbour.cache import RewrittenCache
from neighbour.chosen import Evict, Qaq, Think
from neighbour.coded import Hack, Kivi, KvQuant, LowRank, Oscar
from neighbour.method import SLACK, STEP, Emulated, Known, Method, Shape, within

from kvtuner_gguf.api import read_plan
from kvtuner_gguf.calibrate.capture import capture
from kvtuner_gguf.calibrate.kld import N_UBATCH, Chunks, Reference, compare, make_reference, measure, quality_of
from kvtuner_gguf.calibrate.text import chunks_of, read_text, write_text
from kvtuner_gguf.codecs import CODECS, codec
from kvtuner_gguf.default_model import default_model
from kvtuner_gguf.geometry import Geometry
from kvtuner_gguf.kvectors import KVectors, vector_bytes, where_quantized
from kvtuner_gguf.pair import Pair
from kvtuner_gguf.plan import Plan
from kvtuner_gguf.quality import Quality
from kvtuner_gguf.runtime import Session

N_CAPTURED = 1024  # tokens of a chunk of the calibration text
N_TRIES = 3  # of a method whose bits are not known before a run

METHODS: dict[str, Callable[[Shape, float], Sequence[Method]]] = {
    "kivi": Kivi.choices,
    "kvquant": KvQuant.choices,
    "qaq": Qaq.choices,
    "think": Think.choices,
    "lowrank": LowRank.choices,
    "evict8": lambda shape, goal: Evict.choices("q8_0", shape, goal),
    "evict4": lambda shape, goal: Evict.choices("q4_0", shape, goal),
    "hack": Hack.choices,
    "oscar": Oscar.choices,
}
"""What --methods names -> its choices of parameters, of which one or two are run at a goal."""


@dataclass(frozen=True)
class Row:
    """A line of the table; the figures as JSON has them."""

    goal: float | None
    name: str
    bits_k: float
    bits_v: float
    bits: float
    kld: float
    error: float
    same_top: float
    seconds: float

    def __str__(self) -> str:
        bits = " | ".join(f"{b:.2f}" for b in (self.bits_k, self.bits_v, self.bits))
        return f"| {self.name} | {bits} | {self.kld:.5f} | {self.error:.5f} | {self.same_top:.1%} |"


class Bench:
    """Everything on one text in contexts of one size."""

    def __init__(self, session: Session, reference: Reference, known: Known, n_counted: int) -> None:
        self.session, self.reference, self.known = session, reference, known
        self.geometry = session.geometry(n_counted)
        k = known.capture.sample(known.capture.il[0], 0).k
        self.shape = Shape(len(k), k.shape[2], reference.chunks.n_ctx, n_counted)
        self.rows: list[Row] = []

    def add(self, goal: float | None, name: str, bits: tuple[float, float], start: float, q: Quality) -> None:
        n_k, n_v = sum(self.geometry.values_k), sum(self.geometry.values_v)
        whole = (bits[0] * n_k + bits[1] * n_v) / (n_k + n_v)
        seconds = time.monotonic() - start
        bits_k, bits_v = map(float, bits)
        row = Row(goal, name, bits_k, bits_v, whole, q.kld_mean, q.kld_se, q.same_top, round(seconds, 1))
        self.rows.append(row)
        print(row, flush=True)

    def real(
        self,
        goal: float | None,
        name: str,
        pairs: Sequence[Pair] | None,
        k_vectors: Sequence[KVectors] = (),
        flash_attn: bool = True,
    ) -> None:
        """A row of the run time's own cache."""
        start = time.monotonic()
        quality = measure(self.session, pairs, self.reference, k_vectors=k_vectors, flash_attn=flash_attn)
        self.add(goal, name, bits_of(self.geometry, pairs, k_vectors), start, quality)

    def imitated(self, goal: float | None, method: Method) -> None:
        """A row of a method through the harness."""
        start, shape = time.monotonic(), self.shape
        for _ in range(N_TRIES):
            keepers = method.keepers(self.known, shape)
            cache = RewrittenCache(keepers, shape.n_head_kv)
            with self.session.context(shape.n_ctx, None, n_ubatch=N_UBATCH, watch=cache) as ctx:
                scores = compare(ctx, self.reference, step=method.step)
            cache.check()
            found = [bits for keeper in keepers.values() if (bits := keeper.bits())]
            bits_k, bits_v = np.mean(found, axis=0) if found else method.bits(shape)
            if not (again := method.corrected((bits_k, bits_v))):
                break
            method = again
        above = " (its fewest bits)" if goal and (bits_k + bits_v) / 2 > goal + SLACK else ""
        quality = quality_of(*scores, self.reference.chunks)
        self.add(goal, f"{method}{above}", (bits_k, bits_v), start, quality)

    def uniform(self, pair: Pair) -> tuple[Pair, ...]:
        return tuple(pair if n else Pair("", "") for n in self.geometry.values_k)

    def of_goal(self, goal: float, methods: Sequence[str], plans: Sequence[tuple[str, Plan]]) -> None:
        """Our types and stock's of so many bits, with a plan's bases, too, and the methods."""
        plain = types_within(goal, self.shape.head_dim, groups=False)
        for name in plain:
            pair = Pair(name, name)
            self.real(goal, str(pair), self.uniform(pair))
        self.imitated(goal, Emulated(Pair(plain[0], plain[0])))
        for file, plan in plans:
            in_basis = Pair(types_within(goal, self.shape.head_dim, groups=True)[0], plain[0])
            has_basis = [bool(v.basis) for v in plan.k_vectors]
            if any(has_basis):
                pairs = tuple(
                    in_basis if has else p for has, p in zip(has_basis, self.uniform(Pair(plain[0], plain[0])))
                )
                name = f"{in_basis} in the {sum(has_basis)} bases of {file}, else {plain[0]}/{plain[0]}"
                self.real(goal, name, pairs, where_quantized(plan.k_vectors, pairs))
        for method in methods:
            for choice in within(METHODS[method](self.shape, goal), self.shape, goal):
                self.imitated(goal, choice)


def types_within(goal: float, head_dim: int, *, groups: bool) -> list[str]:
    """The types of most bits within the goal; with none, that of the fewest."""
    types = [c for c in CODECS.values() if c.block_size > 1 and c.groups == groups and head_dim % c.block_size == 0]
    fitting = [c.bits_per_value for c in types if c.bits_per_value <= goal]
    most = max(fitting) if fitting else min(c.bits_per_value for c in types)
    return [c.name for c in types if c.bits_per_value == most]


def bits_of(
    geometry: Geometry, pairs: Sequence[Pair] | None, k_vectors: Sequence[KVectors] = ()
) -> tuple[float, float]:
    """Real bits of K, its vectors included, and of V."""
    pairs = pairs or (Pair("f16", "f16"),) * geometry.n_layer
    n_bytes = [vector_bytes(k_vectors), 0]
    for pair, n_k, n_v in zip(pairs, geometry.values_k, geometry.values_v):
        n_bytes[0] += codec(pair.type_k).row_bytes(n_k) if n_k else 0
        n_bytes[1] += codec(pair.type_v).row_bytes(n_v) if n_v else 0
    return 8 * n_bytes[0] / sum(geometry.values_k), 8 * n_bytes[1] / sum(geometry.values_v)


def rope_base(session: Session) -> float:
    """The base of RoPE's frequencies, by the model's metadata."""

    def value(key: str) -> str:
        buf = create_string_buffer(256)
        session._llama.llama_model_meta_val_str(session.model, key.encode(), buf, len(buf))
        return buf.value.decode()

    return float(value(f"{value('general.architecture')}.rope.freq_base") or 10000)


def check_rope(known: Known, chunks: Chunks) -> None:
    """Raises SystemExit unless RoPE is undone as the model does it.

    K of layer 0 before RoPE depends on the token alone, so that of a token that comes twice must be the same; and
    turning on must give back what was cached.
    """
    layer = next(iter(known))
    for tokens, sample in zip(chunks.tokens, layer.samples):
        plain = layer.rope.undone(sample.k, 0)
        assert np.abs(layer.rope.turned(plain, 0) - sample.k).max() <= 2**-11 * np.abs(sample.k).max()
        _, first, of = np.unique(tokens, return_index=True, return_inverse=True)
        far = np.linalg.norm(plain - plain[:, first[of]]) / np.linalg.norm(plain)
        if far > 0.01:
            raise SystemExit(f"RoPE of this model is not plain: K of the same token differs by {far:.1%} without it.")


@contextmanager
def session_of(model: Path, weights: str | None, folder: Path, n_threads: int | None) -> Iterator[Session]:
    """The model, or a copy of it with such weights."""
    path = model
    if weights:
        path = folder / f"{model.stem} in {weights}.gguf"
        with Session(model, n_threads=n_threads) as session:
            session.save_as(path, weights)
    with Session(path, n_threads=n_threads) as session:
        yield session


@contextmanager
def calibrated(session: Session, text: Path | None, n_chunk: int, folder: Path) -> Iterator[Known]:
    """Q, K and V of the calibration text."""
    n = n_chunk * N_CAPTURED
    if text:
        tokens = read_text(session, text, n, 0).calibration
    else:
        tokens = write_text(session, n, 0, stream=N_CAPTURED, seed=0).calibration
    chunks = chunks_of(tokens, N_CAPTURED, n_chunk, "calibration")
    (folder / "captured").mkdir()
    known = Known(capture(session, chunks, folder / "captured"), rope_base(session))
    check_rope(known, chunks)
    yield known


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", help="[default: the default model]")
    parser.add_argument("--bits", default="2.25,3.25,4.5")
    parser.add_argument("--methods", default=",".join(METHODS), help=f"some of {', '.join(METHODS)}")
    parser.add_argument("--contexts", default="2048x4")
    parser.add_argument("-f", "--file", type=Path, help="text of the test [default: the model writes it]")
    parser.add_argument("--calibration", type=Path, help="text of what calibrates [default: the model writes it]")
    parser.add_argument("--chunks", type=int, default=4, help=f"of the calibration, {N_CAPTURED} tokens each")
    parser.add_argument("--plan", type=Path, action="append", default=[], help="a file that holds a plan for MODEL")
    parser.add_argument("-c", "--ctx-size", type=int, help="at which tables and vectors are counted")
    parser.add_argument("--weights", help="bf16 or f16: run a copy with such weights [default: as in the file]")
    parser.add_argument("-t", "--threads", type=int)
    parser.add_argument("--json", type=Path, help="file for the figures")
    options = parser.parse_args()
    methods = [m for m in options.methods.split(",") if m]
    if unknown := set(methods) - set(METHODS):
        parser.error(f"--methods: {', '.join(sorted(unknown))} not known, need some of {', '.join(METHODS)}")
    plans = [(path.name, plan) for path in options.plan if (plan := read_plan(path))]
    found = {}
    with (
        TemporaryDirectory() as tmp,
        session_of(options.model or default_model(), options.weights, Path(tmp), options.threads) as session,
        calibrated(session, options.calibration, options.chunks, Path(tmp)) as known,
    ):
        for context in options.contexts.split(","):
            n_ctx, n_chunk = map(int, context.split("x"))
            reference = referenced(session, options.file, n_ctx, n_chunk, Path(tmp) / "f16")
            bench = Bench(session, reference, known, options.ctx_size or n_ctx)
            table(bench, [float(b) for b in options.bits.split(",") if b], methods, plans)
            found[context] = [asdict(row) for row in bench.rows]
            if options.json:
                options.json.write_text(json.dumps(found, indent=1) + "\n")


def referenced(session: Session, text: Path | None, n_ctx: int, n_chunk: int, path: Path) -> Reference:
    """The f16 cache's run of the test text."""
    if text:
        tokens = read_text(session, text, 0, n_ctx * n_chunk).heldout
    else:
        tokens = write_text(session, 0, n_ctx * n_chunk, stream=n_ctx, seed=12345).heldout
    return make_reference(session, chunks_of(tokens, n_ctx, n_chunk, "text"), path)


def table(bench: Bench, goals: Sequence[float], methods: Sequence[str], plans: Sequence[tuple[str, Plan]]) -> None:
    chunks = bench.reference.chunks
    print(
        f"\n{bench.session.path.name}, contexts of {chunks.n_ctx}, {chunks.n_positions} scored positions, bits at "
        f"{bench.shape.n_counted} tokens\n\n| cache | bits K | bits V | bits | KLD | +- | same top |\n"
        "|---|---|---|---|---|---|---|"
    )
    bench.real(None, "f16 by the other attention kernel (noise floor)", None, flash_attn=False)
    bench.imitated(None, Emulated(Pair("f16", "f16"), STEP))
    for file, plan in plans:
        bench.real(None, f"plan of {file}", plan.pairs, plan.k_vectors)
    for goal in goals:
        print(f"| **{goal:g} bits** | | | | | | |", flush=True)
        bench.of_goal(goal, methods, plans)


if __name__ == "__main__":
    main()
