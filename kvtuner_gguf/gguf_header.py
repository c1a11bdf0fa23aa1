"""The header of a GGUF file, read with bounds.

Not with the gguf package: that one needs seconds and hundreds of MB for a large vocabulary, follows any count that a
broken file claims, and does not know the newest tensor types. Layout: ggml/docs/gguf.md.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

from .errors import PlanError
from .plan import PREFIX
from .reading import StrPath, opened
from .values import blamed_on

GGUF = "a GGUF file"

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
INT8, STRING, ARRAY = 1, 8, 9
_NEEDED = ("general.architecture", "general.alignment", "split.no", "split.count")
# ggml type number -> name as ggml_type_name gives it, values in a block, bytes of a block
TENSOR_TYPES = {
    0: ("f32", 1, 4), 1: ("f16", 1, 2), 30: ("bf16", 1, 2), 28: ("f64", 1, 8),
    24: ("i8", 1, 1), 25: ("i16", 1, 2), 26: ("i32", 1, 4), 27: ("i64", 1, 8),
    2: ("q4_0", 32, 18), 3: ("q4_1", 32, 20), 6: ("q5_0", 32, 22), 7: ("q5_1", 32, 24),
    8: ("q8_0", 32, 34), 9: ("q8_1", 32, 36), 10: ("q2_K", 256, 84), 11: ("q3_K", 256, 110),
    12: ("q4_K", 256, 144), 13: ("q5_K", 256, 176), 14: ("q6_K", 256, 210), 15: ("q8_K", 256, 292),
    16: ("iq2_xxs", 256, 66), 17: ("iq2_xs", 256, 74), 22: ("iq2_s", 256, 82), 18: ("iq3_xxs", 256, 98),
    21: ("iq3_s", 256, 110), 19: ("iq1_s", 256, 50), 29: ("iq1_m", 256, 56), 20: ("iq4_nl", 32, 18),
    23: ("iq4_xs", 256, 136), 34: ("tq1_0", 256, 54), 35: ("tq2_0", 256, 66), 39: ("mxfp4", 32, 17),
    40: ("nvfp4", 64, 36), 41: ("q1_0", 128, 18), 42: ("q2_0", 64, 18),
}  # fmt: skip
_BUDGET = 1 << 26  # what a header may cost, in bytes as _spend counts them; 262,144 tokens with merges cost 15 MB
_BLOCK = 1 << 20  # bytes that are read at once
_LENGTH = struct.Struct("<Q")
MOST_ALIGNMENT = 16 << 20


@dataclass(frozen=True)
class Tensor:
    """shape as in the file, fastest dimension first; offset and n_bytes in the file."""

    name: str
    type_name: str
    shape: tuple[int, ...]
    offset: int
    n_bytes: int


@dataclass(frozen=True)
class Header:
    """What stands before the tensor data of a GGUF, and where.

    arch          general.architecture, "" in shards after the first
    block_count   layers, those for multi-token prediction included; None if the file does not say
    split_no      number of this shard from 0, split_count shards in all (1 = not split)
    keys          (name, first byte, end) of each metadata entry, in file order
    infos         first byte and end of the tensor table
    metadata      the values that were asked for, key -> Python value
    """

    arch: str
    block_count: int | None
    split_no: int
    split_count: int
    alignment: int
    keys: tuple[tuple[str, int, int], ...]
    infos: tuple[int, int]
    data_offset: int
    file_bytes: int
    tensors: tuple[Tensor, ...]
    metadata: Mapping[str, object]


def read_header(path: StrPath, prefix: str = PREFIX) -> Header:
    """The header of a GGUF, with the metadata whose keys start with prefix.

    Raises PlanError for a file that is missing, is no little-endian GGUF of version 2 or 3, or is cut off.
    """
    with opened(path, GGUF) as file, blamed_on(path):
        return Parser(file).header(prefix)


class Parser:
    """Reads a header from its start. No count is believed before the file is seen to be long enough for it."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.size = os.fstat(file.fileno()).st_size
        self.pos = 0
        self.left = _BUDGET
        self.what = "the header"

    def header(self, prefix: str) -> Header:
        n_tensors, n_kv = self._counts()
        keys, values = self._metadata(n_kv, prefix)
        alignment = values.get("general.alignment", 32)
        if type(alignment) is not int or not 0 < alignment <= MOST_ALIGNMENT or alignment & (alignment - 1):
            raise PlanError(f"general.alignment: got {alignment!r:.60}, need a power of two. Get the file again.")
        table = self.pos
        entries = self._tensor_table(n_tensors)
        data_offset = -(-self.pos // alignment) * alignment if n_tensors else self.pos
        arch = values.get("general.architecture", "")
        return Header(
            arch=arch if isinstance(arch, str) else "",
            block_count=_whole(values, f"{arch}.block_count", None),
            split_no=_whole(values, "split.no", 0) or 0,
            split_count=_whole(values, "split.count", 1) or 0,
            alignment=alignment,
            keys=keys,
            infos=(table, self.pos),
            data_offset=data_offset,
            file_bytes=self.size,
            tensors=tuple(self._tensor(data_offset, *entry) for entry in entries),
            metadata=values,
        )

    def _counts(self) -> tuple[int, int]:
        magic = self._bytes(min(4, self.size))
        if magic != b"GGUF":
            raise PlanError(f"not a GGUF: starts with {magic!r}, need b'GGUF'. Check the path.")
        version = self._unpack("I")
        if version & 0xFFFF == 0:
            raise PlanError(f"big-endian GGUF (version {version:#x}), need little-endian. Convert the model again.")
        if version not in (2, 3):
            raise PlanError(f"GGUF version {version}, need 2 or 3. Convert the model again with a current llama.cpp.")
        n_tensors, n_kv = self._unpack("Q"), self._unpack("Q")
        for n, what, least in ((n_kv, "metadata keys", 13), (n_tensors, "tensors", 24)):
            if n > self.size // least:
                raise PlanError(f"claims {n} {what}, need fewer in {self.size} bytes. Get the file again.")
        return n_tensors, n_kv

    def _metadata(self, n_kv: int, prefix: str) -> tuple[tuple[tuple[str, int, int], ...], dict[str, object]]:
        keys: dict[str, tuple[str, int, int]] = {}
        values = {}
        for i in range(n_kv):
            self._spend(256)
            start, self.what = self.pos, f"metadata key {i}"
            key = self._string()
            self.what = f"metadata key {key!r:.80}"
            if key in keys:
                raise PlanError(f"{self.what} stands twice, need it once. Get the file again.")
            wanted = key in _NEEDED or key.startswith(prefix) or key.endswith(".block_count")
            value = self._value(self._unpack("I"), wanted)
            if wanted:
                values[key] = value
            keys[key] = (key, start, self.pos)
        return tuple(keys.values()), values

    def _value(self, kind: int, wanted: bool) -> object:
        if kind in SCALARS:
            return self._unpack(SCALARS[kind])
        if kind == STRING:
            if wanted:
                return self._string()
            self._skip(self._unpack("Q"))
            return None
        if kind == ARRAY:
            return self._array(self._unpack("I"), self._unpack("Q"), wanted)
        raise PlanError(f"{self.what} has the value type {kind}, need 0 to 12. Get the file again.")

    def _array(self, kind: int, n: int, wanted: bool) -> list[object] | bytes | None:
        if kind not in SCALARS and kind != STRING:
            raise PlanError(f"{self.what} is an array of type {kind}, need scalars or strings. Get the file again.")
        code = SCALARS.get(kind, "Q")  # a string has at least its length
        n_bytes = n * struct.calcsize("<" + code)
        self._need(n_bytes)
        if kind != STRING and not wanted:
            self._skip(n_bytes)
            return None
        if kind == INT8:  # millions of them, which a list would make eight times as large
            self._spend(n)
            return self._bytes(n)
        self._spend(8 * n)
        if kind != STRING:
            return list(struct.unpack(f"<{n}{code}", self._bytes(n_bytes)))
        if wanted:
            return [self._string() for _ in range(n)]
        self._skip_strings(n)
        return None

    def _tensor_table(self, n_tensors: int) -> list[tuple[str, tuple[int, ...], int, int]]:
        entries = {}
        for i in range(n_tensors):
            self._spend(256)
            self.what = f"tensor {i}"
            name = self._string()
            self.what = f"tensor {name!r:.80}"
            if name in entries:
                raise PlanError(f"{self.what} stands twice, need it once. Get the file again.")
            n_dims = self._unpack("I")
            if n_dims > 4:
                raise PlanError(f"{self.what} has {n_dims} dimensions, need 4 at most. Get the file again.")
            shape = struct.unpack(f"<{n_dims}Q", self._bytes(8 * n_dims))
            entries[name] = (name, shape, self._unpack("I"), self._unpack("Q"))
        return list(entries.values())

    def _tensor(self, data_offset: int, name: str, shape: tuple[int, ...], kind: int, offset: int) -> Tensor:
        # a type newer than we are: size not known
        type_name, block_size, type_size = TENSOR_TYPES.get(kind, ("", 1, 0))
        tensor = Tensor(name, type_name, shape, data_offset + offset, math.prod(shape) // block_size * type_size)
        end = tensor.offset + tensor.n_bytes
        if end > self.size:
            raise PlanError(f"cut off: tensor {name!r:.80} ends at {end}, the file at {self.size}. Get the file again.")
        return tensor

    def _need(self, n: int) -> None:
        if self.pos + n > self.size:
            raise PlanError(f"cut off: {self.what} needs {n} bytes at {self.pos} of {self.size}. Get the file again.")

    def _bytes(self, n: int) -> bytes:
        self._need(n)
        self.pos += n
        data = self.file.read(n)
        if len(data) < n:
            raise PlanError(f"got {len(data)} of {n} bytes at {self.pos - n}: it is being changed. Try again later.")
        return data

    def _skip(self, n: int) -> None:
        self._need(n)
        self.pos += n
        if n < 4096:
            self.file.read(n)  # within the buffer, faster than seek
        else:
            self.file.seek(self.pos)

    def _skip_strings(self, n: int) -> None:
        """By blocks, and without a call for each: a vocabulary has hundreds of thousands."""
        block, start, at, length = b"", self.pos, 0, _LENGTH.unpack_from
        for _ in range(n):
            if at + 8 > len(block):
                start, at = start + at, 0
                self.pos = start
                self._need(8)
                self.file.seek(start)
                block = self._bytes(min(_BLOCK, self.size - start))
            n_bytes = length(block, at)[0]
            at += 8 + n_bytes
            if start + at > self.size:
                self.pos = start + at - n_bytes
                self._need(n_bytes)
        self.pos = start + at
        self.file.seek(self.pos)

    def _unpack(self, code: str) -> Any:
        return struct.unpack("<" + code, self._bytes(struct.calcsize("<" + code)))[0]

    def _string(self) -> str:
        n = self._unpack("Q")
        self._need(n)
        self._spend(n)
        try:
            return self._bytes(n).decode()
        except UnicodeDecodeError as err:
            raise PlanError(f"{self.what}: not UTF-8 at byte {err.start} of a string. Get the file again.") from err

    def _spend(self, n: int) -> None:
        self.left -= n
        if self.left < 0:
            raise PlanError(f"{self.what}: the header is larger than any model needs. Get the file again.")


def _whole(values: Mapping[str, object], key: str, default: int | None) -> int | None:
    value = values.get(key, default)
    if value is not default and type(value) is not int:
        raise PlanError(f"{key}: got {value!r:.60}, need a whole number. Get the file again.")
    return value
