"""Plans that are named -> their KLD against an f16 cache, on one text."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
from kvtuner_gguf.quality import Comparison, Quality
from kvtuner_gguf.runtime import Session


def evaluate(
    model: Path,
    named: Mapping[str, Plan | Pair],
    progress: Progress,
    *,
    stream: int,
    written: int | None = None,
    n_ctx: int = 8192,
    text: Path | None = None,
    n_chunk: int = 4,
    seed: int = 0,
    n_threads: int | None = None,
    n_gpu_layers: int = 0,
    enough: Callable[[Quality], bool] | None = None,
) -> Comparison:
    """Each plan or pair measured on n_chunk chunks of `stream` tokens, or of as many as the model can read, beside the
    f16 noise floor.

    written  tokens of a sequence that the model writes; None = as many as a chunk's, as in a calibration
    text     a file or a pipe; None: the model writes its own
    n_ctx    context at which bytes are counted
    enough   whether what the chunks so far say of a plan will do, so that the others are not run; None = all are
    Raises CalibrationError if a plan does not fit the model, or the text cannot be read or is too short.
    """
    with Session(model, no_alloc=True) as shape:
        shape.check_writes_text()
        geometry, stream, n_vocab = shape.geometry(n_ctx), shape.fitting(stream), shape.n_vocab
    plans = {name: plan_of(name, asked, geometry.values_k) for name, asked in named.items()}
    with readable(text) as path, scratch() as tmp:
        check_text(path, n_chunk * stream)
        with Session(model, n_threads=n_threads, n_gpu_layers=n_gpu_layers) as session:
            check_room(tmp, 2 * n_vocab * n_chunk * (stream - stream // 2))
            of_sequence = min(stream, written or stream)
            source = source_text(session, path, 0, n_chunk * stream, stream=of_sequence, seed=seed, progress=progress)
            chunks = chunks_of(source.heldout, stream, n_chunk, "text")
            return _measured(session, plans, source, chunks, geometry, tmp, progress, enough)


def _measured(
    session: Session,
    plans: Mapping[str, Plan],
    source: Text,
    chunks: Chunks,
    geometry: Geometry,
    folder: Path,
    progress: Progress,
    enough: Callable[[Quality], bool] | None,
) -> Comparison:
    with progress.bar("f16 reference", chunks.n_positions) as advance:
        reference = make_reference(session, chunks, folder / "f16", advance)
    with progress.bar("measure", len(plans) + 1) as advance:
        rows = [floor_row(geometry, measure(session, None, reference, flash_attn=False, enough=enough))]
        advance(1)
        notes = []
        for name, plan in plans.items():
            session.put_in_force(plan)
            notes += [f"{name}: {note}" for note in session.plan_notes]
            quality = measure(session, plan.pairs, reference, k_vectors=plan.k_vectors, enough=enough)
            rows.append(row_of(geometry, name, plan.pairs, quality, plan.k_vectors))
            advance(1)
    return Comparison(source.name, chunks.n_positions, chunks.n_ctx, geometry.n_ctx, tuple(rows), tuple(notes))


def plan_of(name: str, asked: Plan | Pair, values_k: tuple[int, ...]) -> Plan:
    """The plan, or the pair as one of a model with these values. Raises CalibrationError if it is another model's."""
    plan = Plan.uniform(asked, len(values_k), [bool(n) for n in values_k]) if isinstance(asked, Pair) else asked
    if plan.n_layer != len(values_k):
        raise CalibrationError(
            f"plan '{name}' has {plan.n_layer} layers, the model has {len(values_k)}. Use a plan of this model."
        )
    return plan
