"""Contexts that run over, again and again: after each shift the next logits are those of a fresh context with the same
tokens."""

from __future__ import annotations

import random
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from fault import need
from models import tiny_llama
from running import feed, prompt, vectors

from kvtuner_gguf.kvectors import KVectors
from kvtuner_gguf.pair import Pair
from kvtuner_gguf.runtime import Context, Session

SHIFTED = 500  # tokens of an attempt that stand where others were shifted away
N_CTX = 256
MODELS = ({}, {"head_dim": 96}, {"head_dim": 128}, {"rope_dim": 32})
# A shift rounds K once more, so what it does to the logits is of the size of what rounding did in the first place. Root
# mean squares:
MOST_RATIO = 5  # of that, over all shifts of an attempt; measured at worst 2.6, in 360 attempts
# f32 and f16 do not round; measured at worst 0.0014, of logits with a std near 2. A shift left out gives 1 and more
LEAST = 0.01
NAMES = (
    "f16",
    "f32",
    "bf16",
    "q8_0",
    "q6_32",
    "q5_1",
    "q5_0",
    "q4_1",
    "q4_0",
    "iq4_nl",
    "q3_32",
    "q2_32",
    "q3_64",
    "q2_64",
    "k5_64",
    "k4_64",
    "t4_64",
    "t3_64",
    "t2_64",
)


class Attack:
    """One layer: what K and V of a token are then depends on the token and its place alone, so that a fresh context
    tells what is right."""

    def __init__(self, folder: Path) -> None:
        self.sessions = [
            Session(tiny_llama(folder / f"{i}.gguf", n_layer=1, **arguments), n_threads=1)
            for i, arguments in enumerate(MODELS)
        ]
        self.widths = [2 * arguments.get("head_dim", 64) for arguments in MODELS]

    def attempt(self, rng: random.Random) -> str:
        model = rng.randrange(len(MODELS))
        wide = self.widths[model] % 128 == 0
        name_k, name_v = (rng.choice([n for n in NAMES if wide or "64" not in n]) for _ in "kv")
        conditioned = (
            [vectors(rng.randrange(100), head_dim=self.widths[model] // 2, basis=rng.random() < 0.5)]
            if rng.random() < 0.5 and "rope_dim" not in MODELS[model]
            else []
        )
        n_keep, n_drop = rng.choice((0, 4, 32)), rng.choice((65, 100, 128, 200))
        held = prompt(N_CTX - 1, seed=rng.randrange(1000))
        what = f"{MODELS[model]}, {name_k}/{name_v}, conditioned {bool(conditioned)}, keep {n_keep}, drop {n_drop}"
        with ExitStack() as stack:
            shifted, fresh = (self._context(stack, model, Pair(name_k, name_v), conditioned) for _ in range(2))
            exact = self._context(stack, model, Pair("f32", name_v), [])
            offs, roundings = [], []
            feed(shifted, held)
            for _ in range(0, SHIFTED, n_drop):
                _shift(shifted, n_keep, n_drop)
                held = held[:n_keep] + held[n_keep + n_drop :]
                have = feed(shifted, [77], len(held))[0]
                held.append(77)
                want, unrounded = (_last_logits(ctx, held) for ctx in (fresh, exact))
                offs.append(_rms(have - want))
                roundings.append(_rms(want - unrounded))
                more = [rng.randrange(3, 259) for _ in range(N_CTX - 1 - len(held))]
                feed(shifted, more, len(held))
                held += more
        off, rounding = _rms(np.array(offs)), _rms(np.array(roundings))
        need(
            off < MOST_RATIO * rounding + LEAST,
            f"{what}: after {SHIFTED} shifted tokens the logits are off by {off:.4f}, rounding K did {rounding:.4f}",
        )
        return name_k

    def _context(self, stack: ExitStack, model: int, pair: Pair, conditioned: list[KVectors]) -> Context:
        self.sessions[model].set_plan([pair], conditioned)
        return stack.enter_context(self.sessions[model].context(N_CTX))


def _last_logits(ctx: Context, tokens: list[int]) -> np.ndarray:
    ctx.clear()
    return feed(ctx, tokens)[-1]


def _rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(x * x)))


def _shift(ctx: Context, n_keep: int, n_drop: int) -> None:
    """Forget n_drop tokens after the first n_keep, and move the rest down."""
    from llama_cpp import llama_cpp

    memory = llama_cpp.llama_get_memory(ctx.ctx)
    need(llama_cpp.llama_memory_seq_rm(memory, 0, n_keep, n_keep + n_drop), "seq_rm is refused")
    llama_cpp.llama_memory_seq_add(memory, 0, n_keep + n_drop, -1, -n_drop)
