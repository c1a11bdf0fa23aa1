"""What the run time makes of a model's plan at a context: asked of the run time itself, without loading weights."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from .codecs import codec
from .errors import PlanError
from .geometry import Geometry
from .gguf_file import read_plan
from .in_force import asked_plan
from .native import LayerCache
from .pair import Pair, allocated_pairs
from .plan import Plan
from .runtime import Session


@dataclass(frozen=True)
class Shown:
    """A plan as it is resolved.

    source        'file', 'sidecar', or 'none'
    pairs         what is allocated for each layer
    layers        the same, and how K is conditioned, of the layers that have KV of their own
    vector_bytes  of the vectors of K that are in force
    plan          the plan asked for; None if there is none, or a faulty one
    notes         every fallback from the plan, one line each
    """

    source: str
    pairs: tuple[Pair, ...]
    layers: tuple[LayerCache, ...]
    geometry: Geometry
    vector_bytes: int
    plan: Plan | None
    notes: tuple[str, ...]


def shown(
    model: Path, plan: Plan | str | os.PathLike[str] | None = None, *, n_ctx: int, n_gpu_layers: int = 0
) -> Shown:
    """The plan in the model's file, or in the sidecar beside it, or the one given instead. Raises PlanError,
    NativeError."""
    asked = asked_plan(plan)
    with Session(model, no_alloc=True, n_gpu_layers=n_gpu_layers) as session:
        given = session.put_in_force(asked)
        source = "sidecar" if given else session.plan_source
        notes = session.plan_notes
        with session.context(n_ctx) as ctx:
            layers = ctx.layers()
            notes += ctx.notes()
        found = _sound_plan(model) if source == "file" else given
        vector_bytes = sum(_vector_bytes(layer, found) for layer in layers)
        pairs, geometry = allocated_pairs(layers, session.n_layer), session.geometry(n_ctx)
    return Shown(source, pairs, tuple(layers), geometry, vector_bytes, found, tuple(notes))


def _vector_bytes(layer: LayerCache, plan: Plan | None) -> int:
    """Of the vectors in force; how large a basis is, the plan tells that it is from."""
    of_basis = plan.k_vectors[layer.il].basis_alone.n_bytes if layer.k_basis and plan and plan.k_vectors else 0
    return 4 * _k_values(layer) * (layer.k_mean + layer.k_scale) + of_basis


def _k_values(layer: LayerCache) -> int:
    """Values of K that the layer caches of one token: its vectors are as long."""
    k = codec(layer.type_k)
    return layer.bytes_k * k.block_size // (k.type_size * layer.n_cells)


def _sound_plan(model: Path) -> Plan | None:
    """The plan's record in a file; None if there is none, or a faulty one: the run time tells what is wrong with it."""
    try:
        return read_plan(model)
    except PlanError:
        return None
