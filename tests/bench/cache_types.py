"""What each cache type costs, at real bits: error on normal values, of the attention output, and KLD; as a Markdown
table.

python tests/bench/cache_types.py MODEL.gguf [-f TEXT] [--tokens 1024] [--chunks 4] [--only q2_64,q3_64]
Attention output: relative Frobenius error with K, or V, alone through the type, mean over layers; raw, and rotated as
the run time would. "K bias" adds to K, before the type, a constant on two channels of each head, 30 times K's RMS, as
the bias of K in Qwen2.5 does: it moves all scores of a query alike, so exact attention does not change. KLD: a real run
with K and V of the type, from an f16 cache. Encode: nanoseconds per value of one thread. The rows in brackets are no
types of ours or of llama.cpp: what else the bits could buy. The KLD of the paper's is of an f16 cache whose rows are
put through it as soon as they are written, K and V as they are, since the paper rotates nothing.
"""

from __future__ import annotations

import argparse
import ctypes
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from neighbour.cache import Tensor

from kvtuner_gguf import native
from kvtuner_gguf.calibrate.capture import capture
from kvtuner_gguf.calibrate.error import attention_output, attention_scores, output_nrmse, rotate
from kvtuner_gguf.calibrate.kld import Reference, make_reference, measure
from kvtuner_gguf.calibrate.samples import Capture, LayerSample
from kvtuner_gguf.calibrate.text import chunks_of, read_text, write_text
from kvtuner_gguf.codecs import CODECS
from kvtuner_gguf.pair import Pair
from kvtuner_gguf.plan import Plan
from kvtuner_gguf.runtime import Session

RoundTrip = Callable[[np.ndarray], np.ndarray]
N_BIASED, BIAS = 2, 30.0  # channels of a head, and times the RMS of K


@dataclass(frozen=True)
class Row:
    """block: values that it needs in a row; per_head: its block is a head, whatever that is."""

    name: str
    bits_per_value: float
    block: int
    round_trip: RoundTrip
    per_head: bool = False


class Written:
    """In the place of a Tap: puts each row of an f16 cache through a format right after the graph has written it."""

    def __init__(self, row: Row) -> None:
        from llama_cpp import llama_cpp

        self.round_trip, self.handle, self.n_rows = row.round_trip, None, 0
        self.eval_callback = llama_cpp.ggml_backend_sched_eval_callback(self._node)

    def _node(self, address: int, ask: bool, _user: object) -> bool:
        node = ctypes.cast(address, ctypes.POINTER(Tensor)).contents
        index = node.src[1]
        if not index or not node.view_src or not node.view_src.contents.name.startswith(b"cache_"):
            return not ask  # no SET_ROWS into the cache
        if not ask:
            cells = np.ctypeslib.as_array((ctypes.c_int64 * index.contents.ne[0]).from_address(index.contents.data))
            cache = np.ctypeslib.as_array((ctypes.c_uint16 * (node.ne[0] * node.ne[1])).from_address(node.data)).view(
                np.float16
            )
            cache = cache.reshape(node.ne[1], node.ne[0])
            cache[cells] = self.round_trip(cache[cells].astype(np.float32)).astype(np.float16)
            self.n_rows += len(cells)
        return True


def measure_written(session: Session, row: Row, reference: Reference) -> float:
    """KLD of a run whose cache is f16, with all K and V put through the format."""
    written, context = Written(row), session.context
    session.context = lambda *args, watch, **options: context(*args, watch=written, **options)
    try:
        kld = measure(session, None, reference).kld_mean
    finally:
        session.context = context
    assert written.n_rows >= 2 * reference.chunks.tokens.size, "the cache was not seen to be written"
    return kld


def half(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float16).astype(np.float32)


def fitted(x: np.ndarray, levels: list[float], block: int) -> np.ndarray:
    """d*level of each value, d the best of ten starts with four rounds of assigning and least squares each."""
    level = np.array(levels, np.float32)
    middle = (level[1:] + level[:-1]) / 2
    blocks = x.reshape(-1, block)
    top = np.abs(blocks).max(axis=1, keepdims=True)
    best, best_error = np.zeros_like(blocks), np.full((len(blocks), 1), np.inf)
    for start in np.linspace(0.35, 1.05, 10):
        d = top * np.float32(start) / level.max()
        for i in range(5):
            d = half(d) if i == 4 else d
            m = level[np.searchsorted(middle, blocks / np.maximum(d, 1e-20))]
            if i < 4:
                d = (blocks * m).sum(axis=1, keepdims=True) / np.square(m).sum(axis=1, keepdims=True)
        error = np.square(blocks - d * m).sum(axis=1, keepdims=True)
        best = np.where(error < best_error, d * m, best)
        best_error = np.minimum(error, best_error)
    return best.reshape(x.shape)


def asymmetric(x: np.ndarray, bits: int, block: int) -> np.ndarray:
    """Minimum and step of each block: KVTuner's, and KIVI's, per token. f16 minimum and step."""
    blocks = x.reshape(-1, block)
    low, high = blocks.min(axis=1, keepdims=True), blocks.max(axis=1, keepdims=True)
    low, step = half(low), np.maximum(half((high - low) / (2**bits - 1)), 1e-7)
    return (low + step * np.clip(np.rint((blocks - low) / step), 0, 2**bits - 1)).reshape(x.shape)


def signed_max(x: np.ndarray, bits: int, block: int) -> np.ndarray:
    """Uniform, the largest value at the lowest code: ggml's q4_0 and q5_0 with other bits."""
    blocks, n = x.reshape(-1, block), 2 ** (bits - 1)
    top = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=1)[:, None], axis=1)
    d = half(top / -n)
    return (d * np.clip(np.rint(blocks / np.where(d == 0, 1, d)), -n, n - 1)).reshape(x.shape)


def rows(head_dim: int) -> list[Row]:
    types = [
        Row(c.name, c.bits_per_value, c.block_size, partial(native.round_trip, c.name))
        for c in CODECS.values()
        if c.block_size > 1
    ]
    paper = [
        Row(
            f"(paper's per token, {b} bits)",
            b + 32 / head_dim,
            head_dim,
            partial(asymmetric, bits=b, block=head_dim),
            True,
        )
        for b in (8, 4, 2)
    ]
    others = [
        Row("(6 bits, block 32, signed maximum)", 6.5, 32, partial(signed_max, bits=6, block=32)),
        Row("(6 bits, block 64, fitted)", 6.25, 64, partial(fitted, levels=list(range(-32, 32)), block=64)),
        Row("(3 bits, block 32, signed maximum)", 3.5, 32, partial(signed_max, bits=3, block=32)),
        Row(
            "(3 bits, block 64, uniform, fitted)",
            3.25,
            64,
            partial(fitted, levels=[-7, -5, -3, -1, 1, 3, 5, 7], block=64),
        ),
        Row(
            "(3 bits, block 64, best fit)",
            3.25,
            64,
            partial(fitted, levels=[-127, -79, -45, -14, 14, 45, 79, 127], block=64),
        ),
        Row("(2 bits, block 64, uniform, fitted)", 2.25, 64, partial(fitted, levels=[-3, -1, 1, 3], block=64)),
        Row("(2 bits, block 64, best fit)", 2.25, 64, partial(fitted, levels=[-10, -3, 3, 10], block=64)),
    ]
    return sorted([*types, *paper, *others], key=lambda r: -r.bits_per_value)


def through(x: np.ndarray, row: Row, n_rot: int) -> np.ndarray:
    """(n_head_kv, n_kv, head_dim) as it comes back from the cache, whose rows are tokens."""
    n_head_kv, n_kv, head_dim = x.shape
    lines = rotate(x, n_rot).transpose(1, 0, 2).reshape(n_kv, -1)
    back = row.round_trip(lines).reshape(n_kv, n_head_kv, head_dim)
    return rotate(np.ascontiguousarray(back.transpose(1, 0, 2)), n_rot)


def output_errors(sample: LayerSample, row: Row, rot_k: int, rot_v: int) -> list[float]:
    """Relative error of the attention output after K raw, K rotated, biased K rotated, V raw, V rotated."""
    scores = attention_scores(sample, sample.k)
    output = attention_output(scores, sample.v)
    bias = np.zeros(sample.k.shape[-1], np.float32)
    bias[:N_BIASED] = BIAS * np.sqrt(np.square(sample.k).mean())
    keys = [through(sample.k, row, 0), through(sample.k, row, rot_k), through(sample.k + bias, row, rot_k) - bias]
    values = [through(sample.v, row, 0), through(sample.v, row, rot_v)]
    return [output_nrmse(output, attention_output(attention_scores(sample, k), sample.v)) for k in keys] + [
        output_nrmse(output, attention_output(scores, v)) for v in values
    ]


def layer_errors(captured: Capture, row: Row) -> np.ndarray | None:
    """Means over layers of output_errors; None where a block does not divide the heads."""
    errors = []
    for il in captured.il:
        sample = captured.sample(il, 0)
        if sample.k.shape[-1] % row.block or sample.v.shape[-1] % row.block:
            return None
        errors.append(output_errors(sample, row, sample.rot_k, sample.rot_v))
    return np.mean(errors, axis=0)


def normal_error(row: Row) -> float:
    x = np.random.default_rng(0).standard_normal((4000, 256 if not row.per_head else row.block), dtype=np.float32)
    return float(np.sqrt(np.square(x - row.round_trip(x)).sum() / np.square(x).sum()))


def encode_ns(row: Row) -> float:
    """Nanoseconds per value, the best of ten runs over what stays in the processor's cache."""
    x = np.random.default_rng(0).standard_normal((64, 256), dtype=np.float32)
    times = []
    for _ in range(10):
        start = time.perf_counter()
        for _ in range(20):
            native.encode(row.name, x)
        times.append((time.perf_counter() - start) / (20 * x.size))
    return 1e9 * min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("-f", dest="text", type=Path)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--chunks", type=int, default=4)
    parser.add_argument("--only", default="")
    options = parser.parse_args()
    only = [name for name in options.only.split(",") if name]

    with Session(options.model) as session, tempfile.TemporaryDirectory() as tmp:
        n_calibration, n_heldout = options.tokens, options.chunks * options.tokens
        if options.text:
            text = read_text(session, options.text, n_calibration, n_heldout)
        else:
            text = write_text(session, n_calibration, n_heldout, stream=options.tokens, seed=0)
        captured = capture(session, chunks_of(text.calibration, options.tokens, 1, "text"), Path(tmp) / "capture")
        reference = make_reference(
            session, chunks_of(text.heldout, options.tokens, options.chunks, "text"), Path(tmp) / "f16"
        )
        sample = captured.sample(captured.il[0], 0)
        floor = measure(session, None, reference, flash_attn=False)
        print(
            f"{options.model.name}, {text.name}; KLD over {floor.n_positions} positions, noise floor "
            f"{floor.kld_mean:.4f}\n"
        )
        print(
            "| type | bits | N(0,1) | K raw | K | K bias | V raw | V | KLD | encode "
            "|\n|---|---|---|---|---|---|---|---|---|---|"
        )
        for row in rows(sample.k.shape[-1]):
            errors = layer_errors(captured, row) if not only or row.name in only else None
            if errors is None:
                continue
            measured = f"{measure_written(session, row, reference):.4f} | " if row.per_head else " | "
            if row.name in CODECS:
                has_kv = [il in captured.il for il in range(session.n_layer)]
                plan = Plan.uniform(Pair(row.name, row.name), session.n_layer, has_kv)
                measured = f"{measure(session, plan.pairs, reference).kld_mean:.4f} | {encode_ns(row):.1f}"
            cells = [f"{e:.4f}" for e in (normal_error(row), *errors)]
            print(f"| {row.name} | {row.bits_per_value:g} | {' | '.join(cells)} | {measured} |", flush=True)


if __name__ == "__main__":
    main()
