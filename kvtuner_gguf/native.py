"""The one file that talks to C: finds the patched libllama, and mirrors kvt.h."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from .errors import CodecError, NativeError
from .printable import printable
from .reading import is_regular

VARIABLE = "LLAMA_CPP_LIB_PATH"  # llama-cpp-python's own
LLAMA_CPP_COMMIT = "0c1e57098"  # of the pinned source

_KVT_E_TYPE, _KVT_E_NONE = -2, -3
_K_MEAN, _K_SCALE, _K_BASIS = 1, 2, 4
_OMP_PAUSE_HARD = 2  # end the calling thread's pool: a child of fork would wait for its threads, which it has not got


def _package_lib_dir() -> Path | None:
    """Where the package's own libraries are; in an editable install they lie beside the built package."""
    for folder in sys.modules[__package__].__path__:
        if any((Path(folder) / "lib").glob("*llama.*")):
            return Path(folder) / "lib"
    return None


def lib_dir() -> Path:
    """The folder of the patched libllama. Raises NativeError if the package holds none.

    LLAMA_CPP_LIB_PATH, llama-cpp-python's own variable, names another build of it.
    """
    folder = os.environ.get(VARIABLE)
    found = Path(folder) if folder else _package_lib_dir()
    if found is None:
        raise NativeError(
            "kvtuner_gguf: this package holds no built library. Install it with 'pip install .' in its source folder."
        )
    return found


def check_our_library() -> None:
    """Raises NativeError if llama_cpp has loaded another library than ours, which import_hook has it load."""
    if "llama_cpp.llama_cpp" not in sys.modules:
        return
    folder, loaded = lib_dir(), Path(sys.modules["llama_cpp.llama_cpp"]._lib._name).resolve().parent
    if loaded != folder.resolve():
        raise NativeError(
            f"llama_cpp was imported first and loaded the library in {loaded}, the plan needs the one in {folder}. "
            "Import kvtuner_gguf before llama_cpp."
        )


class FileName(str):
    """A path that llama_cpp, which encodes it as UTF-8, hands on as the file system has it: a name may hold bytes that
    are no UTF-8."""

    def encode(self, encoding: str = "utf-8", errors: str = "strict") -> bytes:
        return os.fsencode(str(self))


def model_file(path: str | os.PathLike[str]) -> FileName:
    """The path of a model. Raises NativeError if it is no file: a pipe would be waited for without end."""
    with suppress(OSError):  # nothing is there: llama.cpp says so
        if not is_regular(path):
            raise NativeError(f"model '{path}' is a folder or a device, need a GGUF file. Check the path.")
    return FileName(os.fsdecode(path))


class TapNode(ctypes.Structure):
    """struct kvt_tap_node: one attention node, valid during the callback only."""

    _fields_ = [
        *((name, ctypes.c_int32) for name in ("il", "n_q", "n_kv", "n_head", "n_head_kv", "head_dim_k", "head_dim_v")),
        *((name, ctypes.c_float) for name in ("scale", "max_bias", "logit_softcap")),
        ("q", ctypes.POINTER(ctypes.c_float)),
        ("k", ctypes.POINTER(ctypes.c_uint16)),
        ("v", ctypes.POINTER(ctypes.c_uint16)),
        ("mask", ctypes.POINTER(ctypes.c_float)),
        ("sinks", ctypes.POINTER(ctypes.c_float)),
        ("out", ctypes.POINTER(ctypes.c_float)),
    ]


class LayerStruct(ctypes.Structure):
    """struct kvt_layer_cache: a layer as allocated, a LayerCache in C."""

    _fields_ = [
        ("type_k", ctypes.c_char_p),
        ("type_v", ctypes.c_char_p),
        ("bytes_k", ctypes.c_uint64),
        ("bytes_v", ctypes.c_uint64),
        ("n_cells", ctypes.c_uint32),
        ("rot_k", ctypes.c_int32),
        ("rot_v", ctypes.c_int32),
    ]


class MemoryStruct(ctypes.Structure):
    """struct kvt_memory: a Memory in C."""

    _fields_ = [("weights", ctypes.c_uint64), ("cache", ctypes.c_uint64), ("compute", ctypes.c_uint64)]


class HostStruct(ctypes.Structure):
    """struct kvt_rpc_host."""

    _fields_ = [("n_devices", ctypes.c_int32), ("free", ctypes.c_uint64), ("total", ctypes.c_uint64)]


TapCallback = ctypes.CFUNCTYPE(None, ctypes.POINTER(TapNode), ctypes.c_void_p)

_ptr, _str, _i32, _i64 = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int32, ctypes.c_int64
_strs = ctypes.POINTER(ctypes.c_char_p)
_SIGNATURES = {
    "kvt_build_id": (_str, []),
    "kvt_last_error": (_str, []),
    "kvt_type_name": (_str, [_i32]),
    "kvt_type_number": (_i32, [_str]),
    "kvt_row_bytes": (_i64, [_str, _i64]),
    "kvt_encode": (_i32, [_str, _ptr, _i64, _i64, _ptr]),
    "kvt_decode": (_i32, [_str, _ptr, _i64, _i64, _ptr]),
    "kvt_model_n_layer": (_i32, [_ptr]),
    "kvt_model_n_pos": (_i32, [_ptr]),
    "kvt_model_kv_values": (_i64, [_ptr]),
    "kvt_model_rope": (_i32, [_ptr, _i32, _ptr, _ptr]),
    "kvt_model_set_plan": (_i32, [_ptr, _strs, _strs, _i32]),
    "kvt_model_set_k_vectors": (_i32, [_ptr, _i32, _ptr, _ptr, _i32]),
    "kvt_model_set_k_basis": (_i32, [_ptr, _i32, _ptr, _i32, _ptr, _i32]),
    "kvt_model_set_plan_weights": (_i32, [_ptr, _str]),
    "kvt_model_weights_hash": (_str, [_ptr]),
    "kvt_model_fingerprint": (_i32, [_ptr, _ptr]),
    "kvt_model_clear_plan": (_i32, [_ptr]),
    "kvt_model_plan_source": (_str, [_ptr]),
    "kvt_model_plan_layer": (_i32, [_ptr, _i32, _strs, _strs]),
    "kvt_model_plan_notes": (_i32, [_ptr, _ptr, _i32]),
    "kvt_ctx_layer": (_i32, [_ptr, _i32, ctypes.POINTER(LayerStruct)]),
    "kvt_ctx_k_cond": (_i32, [_ptr, _i32]),
    "kvt_ctx_holds": (_i32, [_ptr, _i32, _i32]),
    "kvt_ctx_buffer_bytes": (ctypes.c_uint64, [_ptr]),
    "kvt_ctx_memory": (_i32, [_ptr, ctypes.POINTER(MemoryStruct)]),
    "kvt_ctx_notes": (_i32, [_ptr, _ptr, _i32]),
    "kvt_tap_new": (_ptr, [TapCallback, _ptr, _i32]),
    "kvt_tap_free": (None, [_ptr]),
    "kvt_tap_enable": (None, [_ptr, ctypes.c_bool]),
    "kvt_tap_error": (_str, [_ptr]),
    "kvt_tap_share": (_i32, [_ptr, _i32, _ptr]),
    "kvt_hidden_new": (_ptr, [_ptr, _i32, _i32, _i64, _i32]),
    "kvt_hidden_free": (None, [_ptr]),
    "kvt_hidden_keep": (None, [_ptr]),
    "kvt_hidden_start": (_i32, [_ptr, _i32, _i64]),
    "kvt_hidden_taken": (_i64, [_ptr]),
    "kvt_rpc_use": (_i32, [_str, ctypes.POINTER(HostStruct)]),
    "kvt_ctx_lost_host": (_str, [_ptr]),
    "kvt_rpc_serve": (_i32, [_str, _str, _i32]),
}


@cache
def library() -> ctypes.CDLL:
    """libllama with kvt.h's functions typed.

    Raises NativeError if the library that llama_cpp loaded is not the patched one, or is of another series.
    """
    check_our_library()
    from llama_cpp import llama_cpp

    lib = llama_cpp._lib
    if not hasattr(lib, "kvt_build_id"):
        raise NativeError(
            f"{lib._name}: this libllama is not the patched one. Unset LLAMA_CPP_LIB_PATH, or point it at ours."
        )
    for name, (restype, argtypes) in _SIGNATURES.items():
        function = getattr(lib, name, None)
        if function is None:
            raise NativeError(
                f"{lib._name}: has no {name}, so it is of another version than this package. Install kvtuner-gguf "
                "again."
            )
        function.restype, function.argtypes = restype, argtypes
    _check_build_id(Path(lib._name).parent, lib.kvt_build_id().decode())
    if hasattr(os, "register_at_fork") and hasattr(lib, "omp_pause_resource_all"):
        os.register_at_fork(before=lambda: lib.omp_pause_resource_all(_OMP_PAUSE_HARD))
    return lib


def _check_build_id(folder: Path, have: str) -> None:
    stamp = folder / "build_id.txt"
    want = stamp.read_text().strip() if stamp.exists() else have
    if have != want:
        raise NativeError(
            f"{folder}: the library is of build {have}, the package of {want}. Install kvtuner-gguf again."
        )


def build_id() -> str:
    """Names what the library was built from: the pinned source, the series of patches, native/."""
    return library().kvt_build_id().decode()


def eval_callback(name: str) -> object:
    """A function of kvt.h as a context's cb_eval."""
    from llama_cpp import llama_cpp

    address = ctypes.cast(getattr(library(), name), ctypes.c_void_p).value
    return llama_cpp.ggml_backend_sched_eval_callback(address or 0)


def last_error() -> str:
    return library().kvt_last_error().decode(errors="replace")


def check(code: int) -> int:
    """The code, if it is none of an error. Raises NativeError (CodecError for a type) with the library's text."""
    if code >= 0:
        return code
    raise (CodecError if code == _KVT_E_TYPE else NativeError)(last_error())


def _text(call: Callable[..., int], handle: int) -> list[str]:
    """The lines that a kvt_*_notes function writes."""
    size = call(handle, None, 0) + 1
    buf = ctypes.create_string_buffer(size)
    call(handle, buf, size)
    return [printable(line) for line in buf.value.decode(errors="replace").split("\n") if line]


def type_names() -> tuple[str, ...]:
    """The cache types that the library knows, from the most to the least precise."""
    names, i = [], 0
    while (name := library().kvt_type_name(i)) is not None:
        names.append(name.decode())
        i += 1
    return tuple(names)


def type_number(name: str) -> int:
    """ggml's number of a cache type, for llama_cpp's type_k and type_v. Raises CodecError."""
    return check(library().kvt_type_number(name.encode()))


def type_name_of(number: int) -> str:
    """The name of a cache type by ggml's number, of which most are no cache types. Raises CodecError."""
    numbers = {type_number(name): name for name in type_names()}
    if number not in numbers:
        known = ", ".join(f"{name} {n}" for n, name in numbers.items())
        raise CodecError(f"type {number}: is no cache type. Use one of: {known}.")
    return numbers[number]


def encode(type_name: str, x: np.ndarray) -> np.ndarray:
    """The run time's own bytes of rows. (n_rows, n_per_row) float32 -> (n_rows, row_bytes) uint8. Raises CodecError."""
    lib, x = library(), np.ascontiguousarray(x, dtype=np.float32)
    n_rows, n_per_row = x.shape
    out = np.empty((n_rows, _row_bytes(type_name, n_per_row)), dtype=np.uint8)
    check(lib.kvt_encode(type_name.encode(), x.ctypes.data, n_rows, n_per_row, out.ctypes.data))
    return out


def decode(type_name: str, data: np.ndarray, n_per_row: int) -> np.ndarray:
    """(n_rows, row_bytes) uint8 -> (n_rows, n_per_row) float32. Raises CodecError."""
    lib, data = library(), np.ascontiguousarray(data, dtype=np.uint8)
    if data.shape[1] != _row_bytes(type_name, n_per_row):
        raise CodecError(
            f"{type_name}: {data.shape[1]} bytes per row, {n_per_row} values need {_row_bytes(type_name, n_per_row)}."
        )
    out = np.empty((len(data), n_per_row), dtype=np.float32)
    check(lib.kvt_decode(type_name.encode(), data.ctypes.data, len(data), n_per_row, out.ctypes.data))
    return out


def _row_bytes(type_name: str, n_per_row: int) -> int:
    n_bytes = library().kvt_row_bytes(type_name.encode(), n_per_row)
    if n_bytes < 0:
        raise CodecError(last_error())
    return n_bytes


def round_trip(type_name: str, x: np.ndarray) -> np.ndarray:
    """What the cache holds after a write and a read. (n_rows, n_per_row) float32 -> same shape."""
    return decode(type_name, encode(type_name, x), x.shape[1])


@dataclass(frozen=True)
class LayerCache:
    """What a context has allocated for one layer.

    bytes_k bytes_v  of the tensors     n_cells  cells, all streams
    rot_k rot_v      block of the Hadamard rotation, 0 = not rotated
    k_mean k_scale   whether a mean is taken off K, and a scale
    k_basis          whether K is in a basis, instead of rotated
    """

    il: int
    type_k: str
    type_v: str
    bytes_k: int
    bytes_v: int
    n_cells: int
    rot_k: int
    rot_v: int
    k_mean: bool = False
    k_scale: bool = False
    k_basis: bool = False


@dataclass(frozen=True)
class Memory:
    """Bytes of a context, on all devices.

    weights  of its model
    cache    K and V with the vectors of K in force, and the states of recurrent layers
    compute  buffers that it computes in
    """

    weights: int
    cache: int
    compute: int

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.compute


def n_layer(model: int) -> int:
    """Layers that a plan of this model has."""
    return check(library().kvt_model_n_layer(model))


def n_positions(model: int) -> int | None:
    """Rows of the table of positions that the model learned, beyond which it cannot read; None if it has none."""
    return check(library().kvt_model_n_pos(model)) or None


def kv_values(model: int) -> int:
    """Values of K and V that a token has at most, all layers together."""
    return check(library().kvt_model_kv_values(model))


def rope(model: int, il: int) -> tuple[int, bool]:
    """(channels of a head that RoPE turns, whether a pair is half of them apart; else neighbours)."""
    n_rot, far = ctypes.c_int32(), ctypes.c_bool()
    check(library().kvt_model_rope(model, il, ctypes.byref(n_rot), ctypes.byref(far)))
    return n_rot.value, far.value


def set_plan(model: int, type_k: Sequence[str], type_v: Sequence[str]) -> None:
    """Plan for contexts created from now on. Raises NativeError or CodecError."""
    array = ctypes.c_char_p * len(type_k)
    names_k, names_v = array(*(t.encode() for t in type_k)), array(*(t.encode() for t in type_v))
    check(library().kvt_model_set_plan(model, names_k, names_v, len(type_k)))


def set_k_vectors(model: int, il: int, mean: Sequence[float], scale: Sequence[float]) -> None:
    """Mean and scale of a layer's K, () = none, in the plan that is set already. Raises NativeError."""
    sides = [np.array(x, dtype=np.float32) for x in (mean, scale)]
    if len({x.size for x in sides if x.size}) > 1:
        raise NativeError(f"layer {il}: {len(mean)} means of K, {len(scale)} scales, need as many of both, or none.")
    pointers = [x.ctypes.data if x.size else None for x in sides]
    check(library().kvt_model_set_k_vectors(model, il, *pointers, max(x.size for x in sides)))


def set_k_basis(model: int, il: int, basis: bytes, basis_scale: Sequence[float]) -> None:
    """Basis of a layer's K, as KVectors holds it, in the plan that is set already, after `set_k_vectors`. Raises
    NativeError."""
    rows, scale = np.frombuffer(basis, dtype=np.int8), np.array(basis_scale, dtype=np.float32)
    check(library().kvt_model_set_k_basis(model, il, rows.ctypes.data, rows.size, scale.ctypes.data, scale.size))


def set_plan_weights(model: int, weights: str) -> None:
    """The weights that the plan, which is set already, was calibrated on; others than the model's make a note. Raises
    NativeError."""
    check(library().kvt_model_set_plan_weights(model, weights.encode()))


def weights_hash(model: int) -> str:
    """What gguf_file.weights_hash says of the model's file."""
    return library().kvt_model_weights_hash(model).decode()


def fingerprint(model: int) -> str:
    """16 hex digits that name the weights of a model by their values."""
    value = ctypes.c_uint64()
    check(library().kvt_model_fingerprint(model, ctypes.byref(value)))
    return f"{value.value:016x}"


def clear_plan(model: int) -> None:
    check(library().kvt_model_clear_plan(model))


def plan_source(model: int) -> str:
    """'file', 'override', 'api', or 'none'."""
    return library().kvt_model_plan_source(model).decode()


def plan_layers(model: int) -> list[tuple[str, str]] | None:
    """The planned (type_k, type_v) of each layer; None if no plan is in force."""
    k, v = ctypes.c_char_p(), ctypes.c_char_p()
    layers = []
    for il in range(n_layer(model)):
        if library().kvt_model_plan_layer(model, il, ctypes.byref(k), ctypes.byref(v)) == _KVT_E_NONE:
            return None
        layers.append(((k.value or b"").decode(), (v.value or b"").decode()))
    return layers


def plan_notes(model: int) -> list[str]:
    """What was wrong with the plan in the file or the overrides, one line each."""
    return _text(library().kvt_model_plan_notes, model)


def ctx_layers(model: int, ctx: int) -> list[LayerCache]:
    """The layers that have KV of their own in this context, as allocated."""
    layer, layers = LayerStruct(), []
    for il in range(n_layer(model)):
        code = library().kvt_ctx_layer(ctx, il, ctypes.byref(layer))
        if code == _KVT_E_NONE:
            continue
        check(code)
        cond = check(library().kvt_ctx_k_cond(ctx, il))
        names = layer.type_k.decode(), layer.type_v.decode()
        numbers = layer.bytes_k, layer.bytes_v, layer.n_cells, layer.rot_k, layer.rot_v
        layers.append(LayerCache(il, *names, *numbers, *(bool(cond & bit) for bit in (_K_MEAN, _K_SCALE, _K_BASIS))))
    return layers


def ctx_holds(ctx: int, seq_id: int, pos: int) -> bool:
    """Whether the context holds all that a token of the sequence at pos builds on. Raises NativeError."""
    return bool(check(library().kvt_ctx_holds(ctx, seq_id, pos)))


def ctx_buffer_bytes(ctx: int) -> int:
    """Bytes of the buffers behind the context's attention caches."""
    return library().kvt_ctx_buffer_bytes(ctx)


def ctx_memory(ctx: int) -> Memory:
    """What the context takes; of a model without tensors, what it would take."""
    found = MemoryStruct()
    check(library().kvt_ctx_memory(ctx, ctypes.byref(found)))
    return Memory(found.weights, found.cache, found.compute)


def ctx_notes(ctx: int) -> list[str]:
    """Every fallback from the plan in this context, one line each."""
    return _text(library().kvt_ctx_notes, ctx)


def rpc_use(endpoint: str) -> tuple[int, int, int]:
    """(devices, free bytes, all bytes) of a host, which models loaded from now on use. Raises NativeError."""
    host = HostStruct()
    check(library().kvt_rpc_use(endpoint.encode(), ctypes.byref(host)))
    return host.n_devices, host.free, host.total


def lost_host(ctx: int) -> str | None:
    """host:port of one that the context's model has lost."""
    host = library().kvt_ctx_lost_host(ctx)
    return host and printable(host.decode(errors="replace"))


def rpc_serve(endpoint: str, cache: str | None, n_threads: int) -> None:
    """Be a host, until the process ends. Raises NativeError."""
    check(library().kvt_rpc_serve(endpoint.encode(), os.fsencode(cache) if cache else None, n_threads))
