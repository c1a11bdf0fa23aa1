"""A run as all that its outcome depends on, and who does it: in any process, on any machine that has the model."""

from __future__ import annotations

import hashlib
import os
import threading
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from kvtuner_gguf import native
from kvtuner_gguf.cache import scratch
from kvtuner_gguf.calibrate.delivery import place
from kvtuner_gguf.calibrate.hidden import hidden_of
from kvtuner_gguf.calibrate.kld import Chunks, Reference, make_reference, measure
from kvtuner_gguf.calibrate.weights import session_of
from kvtuner_gguf.errors import KvtunerError
from kvtuner_gguf.identity import weights_sample
from kvtuner_gguf.kvectors import KVectors
from kvtuner_gguf.pair import Pairs
from kvtuner_gguf.quality import Grade, Quality
from kvtuner_gguf.runtime import Session

BY_PLAN, AS_STOCK, OF_F16 = "plan", "stock", "f16"  # what is run: K conditioned; as llama.cpp caches it; f16 itself
FOLDERS = "KVTUNER_GGUF_MODELS"  # where a worker looks for a model that is not at the path it is asked for


class RefusedError(KvtunerError):
    """Why a worker can do no run of a calibration."""


class MissingError(RefusedError):
    """It has not the model."""


@dataclass(frozen=True)
class Weights:
    """The model that runs are of.

    path       as who asks has it
    sample     names its weights: identity.weights_sample
    copy       type of the copy that they are made on; None = the model itself
    n_threads  None = all processors of who does them
    """

    path: str
    sample: str
    copy: str | None
    n_threads: int | None
    n_gpu_layers: int


@dataclass(frozen=True, eq=False)
class Job:
    """A run, whose Quality depends on nothing else.

    build      of the library
    text       all chunks of a reference; is_kept: with its hidden states, which runs start with
    chunks     of which these are run, the last one left out
    what       BY_PLAN, AS_STOCK or OF_F16
    pairs      one per layer
    k_vectors  how each layer's K is conditioned; () = none is
    """

    build: str
    weights: Weights
    text: Chunks
    is_kept: bool
    chunks: tuple[int, int]
    what: str
    pairs: Pairs
    k_vectors: tuple[KVectors, ...] = ()

    @cached_property
    def text_key(self) -> str:
        """Names the text, and what of it is scored."""
        what = self.text.tokens.tobytes() + repr((self.text.n_skip, self.text.every)).encode()
        return hashlib.sha256(what).hexdigest()[:16]

    @cached_property
    def key(self) -> str:
        """Names it."""
        weights = self.weights.sample, self.weights.copy, self.weights.n_threads, self.weights.n_gpu_layers
        run = self.chunks, self.what, self.pairs, self.k_vectors
        return hashlib.sha256(repr((self.build, weights, self.text_key, self.is_kept, run)).encode()).hexdigest()[:32]


def run(session: Session, reference: Reference, what: str, pairs: Pairs, vectors: tuple[KVectors, ...]) -> Quality:
    """The run itself. Raises CalibrationError as `measure` does."""
    if what == OF_F16:
        return measure(session, None, reference, flash_attn=False)
    if what == AS_STOCK:
        return measure(session, pairs, reference, enough=is_broken)
    return measure(session, pairs, reference, k_vectors=vectors)


def is_broken(quality: Quality) -> bool:
    """Whether what was measured so far shows that beyond doubt."""
    return Grade.of(quality) == Grade("broken", True)


# ---- on a worker


@dataclass
class _Desk:
    """What a worker has open: one model, and its f16 cache on each text that runs were asked of."""

    weights: Weights
    stack: ExitStack = field(default_factory=ExitStack)
    references: dict[str, Reference] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.folder = self.stack.enter_context(scratch())
        sizes: dict[str, Any] = {"n_threads": self.weights.n_threads, "n_gpu_layers": self.weights.n_gpu_layers}
        self.session = self.stack.enter_context(
            session_of(found(self.weights), self.folder, self.weights.copy, **sizes)
        )

    def reference(self, job: Job) -> Reference:
        text, key = job.text, job.text_key
        if key not in self.references:
            hidden = hidden_of(self.session, text.tokens.size, self.folder / f"{key}.f32") if job.is_kept else None
            self.references[key] = make_reference(self.session, text, self.folder / f"{key}.f16", hidden=hidden)
        return self.references[key]

    def close(self) -> None:
        for reference in self.references.values():
            reference.discard()
        self.stack.close()


_desk: _Desk | None = None
_at_work = threading.Lock()  # a process does one at a time, however many threads its worker has


def perform(job: Job) -> dict[str, Any]:
    """The job, on this machine -> the fields of its Quality. Raises RefusedError, CalibrationError."""
    global _desk
    if job.build != native.build_id():
        raise RefusedError(
            f"build {native.build_id()} here, {job.build} where the calibration runs. Install the same version of "
            "kvtuner-gguf."
        )
    with _at_work:
        if _desk is None or _desk.weights != job.weights:
            leave()
            _desk = _Desk(job.weights)
        reference = _desk.reference(job).of_chunks(range(*job.chunks))
        return vars(run(_desk.session, reference, job.what, job.pairs, job.k_vectors))


def leave() -> None:
    """Close what this process has open."""
    global _desk
    if _desk is not None:
        _desk.close()
        _desk = None


def found(weights: Weights) -> Path:
    """The file of these weights on this machine: at the path that is asked for, in a folder of FOLDERS, or as it was
    sent here. Raises MissingError; RefusedError if other weights are where these should be."""
    asked = Path(weights.path)
    folders = [Path(part) for part in os.environ.get(FOLDERS, "").split(os.pathsep) if part]
    named = [asked, *(folder / asked.name for folder in folders)]
    others = []
    for path in dict.fromkeys([*named, *(p for f in folders for p in f.glob("*.gguf")), place(weights.sample)]):
        if path.is_file():
            if weights_sample(path) == weights.sample:
                return path
            others.append(path)
    kind = RefusedError if set(others) & set(named) else MissingError
    looked = f"{', '.join(map(str, others))} has other weights" if others else f"'{asked}' is not there"
    raise kind(
        f"{looked}. Put the model whose weights are {weights.sample[:12]} there, or name its folder in {FOLDERS}."
    )
