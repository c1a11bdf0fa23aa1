"""GGUF files byte by byte, which can be as faulty as a test needs them."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path

from kvtuner_gguf.gguf_header import read_header

# numbers of GGUF's value types
U8, I8, I32, U32, F32, BOOL, STRING, ARRAY, U64 = 0, 1, 5, 4, 6, 7, 8, 9, 10


def text(value: str | bytes) -> bytes:
    """A string as it stands in a file: its length, then its bytes."""
    data = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(data)) + data


def entry(key: str, kind: int, body: bytes) -> bytes:
    """One metadata entry as it stands in the file."""
    return text(key) + struct.pack("<I", kind) + body


def u32(key: str, value: int) -> bytes:
    return entry(key, U32, struct.pack("<I", value))


def string(key: str, value: str | bytes) -> bytes:
    return entry(key, STRING, text(value))


def array(key: str, kind: int, n: int, body: bytes) -> bytes:
    return entry(key, ARRAY, struct.pack("<IQ", kind, n) + body)


def strings(key: str, values: Sequence[str | bytes]) -> bytes:
    return array(key, STRING, len(values), b"".join(map(text, values)))


def tensor(name: str = "a", shape: Sequence[int] = (32,), kind: int = 0, offset: int = 0) -> bytes:
    """One row of the tensor table."""
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def gguf(
    *kv: bytes,
    tensors: Sequence[bytes] = (),
    n_kv: int | None = None,
    n_tensors: int | None = None,
    version: int = 3,
    data: bytes = b"",
) -> bytes:
    """A whole file of these entries and tensors; n_kv and n_tensors are what its head claims, if that is not how many
    there are."""
    n_kv, n_tensors = len(kv) if n_kv is None else n_kv, len(tensors) if n_tensors is None else n_tensors
    head = b"GGUF" + struct.pack("<IQQ", version, n_tensors, n_kv) + b"".join((*kv, *tensors))
    return head + bytes(-len(head) % 32) + data


def with_entries(src: Path, dst: Path, entries: Sequence[bytes]) -> Path:
    """src with these entries added to its metadata."""
    header, data = read_header(src), src.read_bytes()
    first, end = header.infos
    (n_kv,) = struct.unpack_from("<Q", data, 16)
    head = data[:16] + struct.pack("<Q", n_kv + len(entries)) + data[24:first] + b"".join(entries) + data[first:end]
    dst.write_bytes(head + bytes(-len(head) % header.alignment) + data[header.data_offset :])
    return dst
