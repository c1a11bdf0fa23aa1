"""A plan read from a GGUF file, and written into one without touching anything else."""

from __future__ import annotations

import os
import re
import struct
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO, cast

from .atomic import atomic_file
from .errors import PlanError
from .gguf_header import ARRAY, GGUF, INT8, SCALARS, STRING, Header, Parser, read_header
from .plan import PREFIX, Plan
from .reading import StrPath, opened
from .room import need, write_errors
from .target import check_place, check_writable
from .values import blamed_on

_CHUNK = 16 << 20
_NUMBERS = {"u32": 4, "f32": 6}  # of GGUF's value types
_SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL)


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
    with opened(src, GGUF) as file:
        with blamed_on(src):
            header = Parser(file).header(PREFIX)
            _check_first_shard(src, header)
            if plan is not None:
                _check_layers(plan, header)
        parts = _spliced(header, plan)
        with write_errors(
            target, _n_bytes(parts), "What was there is unchanged. Make room, or write elsewhere with -o."
        ):
            in_place = target.name == src.name and os.path.samefile(target.parent, src.parent)
            check_target(target, in_place, header, overwrite)
            if not in_place or plan is not None or any(_is_ours(key) for key, _, _ in header.keys):
                need(target.parent, _n_bytes(parts))
                with atomic_file(target, like=os.fstat(file.fileno())) as out:
                    # past the buffer: what is written by hand and by the kernel must not overtake each other
                    raw = cast("BinaryIO", out.raw)
                    _copy(file, parts, raw)
                    _check_copy(raw, header, plan)
                    file.close()  # Windows cannot rename over an open file
    return target


def write_plan_alone(plan: Plan, path: StrPath) -> None:
    """Write a GGUF of nothing but a plan, for KVTUNER_GGUF_PLAN."""
    rows = [_encoded(*row) for row in plan.to_metadata()]
    Path(path).write_bytes(b"".join([b"GGUF", struct.pack("<IQQ", 3, 0, len(rows)), *rows]))


def weights_hash(path: StrPath) -> str:
    """16 hex digits that name the tensors of a model: FNV-1a 64 over their names, types and shapes.

    Per tensor, in bytewise order of the names: name, NUL, type name, NUL, the four dimensions joined by commas,
    newline. Of a split model all shards count. The run-time computes the same. Raises PlanError for a missing
    shard or a type that we have no name for.
    """
    header = read_header(path)
    tensors = list(header.tensors)
    if header.split_count > 1:
        tensors = [t for shard in _all_shards(path, header) for t in read_header(shard).tensors]
    digest = 0xCBF29CE484222325
    for tensor in sorted(tensors, key=lambda t: t.name.encode()):
        if not tensor.type_name:
            raise PlanError(f"{path}: {tensor.name!r:.80} has a type that is not known here. Update kvtuner-gguf.")
        shape = ",".join(str(n) for n in (*tensor.shape, 1, 1, 1, 1)[:4])
        for byte in f"{tensor.name}\0{tensor.type_name}\0{shape}\n".encode():
            digest = (digest ^ byte) * 0x100000001B3 & 0xFFFFFFFFFFFFFFFF
    return f"{digest:016x}"


# ---- checks before a write


def _is_ours(key: str) -> bool:
    return key.startswith(PREFIX)


def _check_layers(plan: Plan, header: Header) -> None:
    if not header.block_count:
        raise PlanError(f"has no {header.arch + '.block_count'!r:.80}, need a language model. Check the path.")
    if plan.n_layer != header.block_count:
        raise PlanError(f"has {header.block_count} layers, the plan {plan.n_layer}. Calibrate this model again.")


def shard_paths(path: StrPath, header: Header) -> list[Path]:
    """The files of a model by the name of one, NAME-00001-of-00003.gguf and so on; itself if it is not split. Raises
    PlanError."""
    if header.split_count <= 1:
        return [Path(path)]
    match, n = _SHARD.fullmatch(Path(path).name), header.split_count
    if not match or int(match[3]) != n:
        raise PlanError(f"{path}: a shard of {n}, need a name in -00001-of-{n:05}.gguf. Rename it.")
    return [Path(path).with_name(f"{match[1]}-{i:05}-of-{match[3]}.gguf") for i in range(1, n + 1)]


def _all_shards(path: StrPath, header: Header) -> list[Path]:
    """Likewise. Raises PlanError if one is missing."""
    shards = shard_paths(path, header)
    for shard in shards:
        if not shard.exists():
            raise PlanError(
                f"{path}: {shard.name} is missing, need all {header.split_count}. Put it beside the others."
            )
    return shards


def first_shard(path: StrPath) -> Header:
    """The header of a model that can hold a plan. Raises PlanError for a shard that is not the first, and as
    read_header."""
    header = read_header(path)
    with blamed_on(path):
        _check_first_shard(path, header)
    return header


def _check_first_shard(path: StrPath, header: Header) -> None:
    if header.split_no:
        match = _SHARD.fullmatch(Path(path).name)
        first = f"{match[1] if match else 'NAME'}-00001-of-{header.split_count:05}.gguf"
        raise PlanError(f"is shard {header.split_no + 1} of {header.split_count}, need the first. Give {first}.")


def check_target(target: Path, in_place: bool, header: Header, overwrite: bool) -> None:
    """Raises PlanError if a model must not be written there; see write_plan."""
    check_place(target)
    if in_place:
        check_writable(target)
    elif target.exists() and not (overwrite and target.is_file()):
        raise PlanError(f"{target}: exists already. Delete it first, or choose another name with -o.")
    shard = f"-00001-of-{header.split_count:05}.gguf"
    if not in_place and header.split_count > 1 and not target.name.endswith(shard):
        raise PlanError(f"{target}: a first shard, need a name that ends in {shard}. Choose such a name with -o.")


# ---- writing


def _spliced(header: Header, plan: Plan | None) -> list[bytes | tuple[int, int]]:
    """The new file in order: bytes, or (first byte, end) of what is taken over from the old one."""
    new = [_encoded(*row) for row in plan.to_metadata()] if plan is not None else []
    kept = [(start, end) for key, start, end in header.keys if not _is_ours(key)]
    parts: list[bytes | tuple[int, int]]
    parts = [(0, 16), struct.pack("<Q", len(kept) + len(new)), *kept, *new, header.infos]  # magic, version, n_tensors
    if header.tensors:
        parts.append(bytes(-_n_bytes(parts) % header.alignment))
    return [*parts, (header.data_offset, header.file_bytes)]


def _n_bytes(parts: list[bytes | tuple[int, int]]) -> int:
    return sum(len(part) if isinstance(part, bytes) else part[1] - part[0] for part in parts)


def _encoded(key: str, kind: str, value: Any) -> bytes:
    if kind == "arr_str":
        body = struct.pack("<IIQ", ARRAY, STRING, len(value)) + b"".join(map(_encoded_str, value))
    elif kind == "arr_i8":
        body = struct.pack("<IIQ", ARRAY, INT8, len(value)) + value
    elif kind.startswith("arr_"):
        number = _NUMBERS[kind[4:]]
        body = struct.pack(f"<IIQ{len(value)}{SCALARS[number]}", ARRAY, number, len(value), *value)
    elif kind == "str":
        body = struct.pack("<I", STRING) + _encoded_str(value)
    else:
        number = _NUMBERS[kind]
        body = struct.pack("<I" + SCALARS[number], number, value)
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
        copy = Parser(file).header(PREFIX)
    moved = copy.data_offset - header.data_offset
    tensors = tuple(replace(tensor, offset=tensor.offset + moved) for tensor in header.tensors)
    others = [[key for key, _, _ in h.keys if not _is_ours(key)] for h in (copy, header)]
    same_size = copy.file_bytes - copy.data_offset == header.file_bytes - header.data_offset
    if copy.tensors != tensors or others[0] != others[1] or not same_size or Plan.from_metadata(copy.metadata) != plan:
        raise AssertionError("the copy does not read back as it was written; the old file is unchanged")
