"""An f16 cache that is rewritten, layer by layer, between the write of a batch and its attention.

So a model's real forward pass runs on what a method keeps of K and V.
llama.cpp's scheduler tells after each node that it was asked for; the node's data lie in memory, on a CPU.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import numpy as np

from kvtuner_gguf import native
from kvtuner_gguf.interrupts import called_from_c

Code = Callable[[np.ndarray, int], np.ndarray]
"""(n_head_kv, n_tokens, head_dim) float32, place of the first -> the same as it is read back."""
F16, I64 = 1, 27  # ggml_type


class Tensor(ctypes.Structure):
    """struct ggml_tensor of the llama.cpp that is pinned."""


Tensor._fields_ = [
    ("type", ctypes.c_int32),
    ("buffer", ctypes.c_void_p),
    ("ne", ctypes.c_int64 * 4),
    ("nb", ctypes.c_size_t * 4),
    ("op", ctypes.c_int32),
    ("op_params", ctypes.c_int32 * 16),
    ("flags", ctypes.c_int32),
    ("src", ctypes.POINTER(Tensor) * 10),
    ("view_src", ctypes.POINTER(Tensor)),
    ("view_offs", ctypes.c_size_t),
    ("data", ctypes.c_void_p),
    ("name", ctypes.c_char * 64),
]


@cache
def op_name(op: int) -> str:
    """ggml's name of an operation; checks, the first time, that Tensor is laid out as ggml's."""
    function = native.library().ggml_op_name
    function.restype, function.argtypes = ctypes.c_char_p, [ctypes.c_int32]
    return function(op).decode()


def root(t: Tensor) -> Tensor:
    """The tensor that a view looks at."""
    while t.view_src:
        t = t.view_src.contents
    return t


def values(t: Tensor, dtype: type) -> np.ndarray:
    """A dense tensor's memory: (ne2, ne1, ne0), to read and to write."""
    n = t.ne[0] * t.ne[1] * t.ne[2]
    raw = (ctypes.c_uint8 * (n * np.dtype(dtype).itemsize)).from_address(t.data)
    return np.frombuffer(raw, dtype).reshape(t.ne[2], t.ne[1], t.ne[0])


def settled(first: int, last: int, window: int, block: int) -> int:
    """How many tokens are kept coded when those from first to last are read: all, or, with a window or blocks, what
    the query at first has behind its window, in whole blocks."""
    return last if not window and block == 1 else max(0, first + 1 - max(window, 1)) // block * block


class Kept:
    """One side of one layer: exact rows come in, and the cells then hold what is kept of them.

    code    what a method makes of rows
    window  tokens, of the newest, that stay exact; one that the batch itself would push out stays until the next
    block   tokens that are coded together, and stay exact until they are all there
    sink    first tokens, which stay exact
    start   tokens before the first are coded
    """

    def __init__(self, code: Code, *, window: int = 0, block: int = 1, sink: int = 0, start: int = 0) -> None:
        self.code, self.window, self.block, self.sink, self.start = code, window, block, sink, start
        self.exact = np.empty((0, 0, 0), np.float32)
        self.n_coded = 0

    def write(self, cells: np.ndarray, first: int, last: int) -> None:
        """cells (n_cells, n_head_kv, head_dim) float16, exact from first to last, as they were just written."""
        self.take(cells, first, last)
        end = settled(first, last, self.window, self.block) if first >= self.start else 0
        if end > self.n_coded:
            begin = max(self.n_coded, min(self.sink, end))
            self.put(cells, begin, self.coded(self.n_coded, end)[:, begin - self.n_coded :])
            self.n_coded = end

    def take(self, cells: np.ndarray, first: int, last: int) -> None:
        if not first:
            n_cells, n_head_kv, head_dim = cells.shape
            self.exact, self.n_coded = np.zeros((n_head_kv, n_cells, head_dim), np.float32), 0
        self.exact[:, first:last] = cells[first:last].transpose(1, 0, 2)

    def coded(self, first: int, last: int) -> np.ndarray:
        return self.code(np.ascontiguousarray(self.exact[:, first:last]), first)

    @staticmethod
    def put(cells: np.ndarray, first: int, rows: np.ndarray) -> None:
        cells[first : first + rows.shape[1]] = rows.transpose(1, 0, 2)


class LayerKeeper:
    """Both sides of one layer. A method that needs more than K and V says so and takes it.

    wants_queries  queries() gets Q of each batch, before its K and V
    wants_output   output() may overwrite what attention gave
    """

    wants_queries = wants_output = False

    def __init__(self, k: Kept, v: Kept) -> None:
        self.k, self.v, self.q = k, v, np.empty(0)

    def queries(self, q: np.ndarray) -> None:
        """q (n_head, n_tokens, head_dim) float32 after RoPE"""
        self.q = q

    def keys(self, cells: np.ndarray, first: int, last: int) -> None:
        self.k.write(cells, first, last)

    def values(self, cells: np.ndarray, first: int, last: int) -> None:
        self.v.write(cells, first, last)

    def output(self, out: np.ndarray, scale: float) -> None:
        """out (n_tokens, n_head, head_dim) float32, to be overwritten; scale is that of the scores"""

    def bits(self) -> tuple[float, float] | None:
        """Real bits of K and V as they were kept at the end of the last context; None = as the method foretells."""
        return None


class RewrittenCache:
    """Stands in a Context for a Tap: rewrites the cells of each layer by its LayerKeeper.

    n_head_kv  of every layer
    """

    handle = None

    def __init__(self, keepers: Mapping[int, LayerKeeper], n_head_kv: int) -> None:
        from llama_cpp import llama_cpp

        self._keepers, self._n_head_kv = keepers, n_head_kv
        self._error: BaseException | None = None
        self._checked = False
        self.n_seen = 0

        @called_from_c
        def callback(t: int, ask: bool, _user: object) -> bool:
            if self._error is not None:
                return not ask
            try:
                return self._node(Tensor.from_address(ctypes.cast(t, ctypes.c_void_p).value or 0), ask)
            except BaseException as e:
                self._error = e
                return False

        self.eval_callback = llama_cpp.ggml_backend_sched_eval_callback(callback)

    def check(self) -> None:
        """Raises what a keeper raised, or RuntimeError if no layer was seen."""
        if self._error is not None:
            raise self._error
        if not self.n_seen:
            raise RuntimeError("no write into a K or V cache was seen: this model's graph is not supported.")

    def _node(self, t: Tensor, ask: bool) -> bool:
        op = op_name(t.op)
        if op == "SET_ROWS":
            return self._written(t, ask)
        if op == "ROPE" and (found := re.fullmatch(rb"Qcur-(\d+)", t.name)):
            keeper = self._keepers[int(found[1])]
            if keeper.wants_queries and not ask:
                keeper.queries(values(t, np.float32).transpose(1, 0, 2).copy())
            return keeper.wants_queries or not ask
        if op == "FLASH_ATTN_EXT":
            keeper = self._keepers[_layer(t.src[1].contents)[1]]
            if keeper.wants_output and not ask:
                keeper.output(values(t, np.float32), float(np.array(t.op_params[0], np.int32).view(np.float32)))
            return keeper.wants_output or not ask
        return not ask

    def _written(self, t: Tensor, ask: bool) -> bool:
        side, il = _layer(t)
        if ask or not side:
            return bool(side) or not ask
        self._check_layout(t)
        cache, index = root(t), t.src[1].contents
        if cache.type != F16 or index.type != I64:
            raise RuntimeError(f"layer {il}: need an f16 cache of one sequence. Run without a plan.")
        cells = values(cache, np.float16).reshape(-1, self._n_head_kv, cache.ne[0] // self._n_head_kv)
        at = values(index, np.int64).reshape(-1)
        if not np.array_equal(at, np.arange(at[0], at[0] + len(at))):
            raise RuntimeError(f"layer {il}: a batch was not written into cells that follow each other.")
        keeper, self.n_seen = self._keepers[il], self.n_seen + 1
        (keeper.keys if side == "k" else keeper.values)(cells, int(at[0]), int(at[-1]) + 1)
        return True

    def _check_layout(self, t: Tensor) -> None:
        """Raises RuntimeError if struct ggml_tensor is not what Tensor says."""
        if self._checked:
            return
        function: Any = native.library().ggml_get_name
        function.restype, function.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
        if function(ctypes.addressof(t)) != ctypes.addressof(t) + Tensor.name.offset:
            raise RuntimeError("struct ggml_tensor has changed. Bring Tensor up to ggml.h.")
        self._checked = True


def _layer(t: Tensor) -> tuple[str, int]:
    """("k" or "v", layer) of the cache that a tensor looks at; ("", -1) if it looks at none."""
    found = re.fullmatch(rb"cache_([kv])_l(\d+)", root(t).name)
    return (found[1].decode(), int(found[2])) if found else ("", -1)
