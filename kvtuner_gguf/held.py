"""llama_cpp's Llama, which builds on what its cache holds and on nothing else.

llama_cpp keeps the prefix that two prompts share wherever a removal from the cache is granted. A sliding window's cache
grants it though the window before that position is overwritten, and a recurrent state cannot go back at all. So before
a token is read the run time is asked for all that it builds on, and the tokens so far are read again where that is not
there.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from . import native
from .errors import KvtunerError, NativeError, StateError, StoppedError
from .interrupts import called_from_c
from .log import heard
from .session_file import SavedSession, load_session, save_session

native.library()  # before the first import of llama_cpp

import llama_cpp  # noqa: E402
import numpy as np  # noqa: E402
from llama_cpp._internals import LlamaContext  # noqa: E402
from llama_cpp.llama import LlamaState  # noqa: E402


class HeldContext(LlamaContext):
    """llama_cpp's context, which grants a removal only where it can go on from there."""

    def kv_cache_seq_rm(self, seq_id: int, p0: int, p1: int) -> bool:
        """Remove positions p0 to p1 (-1 = the end). False, too, if what is left lacks what a token at p0 builds on."""
        removed = super().kv_cache_seq_rm(seq_id, p0, p1)
        return removed and (p1 >= 0 or native.ctx_holds(self.ctx, max(seq_id, 0), max(p0, 0)))


class _Stop:
    """Whether a computation is to end, for llama.cpp to ask."""

    def __init__(self, should_stop: Callable[[], bool]) -> None:
        self.should_stop, self.is_asked = should_stop, False
        self._raised: BaseException | None = None
        self.callback = llama_cpp.ggml_abort_callback(self.asked)

    @called_from_c
    def asked(self, _data: object) -> bool:
        try:
            self.is_asked = self.is_asked or bool(self.should_stop())
        except BaseException as error:  # C would lose it
            self.is_asked, self._raised = True, error
        return self.is_asked

    def error(self) -> BaseException:
        return self._raised or StoppedError(
            "the prompt: was not read to its end, as should_stop said so. Give it again."
        )


class HeldLlama(llama_cpp.Llama):
    """llama_cpp.Llama whose answers are those of a fresh object, whatever it read before.

    should_stop  asked before tokens are read, and, of several, between any two steps of the CPU's: True ends the call
                 that reads with a StoppedError, after which this object holds the batches before
    _n_read      how many of input_ids were read by eval, from the start on; an image is not
    _identity    of the weights and all that K and V are computed with; a state tells by it whose it is
    """

    should_stop: Callable[[], bool] | None = None
    _n_read = 0

    @property
    def _ctx(self) -> HeldContext:
        return self.__dict__["_ctx"]

    @_ctx.setter
    def _ctx(self, ctx: LlamaContext) -> None:
        ctx.__class__ = HeldContext  # llama_cpp makes it itself
        self.__dict__["_ctx"] = ctx

    @property
    def n_tokens(self) -> int:
        return self.__dict__["n_tokens"]

    @n_tokens.setter
    def n_tokens(self, n_tokens: int) -> None:
        self.__dict__["n_tokens"] = n_tokens
        self._requires_eval = True  # the logits that are there are those of another position

    def reset(self) -> None:
        super().reset()
        self._n_read = 0

    def eval(self, tokens: Sequence[int]) -> None:
        """Read tokens at n_tokens and on. Raises NativeError where the tokens before them are neither held nor
        known."""
        if len(tokens) and not native.ctx_holds(self._ctx.ctx, 0, self.n_tokens):
            before = self._forget_all()
            if self.draft_model is None:
                tokens = [*before, *tokens]  # in the batches of a fresh object
            elif before:
                self.eval(before)  # apart: sampling counts the logits of a draft from the end of its batch
        start = self.n_tokens
        try:
            with self._unless_lost(), self._stoppable(len(tokens)):
                super().eval(tokens)
        finally:
            if start <= self._n_read:
                self._n_read = self.n_tokens

    @contextmanager
    def _unless_lost(self) -> Iterator[None]:
        """Raises NativeError out of the block where an RPC host is why it failed, or what it made is not there."""
        try:
            yield
        except RuntimeError:
            self._check_hosts()
            raise
        self._check_hosts()

    def _check_hosts(self) -> None:
        if host := native.lost_host(self._ctx.ctx):
            raise NativeError(
                f"RPC host {host}: was lost. Close this model, and load it again when the host is back, or without it."
            ) from None

    @contextmanager
    def _stoppable(self, n_tokens: int) -> Iterator[None]:
        """Raises StoppedError out of the block when should_stop says so, and what that raises."""
        if self.should_stop is None:
            yield
            return
        stop = _Stop(self.should_stop)
        if stop.asked(None):
            raise stop.error()
        if n_tokens == 1:  # soon over
            yield
            return
        llama_cpp.llama_set_abort_callback(self._ctx.ctx, stop.callback, None)
        try:
            yield
        except RuntimeError:
            if stop.is_asked:
                raise stop.error() from None
            raise
        finally:
            llama_cpp.llama_set_abort_callback(self._ctx.ctx, llama_cpp.ggml_abort_callback(), None)

    def _forget_all(self) -> list[int]:
        """Empty the cache. -> the tokens that were read so far."""
        n_tokens, n_read = self.n_tokens, self._n_read
        self.reset()
        self._ctx.kv_cache_clear()
        if n_tokens > n_read:
            raise NativeError(
                f"position {n_tokens}: the cache does not hold what a token there builds on, and "
                f"{n_tokens - n_read} tokens before it "
                "were not read by eval. All is forgotten now: give the whole prompt again."
            )
        return self.input_ids[:n_tokens].tolist()

    @cached_property
    def _identity(self) -> str:
        params, lora = self.context_params, (self.lora_path, self.lora_scale)
        names = ("rope_scaling_type", "rope_freq_base", "rope_freq_scale", "yarn_ext_factor", "yarn_attn_factor",
                 "yarn_beta_fast",
                 "yarn_beta_slow", "yarn_orig_ctx", "attention_type")  # fmt: skip
        parts = (
            native.fingerprint(self._model.model),
            lora,
            self.kv_overrides,
            [getattr(params, name) for name in names],
        )
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def save_session(self, path: str | os.PathLike[str], about: str = "") -> None:
        """Write what was read, tokens and cache, to a file, in one step and for its owner alone. It is as large as the
        cells in use: unlike a LlamaState it has no logits. Raises StateError if it cannot be written.

        about  what load_session is to return: the conversation, for example
        """
        tokens = self.input_ids[: self.n_tokens].astype(np.int32)
        save_session(Path(path), SavedSession(self._identity, tokens, self._n_read, self._cells(), about))

    def load_session(self, path: str | os.PathLike[str]) -> str:
        """Go on where the session was saved: nothing is read again but the last token of a prompt. -> what it was saved
        with. Raises StateError, which says why it was refused, and after which this object is as after reset()."""
        with self._or_reset("session"):
            saved = load_session(Path(path))
            n_tokens = len(saved.tokens)
            self._check("session", saved.identity, n_tokens)
            self.reset()
            self._set_cells(saved.cells)
            self.input_ids[:n_tokens] = saved.tokens
            self.n_tokens, self._n_read = n_tokens, saved.n_read
        return saved.about

    def _cells(self) -> bytes:
        """Those of what was read, as llama.cpp writes them."""
        ctx = self._ctx.ctx
        size = llama_cpp.llama_state_seq_get_size(ctx, 0)
        buf = (ctypes.c_uint8 * size)()
        with self._unless_lost():
            n_bytes = llama_cpp.llama_state_seq_get_data(ctx, buf, size, 0)
        if n_bytes != size:
            raise StateError("session: llama.cpp did not write its cells.")
        return bytes(buf)

    def _set_cells(self, cells: bytes) -> None:
        """In place of all that there are."""
        self._ctx.kv_cache_clear()
        buf = (ctypes.c_uint8 * len(cells)).from_buffer_copy(cells)
        if llama_cpp.llama_state_seq_set_data(self._ctx.ctx, buf, len(cells), 0) != len(cells):
            raise RuntimeError("llama.cpp did not take its cells")

    def save_state(self) -> LlamaState:
        with self._unless_lost():
            state: Any = super().save_state()
        state.identity, state.n_read = self._identity, self._n_read
        return state

    def load_state(self, state: LlamaState) -> None:
        """Go on where the state was saved. Raises StateError, after which this object is as after reset()."""
        with self._or_reset("state"):
            self._take(state)

    @contextmanager
    def _or_reset(self, what: str) -> Iterator[None]:
        """The block ends well, or this object is as after reset() and a StateError says why."""
        with heard() as log:
            try:
                yield
            except Exception as error:
                self.reset()
                self._ctx.kv_cache_clear()
                if isinstance(error, KvtunerError):
                    raise
                said = log.lines[0].partition(": ")[2] if log.lines else ""  # after the name of a function
                reason = said or f"{error}: it is damaged, or was saved under another plan"
                raise StateError(f"{what}: refused ({reason}). Give the prompt again.") from error

    def _check(self, what: str, identity: str | None, n_tokens: int) -> None:
        """Raises StateError for what was saved by another model, or does not fit."""
        if identity != self._identity:
            raise StateError(
                f"{what}: was saved with other weights or settings, or not by kvtuner_gguf.Llama. Give the prompt "
                "again."
            )
        n_ctx = len(self.input_ids)
        if not 0 <= n_tokens <= n_ctx:
            raise StateError(
                f"{what}: has {n_tokens} tokens, this context {n_ctx}. Give the prompt again, or use a larger n_ctx."
            )

    def _take(self, state: Any) -> None:
        n_tokens, n_ctx = state.n_tokens, len(self.input_ids)
        self._check("state", getattr(state, "identity", None), n_tokens)
        input_ids, scores = np.zeros(n_ctx, np.intc), np.zeros((len(self.scores[:n_tokens]), self._n_vocab), np.single)
        input_ids[:n_tokens] = state.input_ids[:n_tokens]
        kept = state.scores[: len(scores)]  # fewer where it was saved without the logits of all tokens
        scores[: len(kept)] = kept
        self._ctx.kv_cache_clear()  # a state that holds less than it says must not go on with what was there
        super().load_state(
            LlamaState(input_ids, scores, n_tokens, state.llama_state, state.llama_state_size, state.seed)
        )
        self._n_read = min(state.n_read, n_tokens)

    def close(self) -> None:
        if "_stack" in self.__dict__:  # not if construction failed before it
            super().close()
