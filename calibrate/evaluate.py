"""Plans that are named -> their KLD against an f16 cache, on one text."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from kvtuner_gguf.cache import scratch
from kvtuner_gguf.calibrate.checks import check_room, check_text
from kvtuner_gguf.calibrate.corpus import readable
from kvtuner_gguf.calibrate.kld import Chunks, make_reference, measure
from kvtuner_gguf.calibrate.progress import Progress
from kvtuner_gguf.calibrate.proof import floor_row, row_of
from kvtuner_gguf.calibrate.text import Text, chunks_of, source_text
from kvtuner_gguf.errors import CalibrationError
from kvtuner_gguf.geometry import Geometry
from kvtuner_gguf.pair import Pair
from kvtuner_gguf.plan import Plan
from kvtuner_gguf.quality import Comparison, Quality, Row
from kvtuner_gguf.runtime import Session


@dataclass(frozen=True)
class Passage:
    """How much text is measured on: n_chunk chunks of `stream` tokens, or of as many as the model can read.

    written  tokens of a sequence that the model writes; None = as many as a chunk's, as in a calibration
    """

    stream: int
    n_chunk: int
    written: int | None = None


def evaluate(
    model: Path,
    named: Mapping[str, Plan | Pair],
    progress: Progress,
    passage: Passage,
    *,
    n_ctx: int = 8192,
    text: Path | None = None,
    seed: int = 0,
    n_threads: int | None = None,
    n_gpu_layers: int = 0,
) -> Comparison:
    """Each plan or pair measured on a passage of a text, beside the f16 noise floor.

    text   a file or a pipe; None: the model writes its own
    n_ctx  context at which bytes are counted
    Raises CalibrationError if a plan does not fit the model, or the text cannot be read or is too short.
    """
    with opened(
        model,
        named,
        progress,
        passage,
        n_ctx=n_ctx,
        text=text,
        seed=seed,
        n_threads=n_threads,
        n_gpu_layers=n_gpu_layers,
    ) as subject:
        return subject.measured(passage, named)


@contextmanager
def opened(
    model: Path,
    named: Mapping[str, Plan | Pair],
    progress: Progress,
    most: Passage,
    *,
    n_ctx: int,
    text: Path | None,
    seed: int,
    n_threads: int | None,
    n_gpu_layers: int,
) -> Iterator[Subject]:
    """A model and its plans, to be measured on a passage of at most this size. See evaluate."""
    with Session(model, no_alloc=True) as shape:
        shape.check_writes_text()
        geometry, stream, n_vocab = shape.geometry(n_ctx), shape.fitting(most.stream), shape.n_vocab
    plans = {name: plan_of(name, asked, geometry.values_k) for name, asked in named.items()}
    with readable(text) as path, scratch() as tmp:
        check_text(path, most.n_chunk * stream)
        with Session(model, n_threads=n_threads, n_gpu_layers=n_gpu_layers) as session:
            check_room(tmp, 2 * n_vocab * most.n_chunk * (stream - stream // 2))
            yield Subject(session, plans, geometry, path, tmp, seed, progress)


@dataclass(frozen=True)
class Subject:
    """A model that is open, with the plans that may be measured on it.

    path    of the text; None = the model writes its own
    folder  where the log-probabilities of the f16 cache are meanwhile
    """

    session: Session
    plans: Mapping[str, Plan]
    geometry: Geometry
    path: Path | None
    folder: Path
    seed: int
    progress: Progress

    def measured(
        self,
        passage: Passage,
        names: Collection[str],
        *,
        enough: Callable[[Quality], bool] | None = None,
        goes_on: Callable[[Row], bool] = lambda row: True,
    ) -> Comparison:
        """The plans of these names on a passage.

        enough   whether what the chunks so far say of a plan will do, so that the others are not run; None = all are
        goes_on  gets each plan's row as it is known, and tells whether the next plan is measured
        """
        source, chunks = self._text(passage)
        with self.progress.bar("f16 reference", chunks.n_positions) as advance:
            reference = make_reference(self.session, chunks, self.folder / "f16", advance)
        rows, notes = [], []
        with self.progress.bar("measure", len(names) + 1) as advance:
            floor = measure(self.session, None, reference, flash_attn=False, enough=enough)
            advance(1)
            for name in names:
                plan = self.plans[name]
                self.session.put_in_force(plan)
                notes += [f"{name}: {note}" for note in self.session.plan_notes]
                quality = measure(self.session, plan.pairs, reference, k_vectors=plan.k_vectors, enough=enough)
                rows.append(row_of(self.geometry, name, plan.pairs, quality, plan.k_vectors))
                advance(1)
                if not goes_on(rows[-1]):
                    break
        at = (source.name, chunks.n_positions, chunks.n_ctx, self.geometry.n_ctx)
        return Comparison(*at, (floor_row(self.geometry, floor), *rows), tuple(notes))

    def _text(self, passage: Passage) -> tuple[Text, Chunks]:
        stream = self.session.fitting(passage.stream)
        n, written = passage.n_chunk * stream, min(stream, passage.written or stream)
        source = source_text(self.session, self.path, 0, n, stream=written, seed=self.seed, progress=self.progress)
        return source, chunks_of(source.heldout, stream, passage.n_chunk, "text")


def plan_of(name: str, asked: Plan | Pair, values_k: tuple[int, ...]) -> Plan:
    """The plan, or the pair as one of a model with these values. Raises CalibrationError if it is another model's."""
    plan = Plan.uniform(asked, len(values_k), [bool(n) for n in values_k]) if isinstance(asked, Pair) else asked
    if plan.n_layer != len(values_k):
        raise CalibrationError(
            f"plan '{name}' has {plan.n_layer} layers, the model has {len(values_k)}. Use a plan of this model."
        )
    return plan
