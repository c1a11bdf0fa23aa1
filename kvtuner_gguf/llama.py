"""llama_cpp's Llama with a plan in force."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from . import native
from .errors import PlanError
from .pair import allocated_pairs
from .plan import Plan
from .runtime import put_in_force

native.library()  # before the first import of llama_cpp

import llama_cpp  # noqa: E402

if TYPE_CHECKING:
    from .native import LayerCache


class Llama(llama_cpp.Llama):
    """llama_cpp.Llama with K/V types per layer.

    plan  None obeys the plan in the file; a Plan, or the path of its sidecar, is used instead of it; False = no plan
    All other arguments are llama_cpp.Llama's. Two defaults differ: flash_attn is True, which a quantized V cache needs,
    and swa_full is False, which keeps sliding-window layers at their window. type_k and type_v also take names ("q8_0");
    one that is not f16 makes its side uniform, whatever the plan says.

    Raises PlanError if the plan does not fit the model, NativeError if llama_cpp was loaded with another library.
    """

    def __init__(
        self,
        model_path: str,
        *,
        plan: Plan | str | os.PathLike[str] | bool | None = None,
        flash_attn: bool = True,
        swa_full: bool | None = False,
        type_k: int | str | None = None,
        type_v: int | str | None = None,
        kv_overrides: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if plan is True:
            raise PlanError("plan=True: need None (the plan in the file), a Plan, the path of a sidecar, or False.")
        if isinstance(plan, (str, os.PathLike)):
            plan = Plan.load(plan)
        self._asked = plan
        super().__init__(
            native.model_file(model_path),
            flash_attn=flash_attn,
            swa_full=swa_full,
            type_k=_type_number(type_k),
            type_v=_type_number(type_v),
            kv_overrides={**_plan_overrides(plan), **(kv_overrides or {})} or None,
            **kwargs,
        )
        if isinstance(plan, Plan):
            self._check_fits(plan)

    @property
    def _model(self) -> Any:
        """llama_cpp's model. It is set between loading it and making a context: where vectors of K, too many for overrides, go in."""
        return self.__dict__["_model"]

    @_model.setter
    def _model(self, model: Any) -> None:
        self.__dict__["_model"] = model
        if isinstance(self._asked, Plan) and self._asked.k_vectors and self._asked.n_layer == native.n_layer(model.model):
            put_in_force(model.model, self._asked.pairs, self._asked.k_vectors)

    def _check_fits(self, plan: Plan) -> None:
        n_layer = native.n_layer(self._model.model)
        if plan.n_layer != n_layer:
            self.close()
            raise PlanError(f"plan has {plan.n_layer} layers, the model has {n_layer}. Calibrate this model again.")

    @property
    def layers(self) -> list[LayerCache]:
        """What is allocated for each layer that has KV of its own."""
        return native.ctx_layers(self._model.model, self._ctx.ctx)

    @property
    def plan(self) -> Plan:
        """The pairs that are really allocated, whatever was asked for."""
        return Plan(allocated_pairs(self.layers, native.n_layer(self._model.model)))

    @property
    def plan_notes(self) -> list[str]:
        """What was wrong with the plan, and every layer where the run time had to leave it; empty if all is as planned."""
        return native.plan_notes(self._model.model) + native.ctx_notes(self._ctx.ctx)

    @property
    def kv_bytes(self) -> int:
        """Bytes of the K and V cache."""
        return sum(layer.bytes_k + layer.bytes_v for layer in self.layers)


def _type_number(name: int | str | None) -> int | None:
    """A type as llama_cpp takes it."""
    from .codecs import codec

    return native.type_number(codec(name).name) if isinstance(name, str) else name


def _plan_overrides(plan: Plan | bool | None) -> dict[str, str | bool]:
    """The override keys that put a plan in force, or switch the file's off."""
    if plan is None:
        return {}
    if plan is False:
        return {"kvtuner.enabled": False}
    return {
        f"kvtuner.type_{side}.{il}": name or "f16"
        for side, names in (("k", plan.type_k), ("v", plan.type_v))
        for il, name in enumerate(names)
    }


