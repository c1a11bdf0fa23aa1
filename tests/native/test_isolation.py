"""A row of attention depends on the cells that it sees and on nothing else, bit for bit."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from running import prompt, uniform
from test_attn import TYPES, run

from kvtuner_gguf.codecs import codec

if TYPE_CHECKING:
    from kvtuner_gguf.runtime import Session

N_EMBD_V = 128  # values of V that a layer of the tiny model caches of a token

pytestmark = pytest.mark.native

SPLIT = 2e-6
"""Of the relative difference between one range of KV rows and several, for every type: of sums of floats, as f16 has
it."""

PAIRS = [{"k": k, "v": v, "n_kv": 300} for k, v in itertools.product(TYPES, TYPES)]
SHAPES = [
    {"k": k, "v": v, "n_kv": n_kv, **shape}
    for (k, v), n_kv, shape in itertools.product(
        (("f16", "f16"), ("q8_0", "q4_0"), ("f32", "q5_1"), ("q3_64", "q2_64"), ("k3_64", "q2_64"), ("q4_1", "bf16"),
         ("q5_1", "q4_1"), ("t4_64", "t2_64"), ("k2_64", "t3_64"), ("k5_64", "t4_64")),
        (64, 512, 1001),
        (
            {"dk": 128, "dv": 128, "n_gqa": 4}, {"n_gqa": 1, "n_head_kv": 3}, {"dk": 64, "dv": 128, "n_q": 130},
            {"softcap": 5.0},
            {"sinks": True}, {"max_bias": 8.0, "n_head_kv": 3, "n_gqa": 4},
        ),
    )
]  # fmt: skip


def check(cases: list[dict], folder: Path | None = None) -> None:
    """Of the libraries in a folder, the package's own by default."""
    from kvtuner_gguf import native

    for case, result in zip(cases, run(folder or native.lib_dir(), cases, "isolation.py"), strict=True):
        assert result["finite"] and not result["changed"], (case, result)
        assert result["split"] < SPLIT, (case, result)


def test_every_pair_of_types():
    check(PAIRS)


def test_shapes_and_extras():
    check(SHAPES)


@pytest.mark.parametrize("type_name", ["f16", "q8_0", "q4_0"])
@pytest.mark.parametrize("factor", [float("nan"), float("inf"), 64.0])
def test_one_users_values_do_not_reach_another(tiny, load, type_name, factor):
    """Two sequences in one buffer, as llama-server has its slots: V of the first is scaled, and the second one's logits
    stay as they were."""
    session = load(tiny("llama", n_layer=2))
    session.set_plan(uniform(type_name, 2))
    first, second = prompt(20, seed=1), prompt(20, seed=2)

    def logits_of_second(change: bool) -> np.ndarray:
        with shared_buffer(session) as (ctx, decode):
            decode([(token, pos, 0) for pos, token in enumerate(first)])
            if change:
                scale_last_v(ctx, type_name, len(first), factor)
            decode([(token, pos, 1) for pos, token in enumerate(second)])
            return decode([(first[3], 20, 0), (second[3], 20, 1)])[1]

    assert np.array_equal(logits_of_second(False), logits_of_second(True))


@contextmanager
def shared_buffer(session: Session) -> Iterator[tuple[int, Callable]]:
    """A context of two sequences in a unified cache, and decode(rows of (token, position, sequence)) -> logits."""
    from llama_cpp import llama_cpp as lc

    params = lc.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max, params.kv_unified = 256, 256, 256, 2, True
    params.flash_attn_type, params.n_threads, params.n_threads_batch = lc.LLAMA_FLASH_ATTN_TYPE_ENABLED, 1, 1
    ctx = lc.llama_init_from_model(session.model, params)
    batch = lc.llama_batch_init(256, 0, 1)

    def decode(rows: list[tuple[int, int, int]]) -> np.ndarray:
        batch.n_tokens = len(rows)
        for i, (token, pos, seq) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, pos, 1, 1
            batch.seq_id[i][0] = seq
        assert lc.llama_decode(ctx, batch) == 0
        return np.ctypeslib.as_array(lc.llama_get_logits(ctx), (len(rows), session.n_vocab)).copy()

    try:
        yield ctx, decode
    finally:
        lc.llama_batch_free(batch)
        lc.llama_free(ctx)


def scale_last_v(ctx: int, type_name: str, n_tokens: int, factor: float) -> None:
    """Multiply V of the last layer of sequence 0, which ends its state: each value of f16, or the scale of each
    block."""
    from llama_cpp import llama_cpp as lc

    size = lc.llama_state_seq_get_size(ctx, 0)
    state = (ctypes.c_uint8 * size)()
    assert lc.llama_state_seq_get_data(ctx, state, size, 0) == size
    step = codec(type_name).type_size
    row = codec(type_name).row_bytes(N_EMBD_V)
    scales = np.frombuffer(state, np.uint8)[-row * n_tokens :].reshape(-1, step)[:, :2]
    scales[...] = (np.ascontiguousarray(scales).view(np.float16) * np.float16(factor)).view(np.uint8)
    assert lc.llama_state_seq_set_data(ctx, state, size, 0) == size
