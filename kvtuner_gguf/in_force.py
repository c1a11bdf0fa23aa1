"""A plan that is asked for -> the plan in force on a loaded model. Every command and class goes this one way."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from . import native
from .errors import KvtunerError, PlanError
from .kvectors import KVectors
from .pair import Pair
from .plan import PREFIX, Plan

BESIDE = ".kvtuner.json"  # after a model's whole name: a sidecar that is found by itself
Asked = Plan | str | os.PathLike[str] | bool | None


def asked_plan(plan: Asked, kv_overrides: Mapping[str, object] | None = None) -> Plan | bool | None:
    """What a `plan` argument asks for: a Plan, that of a sidecar's path, False = none, None = what the file and the
    overrides say.

    Raises PlanError for a sidecar that is faulty, for True, and for overrides of a plan beside one that is given.
    """
    if plan is True:
        raise PlanError("plan=True: need None (the plan in the file), a Plan, the path of a sidecar, or False.")
    ours = [key for key in kv_overrides or () if key.startswith(PREFIX)]
    if plan is not None and ours:
        raise PlanError(f"kv_overrides: got {ours[0]} beside plan=, which is the whole plan. Leave one of them out.")
    return Plan.load(plan) if isinstance(plan, (str, os.PathLike)) else plan


def plan_beside(model: str | os.PathLike[str]) -> Plan | None:
    """The plan of the sidecar that lies beside a model's file, model.gguf.kvtuner.json; None if there is none. Raises
    PlanError for a faulty one."""
    sidecar = Path(f"{os.fspath(model)}{BESIDE}")
    return Plan.load(sidecar) if sidecar.exists() else None


def put_in_force(model: int, plan: Plan | bool | None, path: str | os.PathLike[str] | None = None) -> Plan | None:
    """The plan of contexts that are made of the model from now on, in place of any other; None leaves what is in force,
    or, if that is nothing, puts in force the plan beside the model's file.

    path  of the model's file; None = nothing is looked for beside it
    -> the plan that was put in force, if one was
    A plan that was calibrated on other weights is used, with a note (native.plan_notes).
    Raises PlanError if it has not the model's number of layers, NativeError or CodecError if the run time refuses it:
    its types, and what was in force stays; its vectors, and no plan is in force. PlanError for a fault in the sidecar.
    """
    has_layers = native.n_layer(model) > 0  # a vocabulary that is loaded alone has none
    if plan is None and path is not None and has_layers and native.plan_source(model) == "none":
        plan = plan_beside(path)
    if plan is None:
        return None
    if isinstance(plan, bool):  # False
        put_pairs_in_force(model, None)
        return None
    n_layer = native.n_layer(model)
    if plan.n_layer != n_layer:
        raise PlanError(f"plan has {plan.n_layer} layers, the model has {n_layer}. Calibrate this model again.")
    put_pairs_in_force(model, plan.pairs, plan.k_vectors)
    if "weights" in plan.calibration:
        native.set_plan_weights(model, str(plan.calibration["weights"]))
    return plan


def put_pairs_in_force(model: int, pairs: Sequence[Pair] | None, k_vectors: Sequence[KVectors] = ()) -> None:
    """Types and vectors that are tried, and are no one's plan yet; None = all f16. Raises NativeError, CodecError."""
    if pairs is None:
        native.clear_plan(model)
        return
    native.set_plan(model, [p.type_k for p in pairs], [p.type_v for p in pairs])
    try:
        for il, vectors in enumerate(k_vectors):
            if vectors.mean or vectors.scale:
                native.set_k_vectors(model, il, vectors.mean, vectors.scale)
            if vectors.basis:
                native.set_k_basis(model, il, vectors.basis, vectors.basis_scale)
    except KvtunerError:
        native.clear_plan(model)
        raise
