"""The stages before the search, in order: text, capture, condition, error. Each is made once, and kept."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from kvtuner_gguf import native
from kvtuner_gguf.calibrate.capture import capture
from kvtuner_gguf.calibrate.checks import Plannable, Types, cheapest_bytes, offered
from kvtuner_gguf.calibrate.condition import condition
from kvtuner_gguf.calibrate.error import attention, error_table, k_error
from kvtuner_gguf.calibrate.hidden import hidden_of
from kvtuner_gguf.calibrate.kld import Reference, make_reference
from kvtuner_gguf.calibrate.options import Options
from kvtuner_gguf.calibrate.progress import Progress
from kvtuner_gguf.calibrate.results import Conditions, ErrorTable
from kvtuner_gguf.calibrate.runs import tag
from kvtuner_gguf.calibrate.samples import Capture, LayerSample
from kvtuner_gguf.calibrate.store import Store
from kvtuner_gguf.calibrate.text import Text, chunks_of, source_text
from kvtuner_gguf.codecs import CODECS, codec
from kvtuner_gguf.errors import CalibrationError
from kvtuner_gguf.geometry import Geometry
from kvtuner_gguf.kvectors import KVectors, vector_bytes
from kvtuner_gguf.runtime import Session

if TYPE_CHECKING:
    from kvtuner_gguf.calibrate.crew import Crew
    from kvtuner_gguf.calibrate.jobs import Weights

TEXT = "text.npz"  # the first record
JUDGED_BITS = 4.5  # of the type of K that conditioning is judged with: an error of a rotated type has the same shape


@dataclass(frozen=True)
class Bench:
    """What stages work with.

    session   the model, or a copy of it to search on
    store     what is kept: records
    scratch   folder of what is not: captured tensors, references. Nothing is written there if the store is read-only
    crew      workers that may do runs, and the weights that these are of
    """

    session: Session
    store: Store
    scratch: Path
    progress: Progress
    crew: tuple[Crew, Weights] | None = None


@dataclass(frozen=True)
class Measured:
    """What is known of a model before the search.

    k_vectors  of each layer, where conditioning helps and the goal has room for it; () = nowhere
    errors     of each pair in each layer, K conditioned so
    """

    text: Text
    k_vectors: tuple[KVectors, ...]
    errors: ErrorTable

    @property
    def spent(self) -> int:
        """Bytes of means and scales, which a search takes for spent, whatever the types."""
        return spent_on(self.k_vectors)

    def priced(self, geometry: Geometry) -> Geometry:
        """The geometry that a search goes by: with the bases, which count where K has a type of groups."""
        return replace(geometry, k_vectors=tuple(v.basis_alone for v in self.k_vectors))


def measure_model(options: Options, plannable: Plannable, bench: Bench) -> Measured:
    """Text, vectors of K, and errors: from the records, or made. Raises CalibrationError where a stage does."""
    types = types_of_layers(options, plannable.types)
    text = text_of(options, plannable, bench)
    k_vectors = affordable_vectors(plannable, conditions(options, plannable, types, text, bench), bench)
    in_basis = {il for il, vectors in enumerate(k_vectors) if vectors.basis}
    errors = errors_of(plannable, offered(types, in_basis), text, k_vectors, bench)
    shutil.rmtree(bench.scratch / "capture", ignore_errors=True)  # large, and of no use from here on
    return Measured(text, k_vectors, errors)


def types_of_layers(options: Options, types: Types) -> Types:
    """The types that are measured, of those that each layer can take: those that were not asked for by name are dropped
    where a better one is among them."""
    if options.types:
        return types

    def kept(side: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(t for t in side if CODECS[t].better not in side)

    return {il: (kept(k), kept(v)) for il, (k, v) in types.items()}


def text_of(options: Options, plannable: Plannable, bench: Bench) -> Text:
    """The text to measure on: the user's, or the model's own."""
    sizes = plannable.sizes
    make = partial(
        source_text,
        bench.session,
        options.text,
        sizes.n_calibration,
        sizes.n_heldout,
        stream=sizes.stream,
        seed=options.seed,
        progress=bench.progress,
        unfinished=bench.store.folder / "unfinished.json",
    )
    return bench.store.get(Text, TEXT, make)


def conditions(options: Options, plannable: Plannable, types: Types, text: Text, bench: Bench) -> Conditions:
    """How each layer's K is conditioned, by what it does to a type of about JUDGED_BITS, whatever the goal; in which
    basis, where it may have a type of groups."""
    mean, scale, _ = options.conditioning
    in_basis = [il for il, (k, _) in types.items() if any(codec(t).groups for t in k)]
    if not (mean or scale or in_basis):
        return Conditions((KVectors(),) * bench.session.n_layer, {})
    quantized = {il: [t for t in k if codec(t).block_size > 1] for il, (k, _) in offered(types, ()).items()}
    judged = {il: min(k, key=lambda t: abs(codec(t).bits_per_value - JUDGED_BITS)) for il, k in quantized.items() if k}

    def make() -> Conditions:
        captured = replace(_captured(plannable, text, bench), n_sample=plannable.sizes.n_vectors)
        error = partial(k_error, round_trip=native.round_trip)

        def attended(sample: LayerSample) -> tuple[np.ndarray, np.ndarray]:
            return attention(sample, sample.k, sample.v)

        with bench.progress.bar("condition: K without its mean, scaled, in a basis", len(captured.il)) as advance:
            return condition(
                captured,
                error,
                attended,
                judged,
                mean=mean,
                scale=scale,
                basis=in_basis,
                n_threads=bench.session.n_threads,
                progress=advance,
            )

    tried = f"{mean:d}{scale:d}{bool(in_basis):d}"
    name = f"conditions-{options.n_ctx}-{tried}-{'-'.join(dict.fromkeys(judged.values()))}.json"
    return bench.store.get(Conditions, name, make)


def affordable_vectors(plannable: Plannable, found: Conditions, bench: Bench) -> tuple[KVectors, ...]:
    """The vectors of K; none where the goal has no room for means and scales beside the cheapest plan. A basis counts
    where its layer has a type of groups, so that a plan has it where there is room."""
    n_bytes = spent_on(found.k_vectors)
    if plannable.goal.allows(n_bytes + cheapest_bytes(plannable.geometry, plannable.types)):
        return found.k_vectors
    bench.progress.say(
        f"K is cached as it is: the vectors that condition it take {n_bytes} bytes, which this goal does not have"
    )
    return ()


def spent_on(k_vectors: Sequence[KVectors]) -> int:
    """Bytes of means and scales."""
    return vector_bytes(v.without_basis for v in k_vectors)


def errors_of(
    plannable: Plannable, types: Types, text: Text, k_vectors: tuple[KVectors, ...], bench: Bench
) -> ErrorTable:
    """What each pair does to each layer. Raises CalibrationError if a layer cannot be at f16."""

    def make() -> ErrorTable:
        captured, first = _captured(plannable, text, bench), plannable.sizes.n_vectors
        if any("f16" not in k or "f16" not in v for k, v in types.values()):
            raise CalibrationError("some layers cannot be set to f16. This model is not supported.")
        at_once = bench.session.n_threads
        with bench.progress.bar("error: K and V after each type", len(captured.il)) as advance:
            return error_table(
                captured, types, native.round_trip, k_vectors, first=first, n_threads=at_once, progress=advance
            )

    names = dict.fromkeys(name for sides in types.values() for side in sides for name in side)
    return bench.store.get(ErrorTable, f"errors-{'-'.join(names)}{tag(k_vectors)}.json", make)


def search_reference(plannable: Plannable, text: Text, bench: Bench) -> Reference:
    """The f16 cache on what plans are tried on: the end of the calibration text, from which no vector of K was made."""
    sizes = plannable.sizes
    tail = text.calibration[sizes.n_vectors * sizes.stream :]
    scored = (sizes.skipped(sizes.search_ctx), sizes.search_every)
    chunks = chunks_of(tail, sizes.search_ctx, sizes.n_searched, "calibration text", *scored)
    with bench.progress.bar("search: f16 reference", chunks.n_positions) as advance:
        hidden = hidden_of(bench.session, chunks.tokens.size, bench.scratch / "hidden.f32")
        return make_reference(bench.session, chunks, bench.scratch / "search.f16", advance, hidden)


def heldout_reference(
    plannable: Plannable, text: Text, bench: Bench, *, n_chunk: int, title: str = "heldout: f16 reference"
) -> Reference:
    """The f16 cache on n_chunk chunks of the text that no stage has seen."""
    sizes = plannable.sizes
    chunks = chunks_of(text.heldout, sizes.stream, n_chunk, "held-out text", sizes.skipped(sizes.stream))
    with bench.progress.bar(title, chunks.n_positions) as advance:
        return make_reference(bench.session, chunks, bench.scratch / "heldout.f16", advance)


def _captured(plannable: Plannable, text: Text, bench: Bench) -> Capture:
    path = bench.scratch / "capture"
    if (path / Capture.INDEX).exists():  # of an earlier stage of this run
        return Capture.load(path)
    sizes = plannable.sizes
    chunks = chunks_of(text.calibration, sizes.stream, sizes.n_captured, "calibration text")
    with bench.progress.bar("capture: Q, K, V on an f16 cache", chunks.tokens.size) as advance:
        return capture(bench.session, chunks, path, advance, n_ctx=plannable.geometry.n_ctx)
