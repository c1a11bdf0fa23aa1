"""Real runs on one text: what a search, a proof, and an answer from records ask for."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from kvtuner_gguf import native
from kvtuner_gguf.calibrate.jobs import AS_STOCK, BY_PLAN, OF_F16, Job, Weights, run
from kvtuner_gguf.calibrate.kld import Reference
from kvtuner_gguf.calibrate.progress import Progress
from kvtuner_gguf.calibrate.store import Evaluations
from kvtuner_gguf.kvectors import KVectors, where_quantized
from kvtuner_gguf.pair import Pair, Pairs
from kvtuner_gguf.quality import Quality
from kvtuner_gguf.runtime import Session

if TYPE_CHECKING:
    from kvtuner_gguf.calibrate.crew import Crew

SEARCH, HELDOUT = "search", "heldout"  # runs in the records, by their text
COPY, PART, FLOOR = "-copy", "-part", "-floor"  # of a copy of the model; on a part of the text; of the f16 cache itself


def runs_name(text: str, session: Session, model: Path) -> str:
    """Of the runs on SEARCH's text or HELDOUT's in the records: those on a copy of the model stand apart."""
    return text if session.path == model else text + COPY


def tag(k_vectors: Sequence[KVectors]) -> str:
    """Names the vectors of K in records; "" without any."""
    text = "".join(f"{il}{v.mean}{v.scale}{v.basis.hex()}{v.basis_scale or ''}" for il, v in enumerate(k_vectors) if v)
    return "-" + hashlib.sha256(text.encode()).hexdigest()[:12] if text else ""


@dataclass(frozen=True)
class _Run:
    """One run of a plan: its name in the records, and what it depends on."""

    name: str
    what: str
    pairs: Pairs
    chunks: range
    k_vectors: tuple[KVectors, ...] = ()


@dataclass(frozen=True)
class Runs:
    """The quality of plans on a reference's text, each run once and kept.

    name       of these runs in the records
    k_vectors  of every layer whose K a plan quantizes; () = K is cached as it is
    crew       workers that may do some of them, of these weights
    """

    session: Session
    reference: Reference
    evaluations: Evaluations
    name: str
    k_vectors: tuple[KVectors, ...] = ()
    crew: tuple[Crew, Weights] | None = None

    def vectors_of(self, pairs: Pairs) -> tuple[KVectors, ...]:
        """The vectors of a plan of these pairs."""
        return where_quantized(self.k_vectors, pairs)

    def of_plan(self, pairs: Pairs) -> Quality:
        """With K conditioned."""
        return self._get(self._by_plan(pairs))

    def of_stock(self, pairs: Pairs) -> Quality:
        """With K as it is, as llama.cpp caches it without a plan; on as much of the text as shows it to be broken, if
        it is."""
        return self._get(self._as_stock(pairs))

    def of_floor(self, f16: Pairs) -> Quality:
        """Of the f16 cache itself, by another attention kernel: what rounding alone makes of the model."""
        return self._get(self._of_f16(f16))

    def kld(self, pairs: Pairs) -> float:
        """Mean KLD of a plan as on all of the text, of which half is run for one side of one layer."""
        run = self._priced(pairs)
        self._get(run)
        return dict(on_all_of(self.evaluations.of(run.name), self._n_chunk))[pairs]

    def ahead(
        self,
        progress: Progress,
        *,
        klds: Iterable[Pairs] = (),
        plans: Iterable[Pairs] = (),
        stock: Iterable[Pairs] = (),
        floor: Iterable[Pairs] = (),
    ) -> None:
        """Let the workers, if there are any, do runs that will be asked for; each is kept as it comes in."""
        if self.crew is None:
            return
        asked = [*map(self._priced, klds), *map(self._by_plan, plans)]
        asked += [*map(self._as_stock, stock), *map(self._of_f16, floor)]
        crew, weights = self.crew
        text, is_kept = self.reference.chunks, self.reference.hidden is not None
        jobs = {
            Job(
                native.build_id(), weights, text, is_kept, (run.chunks.start, run.chunks.stop), run.what, run.pairs,
                run.k_vectors,
            ): run
            for run in asked
            if not self.evaluations.knows(run.name, run.pairs)
        }  # fmt: skip
        if not jobs:
            return
        with progress.bar(f"workers: {len(jobs)} runs", len(jobs)) as advance:
            for job, quality in crew.run(list(jobs)):
                self.evaluations.keep(jobs[job].name, jobs[job].pairs, quality)
                advance(1)

    @property
    def _n_chunk(self) -> int:
        return len(self.reference.chunks.tokens)

    def _by_plan(self, pairs: Pairs) -> _Run:
        name = self.name + tag(self.k_vectors)
        return _Run(name, BY_PLAN, pairs, range(self._n_chunk), self.vectors_of(pairs))

    def _priced(self, pairs: Pairs) -> _Run:
        return replace(self._by_plan(pairs), chunks=_part(pairs, self._n_chunk))

    def _as_stock(self, pairs: Pairs) -> _Run:
        return _Run(self.name, AS_STOCK, pairs, range(self._n_chunk))

    def _of_f16(self, f16: Pairs) -> _Run:
        return _Run(self.name + FLOOR, OF_F16, f16, range(self._n_chunk))

    def _get(self, asked: _Run) -> Quality:
        part = self.reference.of_chunks(asked.chunks)

        def measured(pairs: Pairs) -> Quality:
            return run(self.session, part, asked.what, pairs, asked.k_vectors)

        return self.evaluations.get(asked.name, measured, asked.pairs)


def _part(pairs: Pairs, n_chunk: int) -> range:
    """The chunks that a search measures a plan on: half of them where it changes one side of one layer alone, K one
    half, V the other. Such runs differ by the text more than by its length, and a layer's K and V are much alike."""
    half, changed = -(-n_chunk // 2), [p for p in pairs if {p.type_k, p.type_v} - {"f16", ""}]
    if n_chunk < 2 or len(changed) != 1 or "f16" not in vars(changed[0]).values():
        return range(n_chunk)
    return range(half) if changed[0].type_v == "f16" else range(half, n_chunk)


def on_all_of(runs: Sequence[tuple[Pairs, Quality]], n_chunk: int) -> list[tuple[Pairs, float]]:
    """The KLD of each run as on all n_chunk chunks: that of a part of them, times what the uniform plans tell on all by
    what they tell on that part."""
    in_order = sorted(runs, key=lambda run: [*map(str, run[0])])  # of coming in, which workers change, no sum depends
    uniform = [
        q for pairs, q in in_order if len({*pairs} - {Pair("", "")}) == 1 and len(_part(pairs, n_chunk)) == n_chunk
    ]

    def hardness(part: range) -> float:
        if len(part) == n_chunk:
            return 1.0
        ratios = [q.kld_mean / of_it for q in uniform if (of_it := _of_part(q, part, n_chunk)) > 0]
        return float(np.exp(np.mean(np.log(ratios)))) if ratios else 1.0

    parts = [_part(pairs, n_chunk) for pairs, _ in runs]
    of_part = {part: hardness(part) for part in {*parts}}
    return [(pairs, q.kld_mean * of_part[part]) for (pairs, q), part in zip(runs, parts)]


def _of_part(quality: Quality, part: range, n_chunk: int) -> float:
    """Mean KLD of these of its chunks."""
    of_chunks = np.reshape(quality.blocks, (n_chunk, -1))
    return float(of_chunks[part.start : part.stop].mean())
