"""Damaged GGUFs in llama.cpp: each is refused, or loads, makes a context and decodes, with the plan that Python reads
in it."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
from fault import need
from models import tiny_gemma3, tiny_hybrid, tiny_llama, tiny_mla, tiny_qwen2
from mutate import Base, damaged
from running import vectors

from kvtuner_gguf import native
from kvtuner_gguf.codecs import CODECS
from kvtuner_gguf.errors import NativeError, PlanError
from kvtuner_gguf.gguf_file import read_plan, write_plan
from kvtuner_gguf.gguf_header import read_header
from kvtuner_gguf.pair import Pair
from kvtuner_gguf.plan import Plan
from kvtuner_gguf.runtime import Context, Session


class Attack:
    def __init__(self, folder: Path) -> None:
        self.path = folder / "input" / "model.gguf"
        planned = write_plan(
            tiny_llama(folder / "a.gguf", n_layer=2),
            Plan((Pair("q8_0", "q4_0"), Pair("k3_64", "f16")), k_vectors=(vectors(0), vectors(1, basis=True))),
        )
        models = ((tiny_gemma3, 128), (tiny_qwen2, 128), (tiny_mla, 192), (tiny_hybrid, 64))
        self.bases = [Base.of(planned), *(Base.of(make(folder / f"{make.__name__}.gguf"), n) for make, n in models)]
        with Session(planned, no_alloc=True):  # takes llama.cpp's log, which llama_cpp prints
            pass

    def attempt(self, rng: random.Random) -> str:
        self.path.write_bytes(damaged(rng, rng.choices(self.bases, [8, 1, 1, 1, 1], k=2)))
        self._vocabulary()
        try:
            with Session(self.path, no_alloc=True) as shape, shape.context(64):
                pass
            with Session(self.path, n_threads=1) as session:
                self._same_plan(session)
                with session.context(64) as ctx:
                    return self._decodes(session, ctx)
        except NativeError:
            return "refused"

    def _vocabulary(self) -> None:
        from llama_cpp import llama_cpp

        params = llama_cpp.llama_model_default_params()
        params.vocab_only = True
        model = llama_cpp.llama_model_load_from_file(str(self.path).encode(), params)
        if model:
            llama_cpp.llama_model_free(model)

    def _same_plan(self, session: Session) -> None:
        """What is in force is what Python reads in the file; where one of them is stricter, the run time's notes
        tell."""
        layers, notes = native.plan_layers(session.model), native.plan_notes(session.model)
        need(
            all(len(note) < 400 and note.isprintable() for note in notes),
            f"a note that garbles a terminal: {notes!r:.3000}",
        )
        try:
            plan = read_plan(self.path)
        except PlanError as e:
            need(
                layers is None or bool(notes) or not _steers(e),
                f"Python refuses the plan ({e}), the run time has {layers} and no note",
            )
            return
        if plan is None or layers is None:
            need(
                (plan is None and layers is None)
                or bool(notes)
                or "kvtuner.enabled" in read_header(self.path).metadata,
                f"Python reads {plan!s:.300}, the run time has {layers} and no note",
            )
        else:
            asked = [(pair.type_k, pair.type_v) for pair in plan.pairs]
            need(asked == layers, f"Python reads {asked}, the run time has {layers}")

    def _decodes(self, session: Session, ctx: Context) -> str:
        """Eight tokens, and what is allocated is a cache: weights that are damaged may well give NaN."""
        need(all(layer.type_k in CODECS for layer in ctx.layers()), "a layer of no known type")
        logits = ctx.decode([(i % session.n_vocab, i, 0) for i in range(8)], [True] * 8)
        need(logits.shape == (8, session.n_vocab), f"logits of shape {logits.shape}")
        return "runs" if np.isfinite(logits).all() else "runs to NaN"


def _steers(error: PlanError) -> bool:
    """Whether the fault is in what the run time reads of a plan, and not in its figures, or in a file that Python does
    not take at all."""
    return any(
        f"kvtuner.{key}" in str(error) or f": {key}" in str(error)
        for key in ("type_k", "type_v", "k_mean", "k_scale", "k_basis", "schema_version")
    )
