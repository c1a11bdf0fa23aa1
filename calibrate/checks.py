"""All that can be known of a calibration before its first stage: refused at once, and not when everything is
measured."""

from __future__ import annotations

from collections import deque
from collections.abc import Container, Mapping
from dataclasses import dataclass
from pathlib import Path

from kvtuner_gguf.calibrate.capture import captured_bytes
from kvtuner_gguf.calibrate.corpus import Corpus
from kvtuner_gguf.calibrate.goals import Target
from kvtuner_gguf.calibrate.hidden import hidden_bytes
from kvtuner_gguf.calibrate.options import Options
from kvtuner_gguf.calibrate.sizes import Sizes
from kvtuner_gguf.codecs import codec
from kvtuner_gguf.errors import CalibrationError
from kvtuner_gguf.geometry import Geometry
from kvtuner_gguf.room import mib, need, why
from kvtuner_gguf.runtime import Session

_SPECIAL_TOKENS = 16  # more than a tokenizer adds to a text

Types = Mapping[int, tuple[tuple[str, ...], tuple[str, ...]]]


@dataclass(frozen=True)
class Plannable:
    """What is known of a calibration before it starts.

    goal           at the geometry's context
    geometry       what the model caches at the context
    sizes          of the text that the stages work on
    types          il -> the K types and the V types that the layer can take, of those to choose from and f16; those of
                   groups as if each K were in a basis
    scratch_bytes  of the files that are kept at once while it runs: captured Q, K and V, or a reference with its hidden
                   states
    """

    goal: Target
    geometry: Geometry
    sizes: Sizes
    types: Types
    scratch_bytes: int


def plannable_of(options: Options, sizes: Sizes) -> Plannable:
    """Of the model and the goal; sizes are made to fit the model.

    Raises CalibrationError if no plan can meet the goal, NativeError if the model cannot be loaded, or does not write
    text.
    """
    with Session(options.model, no_alloc=True, n_gpu_layers=options.n_gpu_layers) as session:
        session.check_writes_text()
        geometry, supported = session.geometry(options.n_ctx), session.supported(options.measured_types)
        types = offered(supported, supported if options.conditioning[2] else ())
        sizes = sizes.fitting(session.fitting)
        captured = captured_bytes(session.geometry(sizes.stream), sizes.n_captured, session.n_gqa)
        check_can_plan(options.model, geometry)
        goal = options.goal.at(geometry)
        goal.check(geometry, cheapest_bytes(geometry, types))
        hidden = hidden_bytes(session.n_layer, sizes.n_searched * sizes.search_ctx, session.n_embd)
        kept = max(captured, 2 * session.n_vocab * sizes.n_scored + hidden)
        return Plannable(goal, geometry, sizes, types, kept)


def offered(types: Types, in_basis: Container[int]) -> Types:
    """What may be chosen of what each layer can take: types of groups for no V, and for the K of these layers alone."""

    def plain(side: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(name for name in side if not codec(name).groups)

    return {il: (k if il in in_basis else plain(k), plain(v)) for il, (k, v) in types.items()}


def cheapest_bytes(geometry: Geometry, types: Types) -> int:
    """Fewest bytes that any plan can have. types: il -> the K types and the V types that the layer may take."""
    total = 0
    for il, sides in types.items():
        for names, n_values in zip(sides, (geometry.values_k[il], geometry.values_v[il])):
            if n_values:
                total += min(
                    (codec(name).row_bytes(n_values) for name in names), default=codec("f16").row_bytes(n_values)
                )
    return total


def check_can_plan(model: Path, geometry: Geometry) -> None:
    """Raises CalibrationError if no layer of the model has a cache of its own."""
    if not any(geometry.values_k):
        raise CalibrationError(f"model '{model}' has no layer with a K/V cache of its own. There is nothing to plan.")


def check_text(path: Path | None, n_tokens: int) -> None:
    """Raises CalibrationError if a file of text has fewer bytes than it needs tokens; what is wrong in it is said
    before that."""
    if path is None:
        return
    n_bytes = path.stat().st_size
    if n_bytes + _SPECIAL_TOKENS < n_tokens:
        with Corpus(path) as corpus:
            deque(corpus.front(), 0)  # as short as it is
        raise CalibrationError(
            f"text '{path}': {n_bytes} bytes hold {n_bytes} tokens at most, need {n_tokens}. Give a longer text, or "
            "fewer --chunks."
        )


def check_room(folder: Path, n_bytes: int) -> None:
    """Raises CalibrationError if the folder's disk has no room for what is kept while the calibration runs."""
    try:
        need(folder, n_bytes)
    except OSError as error:
        raise CalibrationError(
            f"cache folder {folder}: {why(error, folder)}, need about {mib(n_bytes)} there while it runs. "
            "Make room, use fewer --chunks, or set XDG_CACHE_HOME to a folder elsewhere."
        ) from None
