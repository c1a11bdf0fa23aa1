"""Short runs on tiny models: prompts, mixtures of types, logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from gguf import GGUFValueType
from models import BOS, FIRST_BYTE

from kvtuner_gguf.kvectors import KVectors
from kvtuner_gguf.pair import Pair
from kvtuner_gguf.plan import Plan

if TYPE_CHECKING:
    from kvtuner_gguf.runtime import Context, Session

N_TOKENS = 96  # more than the window of gemma3
MIXTURE = ("q8_0/q4_0", "f16/q8_0", "q4_1/f16", "q5_1/iq4_nl", "bf16/q5_0", "iq4_nl/f32")
"""Every kind of neighbours: rotated and not on either side, and each type that has a block once or more."""


def mixture(n_layer: int) -> list[Pair]:
    """MIXTURE from layer 0 on, over again for more layers."""
    return [Pair.parse(MIXTURE[il % len(MIXTURE)]) for il in range(n_layer)]


def uniform(name: str, n_layer: int) -> list[Pair]:
    """One type on both sides of all layers, or one pair "K/V"."""
    return [Pair.parse(name)] * n_layer


def prompt(n: int, seed: int = 0) -> list[int]:
    """BOS and n - 1 bytes."""
    return [BOS, *np.random.default_rng(seed).integers(FIRST_BYTE, FIRST_BYTE + 256, n - 1).tolist()]


def feed(ctx: Context, tokens: Sequence[int], pos: int = 0, seq_id: int = 0) -> np.ndarray:
    """(n_tokens, n_vocab) logits after each of the tokens, which stand at pos and on."""
    return ctx.decode([(token, pos + i, seq_id) for i, token in enumerate(tokens)], [True] * len(tokens)).copy()


def run(
    session: Session, pairs: Sequence[Pair] | None = None, k_vectors: Sequence[KVectors] = (), **arguments
) -> np.ndarray:
    """(N_TOKENS + 4, n_vocab) logits under a plan, of a prompt and of four single tokens after it."""
    session.set_plan(pairs, k_vectors)
    tokens = prompt(N_TOKENS + 4)
    with session.context(256, **arguments) as ctx:
        parts = [feed(ctx, tokens[:N_TOKENS])]
        parts += [feed(ctx, [token], N_TOKENS + i) for i, token in enumerate(tokens[N_TOKENS:])]
    return np.concatenate(parts)


def metadata(pairs: Sequence[Pair]) -> list[tuple[str, GGUFValueType, object]]:
    """The plan as `extra` of a tiny model."""
    kinds = {"u32": GGUFValueType.UINT32, "arr_str": GGUFValueType.ARRAY, "str": GGUFValueType.STRING}
    return [(key, kinds[kind], value) for key, kind, value in Plan(tuple(pairs)).to_metadata()]


def vectors(
    il: int, n_head_kv: int = 2, head_dim: int = 64, *, mean: bool = True, scale: bool = True, basis: bool = False
) -> KVectors:
    """A mean, a scale and a basis as large as real ones, of a layer: means up to several std of K, scales from 1/4 to
    4, and matrices that turn K by any angle and make it larger or smaller."""
    rng, n = np.random.default_rng(il), n_head_kv * head_dim
    means, scales = 2 * rng.standard_normal(n), 4.0 ** rng.uniform(-1, 1, n)
    sides = tuple(means.tolist()) if mean else (), tuple(scales.tolist()) if scale else ()
    if not basis:
        return KVectors(*sides)
    turns = np.linalg.qr(rng.standard_normal((n_head_kv, head_dim, head_dim)))[0]
    largest = np.abs(turns).max(axis=-1, keepdims=True)
    rows, row_scales = np.rint(turns / largest * 127).astype(np.int8), largest / 127 * 10 ** rng.uniform(-0.5, 0.5)
    return KVectors(*sides, rows.tobytes(), tuple(row_scales.reshape(-1).tolist()))
