"""GGUF files: what stands in one, and a plan written into it without touching anything else.

The header is read here, not with the gguf package: that one needs seconds and hundreds of MB for a large vocabulary,
follows any count that a broken file claims, and does not know the newest tensor types. Layout: ggml/docs/gguf.md.
"""

from __future__ import annotations

import errno
import math
import os
import re
import shutil
import stat
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from .errors import PlanError
from .plan import PREFIX, Plan, atomic_file, blamed_on

StrPath = str | os.PathLike[str]

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_NEEDED = ("general.architecture", "general.alignment", "split.no", "split.count")
# ggml type number -> name as ggml_type_name gives it, values in a block, bytes of a block
_TYPES = {
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
_CHUNK = 16 << 20
_SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL)


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
    with _opened(path) as file, blamed_on(path):
        return _Parser(file).header(prefix)


def read_metadata(path: StrPath, prefix: str = PREFIX) -> dict[str, object]:
    """The metadata whose keys start with prefix, key -> Python value. Raises PlanError like read_header."""
    return {k: v for k, v in read_header(path, prefix).metadata.items() if k.startswith(prefix)}


def read_plan(path: StrPath) -> Plan | None:
    """The plan in a GGUF, None if there is none. Raises PlanError for a fault in the file or in the plan."""
    header = read_header(path)
    with blamed_on(path):
        _check_first_shard(path, header)
        plan = Plan.from_metadata(header.metadata)
        if plan is not None:
            _check_layers(plan, header)
        return plan


def write_plan(src: StrPath, plan: Plan | None, dst: StrPath | None = None, *, overwrite: bool = False) -> Path:
    """Write src with this plan (None = with no plan) to dst, or in place, and return where it now stands.

    Every other key, the tensor table and the tensor data are copied byte for byte. The file is built beside its
    target, synced and renamed: at any moment the target is the old file or the new one, whole. For a split model
    src is the first shard. Raises PlanError, with the old file as it was: see read_header; a plan for another
    number of layers; no space; no permission; a target that is a symbolic link, or another file that exists
    already (unless overwrite).
    """
    src = Path(src)
    target = src if dst is None else Path(dst)
    with _opened(src) as file:
        with blamed_on(src):
            header = _Parser(file).header(PREFIX)
            _check_first_shard(src, header)
            if plan is not None:
                _check_layers(plan, header)
        parts = _spliced(header, plan)
        with _write_errors(target, _n_bytes(parts)):
            in_place = target.name == src.name and os.path.samefile(target.parent, src.parent)
            _check_target(target, in_place, header, overwrite)
            if not in_place or plan is not None or any(_is_ours(key) for key, _, _ in header.keys):
                if shutil.disk_usage(target.parent).free < _n_bytes(parts):
                    raise OSError(errno.ENOSPC, "no space left")
                with atomic_file(target, like=os.fstat(file.fileno())) as out:
                    _copy(file, parts, out)
                    _check_copy(out, header, plan)
                    file.close()  # Windows cannot rename over an open file
    return target


def weights_hash(path: StrPath) -> str:
    """16 hex digits that name the tensors of a model: FNV-1a 64 over their names, types and shapes.

    Per tensor, in bytewise order of the names: name, NUL, type name, NUL, the four dimensions joined by commas,
    newline. Of a split model all shards count. The run-time computes the same. Raises PlanError for a missing
    shard or a type that we have no name for.
    """
    header = read_header(path)
    tensors = list(header.tensors)
    if header.split_count > 1:
        tensors = [t for shard in _shard_paths(path, header.split_count) for t in read_header(shard).tensors]
    digest = 0xCBF29CE484222325
    for tensor in sorted(tensors, key=lambda t: t.name.encode()):
        if not tensor.type_name:
            raise PlanError(f"{path}: {tensor.name!r:.80} has a type that is not known here. Update kvtuner-gguf.")
        shape = ",".join(str(n) for n in (tensor.shape + (1, 1, 1, 1))[:4])
        for byte in f"{tensor.name}\0{tensor.type_name}\0{shape}\n".encode():
            digest = (digest ^ byte) * 0x100000001B3 & 0xFFFFFFFFFFFFFFFF
    return f"{digest:016x}"


# ---- reading


class _Parser:
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
        if type(alignment) is not int or not 0 < alignment <= _CHUNK or alignment & (alignment - 1):
            raise PlanError(f"general.alignment: got {alignment!r:.60}, need a power of two. Get the file again.")
        table = self.pos
        entries = self._tensor_table(n_tensors)
        data_offset = -(-self.pos // alignment) * alignment if n_tensors else self.pos
        arch = values.get("general.architecture", "")
        return Header(
            arch=arch if isinstance(arch, str) else "",
            block_count=_whole(values, f"{arch}.block_count", None),
            split_no=_whole(values, "split.no", 0),
            split_count=_whole(values, "split.count", 1),
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
        if kind in _SCALARS:
            return self._unpack(_SCALARS[kind])
        if kind == _STRING:
            return self._string() if wanted else self._skip(self._unpack("Q"))
        if kind == _ARRAY:
            return self._array(self._unpack("I"), self._unpack("Q"), wanted)
        raise PlanError(f"{self.what} has the value type {kind}, need 0 to 12. Get the file again.")

    def _array(self, kind: int, n: int, wanted: bool) -> list[object] | None:
        if kind not in _SCALARS and kind != _STRING:
            raise PlanError(f"{self.what} is an array of type {kind}, need scalars or strings. Get the file again.")
        code = _SCALARS.get(kind, "Q")  # a string has at least its length
        n_bytes = n * struct.calcsize("<" + code)
        self._need(n_bytes)
        if kind != _STRING and not wanted:
            return self._skip(n_bytes)
        self._spend(8 * n)
        if kind != _STRING:
            return list(struct.unpack(f"<{n}{code}", self._bytes(n_bytes)))
        if wanted:
            return [self._string() for _ in range(n)]
        for _ in range(n):
            self._skip(self._unpack("Q"))
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
        type_name, block_size, type_size = _TYPES.get(kind, ("", 1, 0))  # a type newer than we are: size not known
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

    def _unpack(self, code: str) -> int | float | bool:
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


@contextmanager
def _opened(path: StrPath) -> Iterator[BinaryIO]:
    """The file, open for reading; PlanError if it is no regular file, or cannot be opened or read."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would wait for ever
            raise PlanError(f"{path}: is a folder or a device, need a GGUF file. Check the path.")
        with open(path, "rb", buffering=1 << 20) as file:
            yield file
    except OSError as err:
        raise PlanError(f"{path}: cannot be read ({err.strerror}). Check the path and its permissions.") from err


# ---- checks before a write


def _is_ours(key: str) -> bool:
    return key.startswith(PREFIX)


def _check_layers(plan: Plan, header: Header) -> None:
    if not header.block_count:
        raise PlanError(f"has no {header.arch + '.block_count'!r:.80}, need a language model. Check the path.")
    if plan.n_layer != header.block_count:
        raise PlanError(f"has {header.block_count} layers, the plan {plan.n_layer}. Calibrate this model again.")


def _shard_paths(path: StrPath, split_count: int) -> list[Path]:
    """The shards of a model by their names, NAME-00001-of-00003.gguf and so on. Raises PlanError if one is missing."""
    match = _SHARD.fullmatch(Path(path).name)
    if not match or int(match[3]) != split_count:
        raise PlanError(f"{path}: a shard of {split_count}, need a name in -00001-of-{split_count:05}.gguf. Rename it.")
    shards = [Path(path).with_name(f"{match[1]}-{i:05}-of-{match[3]}.gguf") for i in range(1, split_count + 1)]
    for shard in shards:
        if not shard.exists():
            raise PlanError(f"{path}: {shard.name} is missing, need all {split_count}. Put it beside the others.")
    return shards


def _check_first_shard(path: StrPath, header: Header) -> None:
    if header.split_no:
        match = _SHARD.fullmatch(Path(path).name)
        first = f"{match[1] if match else 'NAME'}-00001-of-{header.split_count:05}.gguf"
        raise PlanError(f"is shard {header.split_no + 1} of {header.split_count}, need the first. Give {first}.")


def _check_target(target: Path, in_place: bool, header: Header, overwrite: bool) -> None:
    if target.is_symlink():  # a rename would put a file where the link is, and leave what it points to as it was
        real = os.path.realpath(target)
        raise PlanError(f"{target}: is a symbolic link to {real}. Give that path, or write a new file with -o.")
    if in_place and not (os.stat(target).st_mode & 0o222 and os.access(target, os.W_OK)):
        raise PlanError(f"{target}: is read-only. Allow writing to it, or write a new file with -o.")
    if target.exists() and not in_place and not (overwrite and target.is_file()):
        raise PlanError(f"{target}: exists already. Delete it first, or choose another name with -o.")
    shard = f"-00001-of-{header.split_count:05}.gguf"
    if not in_place and header.split_count > 1 and not target.name.endswith(shard):
        raise PlanError(f"{target}: a first shard, need a name that ends in {shard}. Choose such a name with -o.")


# ---- writing


def _spliced(header: Header, plan: Plan | None) -> list[bytes | tuple[int, int]]:
    """The new file in order: bytes, or (first byte, end) of what is taken over from the old one."""
    new = [_encoded(*row) for row in plan.to_metadata()] if plan is not None else []
    kept = [(start, end) for key, start, end in header.keys if not _is_ours(key)]
    parts = [(0, 16), struct.pack("<Q", len(kept) + len(new)), *kept, *new, header.infos]  # magic, version, n_tensors
    if header.tensors:
        parts.append(bytes(-_n_bytes(parts) % header.alignment))
    return [*parts, (header.data_offset, header.file_bytes)]


def _n_bytes(parts: list[bytes | tuple[int, int]]) -> int:
    return sum(len(part) if isinstance(part, bytes) else part[1] - part[0] for part in parts)


def _encoded(key: str, kind: str, value: object) -> bytes:
    if kind == "arr_str":
        body = struct.pack("<IIQ", _ARRAY, _STRING, len(value)) + b"".join(map(_encoded_str, value))
    elif kind == "str":
        body = struct.pack("<I", _STRING) + _encoded_str(value)
    else:
        number = {"u32": 4, "f32": 6}[kind]
        body = struct.pack("<I" + _SCALARS[number], number, value)
    return _encoded_str(key) + body


def _encoded_str(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def _copy(file: BinaryIO, parts: list[bytes | tuple[int, int]], out: BinaryIO) -> None:
    before = os.fstat(file.fileno())
    for part in parts:
        if isinstance(part, bytes):
            _write(out, part)
        else:
            _copy_range(file, *part, out)
    after = os.fstat(file.fileno())
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise PlanError(f"{file.name}: was changed by another program while it was copied. Try again when it is done.")


def _copy_range(file: BinaryIO, pos: int, end: int, out: BinaryIO) -> None:
    """Append the bytes from pos to end to out: by the kernel, which may share blocks, then what it leaves by hand."""
    with suppress(AttributeError, OSError):  # not on this system, or not between these disks
        while n := os.copy_file_range(file.fileno(), out.fileno(), min(end - pos, _CHUNK), offset_src=pos):
            pos += n
    file.seek(pos)
    while data := file.read(min(end - pos, _CHUNK)):
        _write(out, data)
        pos += len(data)


def _write(out: BinaryIO, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[out.write(view) :]


def _check_copy(out: BinaryIO, header: Header, plan: Plan | None) -> None:
    """Read the new header back before it replaces the old: an error here is ours, and must cost no model."""
    out.seek(0)
    with open(out.fileno(), "rb", buffering=1 << 20, closefd=False) as file:
        copy = _Parser(file).header(PREFIX)
    moved = copy.data_offset - header.data_offset
    tensors = tuple(replace(tensor, offset=tensor.offset + moved) for tensor in header.tensors)
    others = [[key for key, _, _ in h.keys if not _is_ours(key)] for h in (copy, header)]
    same_size = copy.file_bytes - copy.data_offset == header.file_bytes - header.data_offset
    if copy.tensors != tensors or others[0] != others[1] or not same_size or Plan.from_metadata(copy.metadata) != plan:
        raise AssertionError("the copy does not read back as it was written; the old file is unchanged")


@contextmanager
def _write_errors(target: Path, n_bytes: int) -> Iterator[None]:
    try:
        yield
    except OSError as err:
        why = err.strerror
        if err.errno in (errno.ENOSPC, errno.EDQUOT):
            why = f"no space: {shutil.disk_usage(target.parent).free >> 20} MiB free"
        raise PlanError(
            f"{target}: not written ({why}), need {-(-n_bytes >> 20)} MiB in {target.parent} and the right to write. "
            "What was there is unchanged. Make room, or write elsewhere with -o."
        ) from err
