"""A loaded model, and contexts of it under any plan: decode, logits, tap. What the calibration runs on."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from types import EllipsisType
from typing import Any

import numpy as np

from . import native
from .errors import KvtunerError, NativeError
from .geometry import Geometry
from .hidden import Hidden
from .in_force import put_in_force, put_pairs_in_force
from .kvectors import KVectors
from .log import process_log
from .pair import Pair
from .plan import Plan
from .tap import Tap
from .template import ChatTemplate, Messages
from .threads import checked_threads, default_threads
from .uses import check_context, check_positions, check_writes_text
from .words import cut_long_words


class Session:
    """A model, loaded once.

    Raises NativeError if the file is missing or cannot be loaded.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        n_threads: int | None = None,
        n_gpu_layers: int = 0,
        no_alloc: bool = False,
        overrides: dict[str, str | bool] | None = None,
    ) -> None:
        """no_alloc: read the metadata only; contexts then tell what they would allocate, and cannot decode."""
        native.library()
        from llama_cpp import llama_cpp

        self._llama = llama_cpp
        self.path = Path(path)
        self.n_threads = checked_threads(n_threads or default_threads())
        if not self.path.exists():
            raise NativeError(f"model '{path}' does not exist. Check the path.")
        self._log = process_log()
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = n_gpu_layers
        params.no_alloc = no_alloc
        if no_alloc:
            params.load_mode = llama_cpp.LLAMA_LOAD_MODE_NONE
        self._overrides = _override_array(llama_cpp, overrides) if overrides else None
        if self._overrides:
            params.kv_overrides = self._overrides
        self.model = llama_cpp.llama_model_load_from_file(native.model_file(path).encode(), params)
        if not self.model:
            raise NativeError(f"model '{path}' cannot be loaded: {self._log.reason()}")
        self.vocab = llama_cpp.llama_model_get_vocab(self.model)
        self.n_vocab = llama_cpp.llama_vocab_n_tokens(self.vocab)
        self.n_layer = native.n_layer(self.model)
        self.n_embd = llama_cpp.llama_model_n_embd(self.model)
        # of the first layer: a model that caches nothing has no KV heads
        n_head_kv = llama_cpp.llama_model_n_head_kv(self.model)
        self.n_gqa = max(1, llama_cpp.llama_model_n_head(self.model) // max(1, n_head_kv))
        self.n_ctx_train = llama_cpp.llama_model_n_ctx_train(self.model)
        self.n_params = llama_cpp.llama_model_n_params(self.model)

    def close(self) -> None:
        """Free the model. Contexts must be closed before."""
        if self.model:
            self._llama.llama_model_free(self.model)
            self.model = None

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def set_plan(self, pairs: Sequence[Pair] | None, k_vectors: Sequence[KVectors] = ()) -> None:
        """The plan in force from now on, and how its K is conditioned; None = all f16."""
        put_pairs_in_force(self.model, pairs, k_vectors)

    def put_in_force(self, plan: Plan | bool | None) -> Plan | None:
        """A plan as a user asks for it, in force from now on: see in_force.put_in_force."""
        return put_in_force(self.model, plan, None if self._overrides else self.path)

    @property
    def plan_source(self) -> str:
        """Where the plan in force is from: 'file', 'override', 'api', or 'none'."""
        return native.plan_source(self.model)

    @property
    def plan_notes(self) -> list[str]:
        """What was wrong with the plan in force, one line each."""
        return native.plan_notes(self.model)

    def rope(self, il: int) -> tuple[int, bool]:
        """(channels of a head that RoPE turns, whether a pair is half of them apart; else neighbours)."""
        return native.rope(self.model, il)

    @contextmanager
    def context(
        self,
        n_ctx: int,
        pairs: Sequence[Pair] | EllipsisType | None = ...,
        k_vectors: Sequence[KVectors] = (),
        **kwargs: Any,
    ) -> Iterator[Context]:
        """A Context under a plan, which stays in force; closed at the end of the block.

        pairs      one per layer; None = all f16; left out: what is in force, at first the plan in the file
        k_vectors  how each layer's K is conditioned; () = none is
        """
        if not isinstance(pairs, EllipsisType):
            self.set_plan(pairs, k_vectors)
        ctx = Context(self, n_ctx, **kwargs)
        try:
            yield ctx
        finally:
            ctx.close()

    def tokenize(self, text: str, *, add_special: bool = True, parse_special: bool = False) -> list[int]:
        """Token ids of a text."""
        tokens: list[int] = []
        for part in cut_long_words(text):
            data = part.encode()
            buf = (ctypes.c_int32 * (len(data) + 16))()
            n = self._llama.llama_tokenize(
                self.vocab, data, len(data), buf, len(buf), add_special and not tokens, parse_special
            )
            if n < 0:
                raise NativeError(f"a text of {len(data)} bytes could not be tokenized: {self._log.reason()}")
            tokens += buf[:n]
        return tokens

    def prompt_tokens(self, messages: Messages, tools: Sequence[dict[str, Any]] = ()) -> list[int]:
        """A conversation as the model reads it, up to where its answer starts. Without a chat template, the text of a
        single message as it is. Raises KvtunerError if the template cannot take it."""
        if self.chat_template is not None:
            text = self.chat_template.prompt(messages, tools)
            return self.tokenize(text, add_special=False, parse_special=True)
        if len(messages) > 1 or tools:
            raise KvtunerError("a conversation or tools need a chat template, and the model has none. Give one prompt.")
        return self.tokenize(messages[0]["content"])

    def detokenize(self, tokens: Sequence[int]) -> str:
        """The text of tokens, without special ones."""
        array = (ctypes.c_int32 * max(1, len(tokens)))(*tokens)
        buf = ctypes.create_string_buffer(64)
        for _ in range(2):
            n = self._llama.llama_detokenize(self.vocab, array, len(tokens), buf, len(buf), False, False)
            if n >= 0:
                return buf.raw[:n].decode(errors="replace")
            buf = ctypes.create_string_buffer(-n)
        raise NativeError(f"{len(tokens)} tokens could not be written as text: {self._log.reason()}")

    def is_end(self, token: int) -> bool:
        """True for a token that ends a document or a turn."""
        return self._llama.llama_vocab_is_eog(self.vocab, token)

    @cached_property
    def chat_template(self) -> ChatTemplate | None:
        """The template in the model's file; None if it has none. Raises KvtunerError if it does not parse."""
        source = self._llama.llama_model_chat_template(self.model, None)
        if not source:
            return None
        lc = self._llama
        bos, eos = (
            self._token_text(token) for token in (lc.llama_vocab_bos(self.vocab), lc.llama_vocab_eos(self.vocab))
        )
        return ChatTemplate(source.decode(errors="replace"), bos, eos)

    def _token_text(self, token: int) -> str:
        """How a token is written; "" for one that the vocabulary does not have."""
        return (
            (self._llama.llama_vocab_get_text(self.vocab, token) or b"").decode(errors="replace") if token >= 0 else ""
        )

    def chat_prompt(self, prompt: str) -> str | None:
        """A user's message in the model's own chat template, up to where the answer starts; None if it has none."""
        template = self._llama.llama_model_chat_template(self.model, None)
        if not template:
            return None
        message = self._llama.llama_chat_message(role=b"user", content=prompt.encode())
        buf = ctypes.create_string_buffer(len(template) + 2 * len(prompt.encode()) + 1024)
        size = self._llama.llama_chat_apply_template(template, ctypes.byref(message), 1, True, buf, len(buf))
        return buf.raw[:size].decode() if 0 < size <= len(buf) else None

    def system_info(self) -> str:
        """What llama.cpp uses of the processor: "... AVX2 = 1 | ..." """
        return self._llama.llama_print_system_info().decode()

    def save_as(self, path: Path, type_name: str) -> None:
        """Write the model with its matrices as another type. Raises NativeError."""
        params = self._llama.llama_model_quantize_default_params()
        params.nthread, params.allow_requantize = self.n_threads, True
        params.ftype = getattr(self._llama, f"LLAMA_FTYPE_MOSTLY_{type_name.upper()}")
        if self._llama.llama_model_quantize(os.fsencode(self.path), os.fsencode(path), ctypes.byref(params)):
            path.unlink(missing_ok=True)
            raise NativeError(f"model '{self.path}' cannot be written as {type_name}: {self._log.reason()}")

    def check_writes_text(self) -> None:
        """Raises NativeError for a model that cannot be run token by token; opens a small context to ask."""
        with self.context(self.fitting(256)) as ctx:
            check_writes_text(self.model, ctx.ctx, self.path)

    def fitting(self, n_ctx: int) -> int:
        """So many tokens, or as many as the model has positions for."""
        return min(n_ctx, native.n_positions(self.model) or n_ctx)

    def geometry(self, n_ctx: int) -> Geometry:
        """Cached values of each layer at n_ctx tokens, as the run time would allocate them."""
        values_k, values_v = [0] * self.n_layer, [0] * self.n_layer
        for layer in self._layers_with(n_ctx, "f16"):
            values_k[layer.il], values_v[layer.il] = layer.bytes_k // 2, layer.bytes_v // 2
        return Geometry(tuple(values_k), tuple(values_v), n_ctx)

    def rotation(self, type_name: str = "q8_0") -> dict[int, tuple[int, int]]:
        """il -> (rot_k, rot_v): the Hadamard blocks that quantized K and V of a layer are rotated by, 0 = none."""
        return {layer.il: (layer.rot_k, layer.rot_v) for layer in self._layers_with(self.fitting(256), type_name)}

    def supported(self, types: Sequence[str]) -> dict[int, tuple[tuple[str, ...], tuple[str, ...]]]:
        """il -> the K types and the V types, of those named, that the run time allocates for the layer."""
        found: dict[int, tuple[list[str], list[str]]] = {}
        for name in types:
            for layer in self._layers_with(self.fitting(256), name):
                k, v = found.setdefault(layer.il, ([], []))
                if layer.type_k == name:
                    k.append(name)
                if layer.type_v in (name, ""):
                    v.append(name)
        return {il: (tuple(k), tuple(v)) for il, (k, v) in found.items()}

    def _layers_with(self, n_ctx: int, type_name: str) -> list[native.LayerCache]:
        """The layers of a context with one type everywhere. Changes the plan."""
        with self.context(n_ctx, [Pair(type_name, type_name)] * self.n_layer) as ctx:
            return ctx.layers()


def _override_array(llama_cpp: Any, overrides: dict[str, str | bool]) -> ctypes.Array[Any]:
    """llama_model_kv_override[], ended by an empty key."""
    array = (llama_cpp.llama_model_kv_override * (len(overrides) + 1))()
    for item, (key, value) in zip(array, overrides.items()):
        item.key = key.encode()
        if isinstance(value, bool):
            item.tag, item.value.val_bool = llama_cpp.LLAMA_KV_OVERRIDE_TYPE_BOOL, value
        else:
            item.tag, item.value.val_str = llama_cpp.LLAMA_KV_OVERRIDE_TYPE_STR, value.encode()
    return array


class Context:
    """One context of a session. Its layers are as the plan was when it was opened."""

    def __init__(
        self,
        session: Session,
        n_ctx: int,
        *,
        n_ubatch: int = 512,
        n_seq_max: int = 1,
        type_k: str = "f16",
        type_v: str = "f16",
        flash_attn: bool = True,
        swa_full: bool = False,
        watch: Tap | Hidden | None = None,
    ) -> None:
        """n_ctx: tokens, of all sequences together; watch: sees tensors of the graph, or gives them. Raises NativeError
        if the context cannot be made."""
        check_context(session.model, n_ctx, n_seq_max)
        self._session, self._llama = session, session._llama
        lc = self._llama
        params = lc.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = n_ctx, n_ctx, n_ubatch, n_seq_max
        params.n_threads = params.n_threads_batch = session.n_threads
        params.flash_attn_type = lc.LLAMA_FLASH_ATTN_TYPE_ENABLED if flash_attn else lc.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.type_k, params.type_v = native.type_number(type_k), native.type_number(type_v)
        params.swa_full = swa_full
        if watch:
            params.cb_eval, params.cb_eval_user_data = watch.eval_callback, watch.handle
        self._watch = watch
        self.ctx = lc.llama_init_from_model(session.model, params)
        if not self.ctx:
            raise NativeError(f"a context of {n_ctx} tokens cannot be made: {session._log.reason()}")
        self._batch: Any = None
        self.n_ctx, self.n_seq_max = n_ctx, n_seq_max

    def close(self) -> None:
        if self._batch is not None:
            self._llama.llama_batch_free(self._batch)
            self._batch = None
        if self.ctx:
            self._llama.llama_free(self.ctx)
            self.ctx = None

    def layers(self) -> list[native.LayerCache]:
        """What is allocated, layer by layer."""
        return native.ctx_layers(self._session.model, self.ctx)

    def notes(self) -> list[str]:
        """Every fallback from the plan."""
        return native.ctx_notes(self.ctx)

    def memory(self) -> native.Memory:
        """Bytes that it takes, with the model's weights."""
        return native.ctx_memory(self.ctx)

    def clear(self) -> None:
        """Forget all tokens."""
        self._llama.llama_memory_clear(self._llama.llama_get_memory(self.ctx), False)

    def forget(self, seq_id: int) -> None:
        """Forget the tokens of one sequence."""
        self._llama.llama_memory_seq_rm(self._llama.llama_get_memory(self.ctx), seq_id, -1, -1)

    def copy(self, source: int, target: int) -> None:
        """Give a sequence that is empty all the tokens of another."""
        self._llama.llama_memory_seq_cp(self._llama.llama_get_memory(self.ctx), source, target, -1, -1)

    def decode(self, rows: Sequence[tuple[int, int, int]], outputs: Sequence[bool]) -> np.ndarray:
        """Process tokens. rows: (token, pos, seq_id) each; outputs: whether its logits are wanted.

        -> (sum of outputs, n_vocab) float32, a view that lives until the next call. Raises NativeError.
        """
        self._check_batch(rows)
        batch = self._filled_batch(rows, outputs)
        code = self._llama.llama_decode(self.ctx, batch)
        if code:
            raise NativeError(f"llama_decode of {len(rows)} tokens returned {code}: {self._session._log.reason()}")
        n_outputs = sum(map(bool, outputs))
        if not n_outputs:
            return np.empty((0, self._session.n_vocab), np.float32)
        self._llama.llama_synchronize(self.ctx)
        logits = self._llama.llama_get_logits(self.ctx)
        return np.ctypeslib.as_array(logits, (n_outputs, self._session.n_vocab))

    def _check_batch(self, rows: Sequence[tuple[int, int, int]]) -> None:
        """llama.cpp aborts the process for these."""
        if not 0 < len(rows) <= self.n_ctx:
            raise NativeError(f"a batch of {len(rows)} tokens: need 1 to {self.n_ctx}, as many as the context.")
        check_positions(self._session.model, 1 + max(pos for _, pos, _ in rows))

    def _filled_batch(self, rows: Sequence[tuple[int, int, int]], outputs: Sequence[bool]) -> object:
        if self._batch is None:
            self._batch = self._llama.llama_batch_init(self.n_ctx, 0, 1)
        batch = self._batch
        batch.n_tokens = len(rows)
        for i, ((token, pos, seq_id), wanted) in enumerate(zip(rows, outputs)):
            batch.token[i], batch.pos[i], batch.logits[i] = token, pos, bool(wanted)
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, seq_id
        return batch

    def logits(self, tokens: Sequence[int], positions: Iterable[int], step: int = 512) -> Iterator[np.ndarray]:
        """Logits after the tokens at these positions, in their order, from an empty context: arrays (<= step, n_vocab),
        valid one by one."""
        self.clear()
        asked = frozenset(positions)
        for start in range(0, len(tokens), step):
            part = tokens[start : start + step]
            wanted = [start + i in asked for i in range(len(part))]
            out = self.decode([(t, start + i, 0) for i, t in enumerate(part)], wanted)
            if len(out):
                yield out
