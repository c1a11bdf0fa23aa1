"""Saved states: under another plan, conditioning or rotation refused; damaged, refused or taken for the numbers that
they hold."""

from __future__ import annotations

import os
import random
from functools import cache
from pathlib import Path

import numpy as np
from fault import need
from models import tiny_gemma3, tiny_hybrid, tiny_mla, tiny_qwen2
from running import feed, mixture, prompt, uniform, vectors
from test_state import restore, save

from kvtuner_gguf.kvectors import KVectors
from kvtuner_gguf.native import LayerCache
from kvtuner_gguf.pair import Pair
from kvtuner_gguf.runtime import Context, Session

MODELS = (tiny_qwen2, tiny_gemma3, tiny_hybrid, tiny_mla)
TYPES = (
    "f16",
    "bf16",
    "q8_0",
    "q6_32",
    "q5_1",
    "q4_0",
    "iq4_nl",
    "q3_64",
    "q2_32",
    "q8_0/f16",
    "f16/q4_0",
    "k3_64/q8_0",
)
VECTORS = ("none", "mean", "scale", "both", "basis", "others")
N_TOKENS = 40  # inside gemma3's window
NEXT = [77, 5, 130]


class Put(tuple):
    """(types, vectors, rotated): a plan by name, and whether the run time rotates."""


class Attack:
    def __init__(self, folder: Path) -> None:
        self.path = folder / "input" / "state.bin"
        self.sessions = [Session(make(folder / f"{make.__name__}.gguf"), n_threads=1) for make in MODELS]
        self.saved = cache(self._saved)

    def attempt(self, rng: random.Random) -> str:
        model, kind = rng.randrange(len(MODELS)), rng.choice(("whole", "sequence"))
        here = self._plan(rng, model)
        state, want = self.saved(model, kind, here)
        if rng.random() < 0.2:
            return self._elsewhere(rng, model, kind, here, state, want)
        return self._damaged(rng, model, kind, here, state, want)

    def _plan(self, rng: random.Random, model: int) -> Put:
        """A few of the many, so that what is saved under them can be used again."""
        vector = rng.choice(VECTORS) if MODELS[model] is tiny_qwen2 else "none"
        return Put((rng.choice((*TYPES, "mixture")), vector, rng.random() < 0.85))

    def _context(self, model: int, put: Put) -> tuple[Session, Context, tuple]:
        """A context under this plan, and what tells it from others: what is allocated, rotated, and by which
        vectors."""
        types, vector, rotated = put
        session = self.sessions[model]
        os.environ.pop("LLAMA_ATTN_ROT_DISABLE", None)
        if not rotated:
            os.environ["LLAMA_ATTN_ROT_DISABLE"] = "1"
        pairs = mixture(session.n_layer) if types == "mixture" else uniform(types, session.n_layer)
        session.set_plan(pairs, _vectors(vector, pairs))
        ctx = Context(session, 256)
        layers = [
            (*(getattr(layer, name) for name in ("il", "type_k", "type_v", "rot_k", "rot_v")), *_conditioning(layer))
            for layer in ctx.layers()
        ]
        conditioned = any(any(_conditioning(layer)) for layer in ctx.layers())
        return session, ctx, (layers, conditioned and _named(vector, ctx))

    def _saved(self, model: int, kind: str, put: Put) -> tuple[bytes, np.ndarray]:
        _, ctx, _ = self._context(model, put)
        feed(ctx, prompt(N_TOKENS))
        state = save(ctx, kind)
        want = feed(ctx, NEXT, N_TOKENS)
        ctx.close()
        return state, want

    def _elsewhere(self, rng: random.Random, model: int, kind: str, here: Put, state: bytes, want: np.ndarray) -> str:
        there = self._plan(rng, model)
        _, ctx, identity = self._context(model, here)
        ctx.close()
        _, ctx, other = self._context(model, there)
        try:
            if rng.random() < 0.5:
                feed(ctx, prompt(16, seed=1))  # what was there must not shine through
            self.path.write_bytes(state)
            taken = restore(ctx, kind, state)
            need(taken in (0, len(state)), f"{taken} of {len(state)} bytes read")
            if identity == other and (
                here[2] == there[2] or MODELS[model] is not tiny_mla
            ):  # whose K is not rotated, and whose tag tells that it might be
                need(bool(taken), f"{MODELS[model].__name__}, {kind}: refused under the same plan, {here} and {there}")
                need(
                    np.array_equal(feed(ctx, NEXT, N_TOKENS), want),
                    f"{MODELS[model].__name__}, {kind}, {here}: other logits after it came back",
                )
                return "the same plan: came back"
            need(
                not taken or identity == other,
                f"{MODELS[model].__name__}, {kind}: saved under {here}, read under {there}",
            )
            self._works(ctx, model, there)
            return "another plan: refused"
        finally:
            ctx.close()

    def _damaged(self, rng: random.Random, model: int, kind: str, here: Put, state: bytes, want: np.ndarray) -> str:
        other, _ = self.saved(rng.randrange(len(MODELS)), kind, Put(("mixture", "none", True)))
        data, cut = _damage(rng, state, other)
        self.path.write_bytes(data)
        _, ctx, _ = self._context(model, here)
        try:
            taken = restore(ctx, kind, data)
            if not taken:
                self._works(ctx, model, here)
                return "damaged: refused"
            need(
                not cut,
                f"{MODELS[model].__name__}, {kind}, {here}: {len(data)} of {len(state)} bytes were taken for a state",
            )
            held, have = save(ctx, kind), _next(ctx)
            if have is not None and np.array_equal(have, want):
                return "damaged: right"
            self._works(ctx, model, here)
            # What was taken is a state: saved again it is the same one. Its numbers are other numbers, which no reader
            # can tell
            ctx.clear()
            need(
                restore(ctx, kind, held) == len(held) and save(ctx, kind) == held,
                f"{MODELS[model].__name__}, {kind}, {here}: what was taken does not come back",
            )
            again = _next(ctx)
            need(
                (have is None) == (again is None) and (have is None or np.array_equal(have, again, equal_nan=True)),
                f"{MODELS[model].__name__}, {kind}, {here}: what was taken runs in two ways",
            )
            return "damaged: taken as it stands"
        finally:
            ctx.close()

    def _works(self, ctx: Context, model: int, put: Put) -> None:
        """After a refusal, and cleared as what is half read must be, the context works as a new one."""
        ctx.clear()
        feed(ctx, prompt(N_TOKENS))
        need(
            np.array_equal(feed(ctx, NEXT, N_TOKENS), self.saved(model, "whole", put)[1]),
            f"{MODELS[model].__name__}, {put}: other logits after a refused state",
        )


def _vectors(name: str, pairs: list[Pair]) -> tuple[KVectors, ...]:
    if name == "none":
        return ()
    offset = 10 if name == "others" else 0
    sides = {"mean": name != "scale", "scale": name != "mean", "basis": name == "basis"}
    return tuple(vectors(il + offset, **sides) for il in range(len(pairs)))


def _conditioning(layer: LayerCache) -> tuple[bool, bool, bool]:
    return layer.k_mean, layer.k_scale, layer.k_basis


def _named(vector: str, ctx: Context) -> str:
    """Vectors that are alike have one name: a basis that is nowhere in force leaves mean and scale."""
    return "both" if vector == "basis" and not any(layer.k_basis for layer in ctx.layers()) else vector


def _next(ctx: Context) -> np.ndarray | None:
    """Logits of the next tokens; None if what is held does not end where it should."""
    from llama_cpp import llama_cpp

    last = llama_cpp.llama_memory_seq_pos_max(llama_cpp.llama_get_memory(ctx.ctx), 0)
    return feed(ctx, NEXT, N_TOKENS) if last == N_TOKENS - 1 else None


def _damage(rng: random.Random, state: bytes, other: bytes) -> tuple[bytes, bool]:
    """The state with some fault, and whether it has fewer bytes than it needs."""
    data = bytearray(state)
    action = rng.randrange(5)
    if action == 0:
        del data[rng.randrange(len(data)) :]
        return bytes(data), True
    if action == 1:  # the head tells what follows
        data[rng.randrange(min(len(data), 2000))] ^= 1 << rng.randrange(8)
    elif action == 2:
        for _ in range(rng.choice((1, 2, 8))):
            data[rng.randrange(len(data))] = rng.randrange(256)
    elif action == 3:
        at = rng.randrange(min(len(data), 2000)) & ~3
        data[at : at + 4] = rng.choice((bytes(4), b"\xff" * 4, b"\xff\xff\xff\x7f", rng.randbytes(4)))
    else:
        at = rng.randrange(min(len(data), len(other)))
        data[at:] = other[at:]
    return bytes(data), False
