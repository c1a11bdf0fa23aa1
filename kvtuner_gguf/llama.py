"""llama_cpp's Llama with a plan in force."""

from __future__ import annotations

import operator
import os
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

from . import native, rpc
from .errors import KvtunerError
from .held import HeldLlama
from .import_hook import AS_ASKED
from .in_force import Asked, asked_plan, put_in_force
from .machine import check_memory, total_memory
from .pair import allocated_pairs
from .plan import PREFIX, Plan
from .runtime import Session
from .threads import MOST_THREADS, checked_threads
from .uses import check_context, check_writes_text
from .words import cut_long_words

if TYPE_CHECKING:
    from .native import LayerCache

N_CTX = 512  # llama_cpp.Llama's default
_F32_BYTES = 4  # of a cached value, the largest that there is


class Llama(HeldLlama):
    """llama_cpp.Llama with K/V types per layer.

    plan  None obeys the plan in the file, or else that of a sidecar beside it, model.gguf.kvtuner.json; a Plan, or the
          path of its sidecar, is used instead of it, wholly; False = no plan
    rpc_servers  hosts that run `kvtuner-gguf rpc-server`, "host:port,...", to hold layers with their caches: those of
          n_gpu_layers, which then are all by default
    All other arguments are llama_cpp.Llama's. Two defaults differ: flash_attn is True, which a quantized V cache needs,
    and swa_full is False, which keeps sliding-window layers at their window: a prompt that goes back before it is read
    again. type_k and type_v also take names ("q8_0"); one that is not f16 makes its side uniform, whatever the plan
    says. kv_overrides may change the file's plan ("kvtuner.type_k.3": "q8_0"), not one that is given.
    A copy (copy, pickle) runs what the original runs, and has read nothing.

    Raises PlanError if the plan does not fit the model, CodecError for a type that is no cache type, NativeError for
    threads out of range, a model that does not write text (embedding=True takes one), a context beyond the positions
    that it has learned, a cache that is larger than the machine's memory, or if llama_cpp was loaded with another
    library.
    """

    def __init__(
        self,
        model_path: str,
        *,
        plan: Asked = None,
        flash_attn: bool = True,
        swa_full: bool | None = False,
        type_k: int | str | None = None,
        type_v: int | str | None = None,
        kv_overrides: dict[str, Any] | None = None,
        n_threads: int | None = None,
        n_threads_batch: int | None = None,
        n_gpu_layers: int | None = None,
        rpc_servers: str | None = None,
        **kwargs: Any,
    ) -> None:
        self._asked, self._n_ctx_asked = asked_plan(plan, kv_overrides), kwargs.get("n_ctx")
        self._is_overridden = any(key.startswith(PREFIX) for key in kv_overrides or ())
        self._cache_bytes = partial(
            _cache_bytes, model_path, self._asked, (type_k, type_v), kv_overrides or {}, swa_full=bool(swa_full)
        )
        if rpc_servers:
            rpc.use(rpc_servers)
        if n_gpu_layers is None:
            n_gpu_layers = rpc.ALL_LAYERS if rpc_servers else 0
        try:
            super().__init__(
                native.model_file(model_path),
                n_gpu_layers=n_gpu_layers,
                flash_attn=flash_attn,
                swa_full=swa_full,
                type_k=_type_number(type_k),
                type_v=_type_number(type_v),
                kv_overrides=kv_overrides,
                n_threads=n_threads and checked_threads(n_threads),
                n_threads_batch=checked_threads(n_threads_batch or min(os.cpu_count() or 1, MOST_THREADS)),
                **kwargs,
            )
            if not self.context_params.embeddings:
                check_writes_text(self._model.model, self._ctx.ctx, self.model_path)
        except BaseException:
            self.close()  # what was loaded so far
            raise

    @property
    def _model(self) -> Any:
        """llama_cpp's model. It is set between loading it and making a context: there that is looked at, and its plan
        put in force."""
        return self.__dict__["_model"]

    @_model.setter
    def _model(self, model: Any) -> None:
        self.__dict__["_model"] = model
        n_ctx = N_CTX if self._n_ctx_asked is None else self._n_ctx_asked
        if n_ctx:  # 0: as many as the model was trained for
            check_context(model.model, n_ctx)
        put_in_force(model.model, self._asked, None if self._is_overridden else self.model_path)
        setattr(model, AS_ASKED, True)
        self._check_memory(model, n_ctx or model.n_ctx_train())

    def _check_memory(self, model: Any, n_ctx: int) -> None:
        """Raises NativeError if the machine cannot hold the cache. What it is going to take is asked of the run time
        only where f32 would not fit: that reads the model's metadata once more."""
        if self.model_params.n_gpu_layers or self.model_params.vocab_only:
            return
        if _F32_BYTES * n_ctx * native.kv_values(model.model) > total_memory():
            check_memory(self._cache_bytes(n_ctx), n_ctx)

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"plan": self._asked}

    def n_ctx(self) -> int:
        """Tokens of a context: what llama.cpp rounded up to, or as many as the model has positions for."""
        return min(super().n_ctx(), native.n_positions(self._model.model) or super().n_ctx())

    def tokenize(self, text: bytes, add_bos: bool = True, special: bool = False) -> list[int]:
        """Token ids of a text, however long its words are."""
        tokens: list[int] = []
        for part in cut_long_words(text.decode("utf-8", "surrogateescape")):
            tokens += super().tokenize(part.encode("utf-8", "surrogateescape"), add_bos and not tokens, special)
        return tokens

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
        """What was wrong with the plan, and every layer where the run time had to leave it; empty if all is as
        planned."""
        return native.plan_notes(self._model.model) + native.ctx_notes(self._ctx.ctx)

    @property
    def kv_bytes(self) -> int:
        """Bytes of the K and V cache."""
        return sum(layer.bytes_k + layer.bytes_v for layer in self.layers)


def _cache_bytes(
    model_path: str,
    plan: Plan | bool | None,
    types: tuple[int | str | None, int | str | None],
    kv_overrides: dict[str, Any],
    n_ctx: int,
    *,
    swa_full: bool,
) -> int:
    """Bytes that the cache of n_ctx tokens is going to have, by the metadata alone; 0 where something is wrong, which
    is said when the context is made."""
    ours = {key: value for key, value in kv_overrides.items() if key.startswith(PREFIX)}
    with suppress(KvtunerError), Session(model_path, no_alloc=True, overrides=ours) as session:
        session.put_in_force(plan)
        names = [native.type_name_of(number) if (number := _type_number(t)) is not None else "f16" for t in types]
        with session.context(n_ctx, type_k=names[0], type_v=names[1], swa_full=swa_full) as ctx:
            return sum(layer.bytes_k + layer.bytes_v for layer in ctx.layers())
    return 0


def _type_number(type_: int | str | None) -> int | None:
    """A cache type as llama_cpp takes it. Raises CodecError for a name or number that is none."""
    if type_ is None:
        return None
    return native.type_number(type_ if isinstance(type_, str) else native.type_name_of(operator.index(type_)))
