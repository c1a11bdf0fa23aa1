"""Damage to GGUF files: by bytes, by the numbers that steer a reader, and by the entries of a plan."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from gguf_bytes import (
    ARRAY,
    BOOL,
    F32,
    I32,
    STRING,
    U8,
    U32,
    U64,
    array,
    entry,
    gguf,
    string,
    strings,
    tensor,
    text,
    u32,
)

from kvtuner_gguf.codecs import CODECS
from kvtuner_gguf.gguf_header import SCALARS, Header, read_header

EDGES = (
    0,
    1,
    2,
    3,
    4,
    5,
    8,
    31,
    32,
    33,
    64,
    255,
    256,
    2**15,
    2**16,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**32,
    2**48,
    2**62,
    2**63 - 1,
    2**63,
    2**64 - 32,
    2**64 - 1,
)
ARCHS = (
    "llama",
    "gemma3",
    "qwen2",
    "mamba",
    "bert",
    "t5",
    "deepseek2",
    "lfm2",
    "gpt2",
    "refact",
    "clip",
    "",
    "x" * 300,
)


@dataclass(frozen=True)
class Base:
    """A whole file that damage starts from. n_values: of K in each layer, as the vectors of a plan have it."""

    data: bytes
    header: Header
    n_values: int = 128

    @classmethod
    def of(cls, path: Path, n_values: int = 128) -> Base:
        return cls(path.read_bytes(), read_header(path), n_values)

    @property
    def entries(self) -> list[bytes]:
        return [self.data[start:end] for _, start, end in self.header.keys]

    @property
    def n_layer(self) -> int:
        return self.header.block_count or 1

    @cached_property
    def fields(self) -> list[tuple[int, str]]:
        """(offset, struct's letter) of every count, length, type and single value of the header."""
        found = [(4, "I"), (8, "Q"), (16, "Q")]
        for key, start, _ in self.header.keys:
            kind = start + 8 + len(key.encode())
            found += [(start, "Q"), (kind, "I"), *self._of_value(kind)]
        at = self.header.infos[0]
        for shard_tensor in self.header.tensors:
            dims = at + 8 + len(shard_tensor.name.encode())
            end = dims + 4 + 8 * len(shard_tensor.shape)
            found += [(at, "Q"), (dims, "I"), *((i, "Q") for i in range(dims + 4, end, 8)), (end, "I"), (end + 4, "Q")]
            at = end + 12
        return found

    def _of_value(self, kind: int) -> list[tuple[int, str]]:
        (number,) = struct.unpack_from("<I", self.data, kind)
        if number == STRING:
            return [(kind + 4, "Q")]
        if number == ARRAY:
            return [(kind + 4, "I"), (kind + 8, "Q")]
        return [(kind + 4, SCALARS[number])]


def damaged(rng: random.Random, bases: Sequence[Base]) -> bytes:
    """One of the files, or a piece of two, damaged in one to three ways."""
    base = rng.choice(bases)
    data = bytearray(rng.choice((_entries, _plan, _whole, _whole))(rng, base))
    changes: list[Callable[[random.Random, bytearray, Base], None]] = [
        _number,
        _number,
        _type,
        _flip,
        _flip,
        _fill,
        _insert,
        _cut,
    ]
    for _ in range(rng.choice((0, 1, 1, 2, 3)) if bytes(data) != base.data else rng.choice((1, 1, 2, 3))):
        rng.choice(changes)(rng, data, base)
    return _spliced(rng, data, rng.choice(bases)) if rng.random() < 0.05 else bytes(data)


def _whole(rng: random.Random, base: Base) -> bytes:
    return base.data


# ---- by bytes


def _number(rng: random.Random, data: bytearray, base: Base) -> None:
    """A count, length, type or value becomes another one."""
    at, code = rng.choice(base.fields)
    if at + struct.calcsize(code) > len(data):
        return
    size = 8 * struct.calcsize(code)
    old = int.from_bytes(data[at : at + size // 8], "little")
    new = rng.choice(
        (rng.choice(EDGES), old + rng.choice((-1, 1)), old ^ 1 << rng.randrange(size), rng.getrandbits(size))
    )
    data[at : at + size // 8] = (new % (1 << size)).to_bytes(size // 8, "little")


def _type(rng: random.Random, data: bytearray, base: Base) -> None:
    """The type of a value or a tensor becomes another one."""
    at, _ = rng.choice([field for field in base.fields if field[1] == "I"])
    if at + 4 <= len(data):
        struct.pack_into("<I", data, at, rng.randrange(45))


def _flip(rng: random.Random, data: bytearray, base: Base) -> None:
    """Bits anywhere, mostly in the header."""
    end = len(data) if rng.random() < 0.2 else min(len(data), base.header.data_offset)
    for _ in range(rng.choice((1, 1, 2, 8)) if end else 0):
        data[rng.randrange(end)] ^= 1 << rng.randrange(8)


def _fill(rng: random.Random, data: bytearray, base: Base) -> None:
    """A stretch of the header becomes zeros, ones, or noise."""
    at, n = rng.randrange(base.header.data_offset), rng.choice((1, 4, 8, 24, 100))
    part = rng.choice((bytes(n), b"\xff" * n, rng.randbytes(n)))
    data[at : at + n] = part[: max(0, len(data) - at)]


def _insert(rng: random.Random, data: bytearray, base: Base) -> None:
    """Some bytes more or less in the header."""
    at, n = rng.randrange(base.header.data_offset), rng.choice((1, 4, 8, 32))
    data[at : at + rng.choice((0, n))] = rng.choice((b"", rng.randbytes(n)))


def _cut(rng: random.Random, data: bytearray, base: Base) -> None:
    """The file ends somewhere, often right behind a number of the header."""
    where = (rng.randrange(len(data) + 1), rng.choice(base.fields)[0], base.header.data_offset, len(data) - 1)
    del data[max(0, rng.choice(where)) :]


def _spliced(rng: random.Random, data: bytes, other: Base) -> bytes:
    """The start of one file and the end of another."""
    return bytes(data[: rng.randrange(len(data) + 1)]) + other.data[rng.choice(other.fields)[0] :]


# ---- by entries


def _entries(rng: random.Random, base: Base) -> bytes:
    """Entries of the metadata, or rows of the tensor table, missing, twice, in another order or under another name."""
    kv, rows = base.entries, _rows(base)
    for _ in range(rng.choice((1, 1, 2, 4))):
        part = rng.choice((kv, kv, rows)) if rows else kv
        i, j = rng.randrange(len(part)), rng.randrange(len(part))
        rng.choice((
            lambda part=part, i=i: part.__delitem__(i) if len(part) > 1 else None,
            lambda part=part, i=i, j=j: part.insert(i, part[j]),
            lambda part=part, i=i, j=j: part.__setitem__(slice(None),
            [part[j] if n == i else part[i] if n == j else x for n, x in enumerate(part)]),
            lambda i=i, j=j: kv.__setitem__(i % len(kv), _renamed(kv[i % len(kv)], kv[j % len(kv)])),
            lambda: kv.append(_odd_entry(rng)),
            lambda: rows.append(tensor(rng.choice(("a", "token_embd.weight", "b" * 70)),
                                [rng.choice(EDGES) for _ in range(rng.randrange(6))], rng.randrange(45),
                                rng.choice(EDGES))),
        ))()  # fmt: skip
    return _file(rng, base, kv, rows)


def _rows(base: Base) -> list[bytes]:
    rows, at = [], base.header.infos[0]
    for one in base.header.tensors:
        end = at + 8 + len(one.name.encode()) + 4 + 8 * len(one.shape) + 12
        rows.append(base.data[at:end])
        at = end
    return rows


def _file(rng: random.Random, base: Base, kv: Sequence[bytes], rows: Sequence[bytes]) -> bytes:
    """The file of these parts; its head now and then claims another number of them."""
    claims = {
        name: len(parts) + rng.choice((-1, 1))
        for name, parts in (("n_kv", kv), ("n_tensors", rows))
        if parts and rng.random() < 0.05
    }
    return gguf(*kv, tensors=rows, data=base.data[base.header.data_offset :], **claims)


def _renamed(one: bytes, other: bytes) -> bytes:
    """The first entry's value under the second one's name."""
    (a,), (b,) = struct.unpack_from("<Q", one), struct.unpack_from("<Q", other)
    return other[: 8 + b] + one[8 + a :]


def _odd_entry(rng: random.Random) -> bytes:
    """An entry that steers how a file is read."""
    return rng.choice((
        lambda: u32("general.alignment", rng.choice(EDGES) % 2**32),
        lambda: string("general.architecture", rng.choice(ARCHS)),
        lambda: u32("split.count", rng.choice((0, 1, 2, 65535))),
        lambda: u32("split.no", rng.choice((0, 1, 2, 65535))),
        lambda: u32(rng.choice(("llama.block_count", "gemma3.block_count", "x.block_count")),
                    rng.choice(EDGES) % 2**32),
        lambda: entry("a", BOOL, bytes([rng.randrange(256)])),
        lambda: array("a", rng.randrange(14), rng.choice(EDGES), rng.randbytes(16)),
        lambda: string(rng.choice(("a", "", "\x00", "kvtuner.", "\x1b[2J")), b"\xff\xfe"),
    ))()  # fmt: skip


def _plan(rng: random.Random, base: Base) -> bytes:
    """The file with a plan of which some entry is not as it should be."""
    kv = [one for (key, _, _), one in zip(base.header.keys, base.entries) if not key.startswith("kvtuner.")]
    return _file(rng, base, [*kv, *odd_plan(rng, base.n_layer, base.n_values)], _rows(base))


def odd_plan(rng: random.Random, n_layer: int, n_values: int) -> list[bytes]:
    """Entries of a plan for so many layers, K of each n_values wide; most of them right."""
    names = [*CODECS]
    kv = {
        "schema_version": _u32(1),
        "type_k": _names(rng.choices(names, k=n_layer)),
        "type_v": _names(rng.choices(names, k=n_layer)),
    }
    for key, low, high in (("k_mean", -3.0, 3.0), ("k_scale", 0.25, 4.0), ("k_basis_scale", 0.001, 1.0)):
        if rng.random() < 0.5:
            has = [rng.choice((0, n_values)) for _ in range(n_layer)]
            kv[key] = _floats([rng.uniform(low, high) for _ in range(sum(has))])
            kv[f"{key}.n_values"] = _u32s(has)
    if rng.random() < 0.2:
        kv["calibration.weights"] = _text(rng.choice(("", "0123456789abcdef", "\x1b]0;x\x07", "w" * 5000)))
    for _ in range(rng.choice((0, 1, 1, 2))):
        key = rng.choice(
            (
                *kv,
                "enabled",
                "bits_per_value",
                "rival",
                "type_k.0",
                "calibration.seed",
                "k_mean",
                "k_scale.n_values",
                "k_basis",
            )
        )
        kv[key] = rng.choice(_ODD)(rng, n_layer, n_values)
    for key in rng.sample([*kv], k=rng.choice((0, 0, 0, 1, 2))):
        del kv[key]
    return [text(f"kvtuner.{key}") + value for key, value in kv.items()]


def _u32(value: int) -> bytes:
    return struct.pack("<II", U32, value)


def _text(value: str | bytes) -> bytes:
    return struct.pack("<I", STRING) + text(value)


def _names(values: Sequence[str | bytes]) -> bytes:
    return strings("", values)[8:]


def _floats(values: Sequence[float]) -> bytes:
    return array("", F32, len(values), struct.pack(f"<{len(values)}f", *values))[8:]


def _u32s(values: Sequence[int]) -> bytes:
    return array("", U32, len(values), struct.pack(f"<{len(values)}I", *values))[8:]


_ODD_NAMES = (
    "q8_0\0x",
    "q8_0\0",
    "Q8_0",
    "q9_0",
    "",
    "f16",
    "q8_0 ",
    "q4_K",
    "i32",
    "q8_1",
    "\x1b[2J",
    "q8_\udc80".encode(errors="surrogatepass"),
    "x" * 10_000,
)
_ODD_FLOATS = (float("nan"), float("inf"), -float("inf"), 0.0, -1.0, 1e-40, 3.4e38, 2.8e38, 1e5, 1e-5, -0.0)
_ODD: tuple[Callable[[random.Random, int, int], bytes], ...] = (
    lambda rng, n_layer, n: _u32(rng.choice(EDGES) % 2**32),
    lambda rng, n_layer, n: struct.pack("<IQ", U64, rng.choice(EDGES)),
    lambda rng, n_layer, n: struct.pack("<If", F32, rng.choice(_ODD_FLOATS)),
    lambda rng, n_layer, n: struct.pack("<IB", BOOL, rng.choice((0, 1, 2, 255))),
    lambda rng, n_layer, n: _text(rng.choice(_ODD_NAMES)),
    lambda rng, n_layer, n: _names([rng.choice(_ODD_NAMES) for _ in range(n_layer)]),
    lambda rng, n_layer, n: _names(["q8_0"] * rng.choice((0, 1, n_layer - 1, n_layer + 1, 2000))),
    lambda rng, n_layer, n: _names(["q8_0"] * (n_layer - 1) + [rng.choice(_ODD_NAMES)]),
    lambda rng, n_layer, n: _floats([1.0] * rng.choice((0, 1, n, n * n_layer, n * n_layer + 1, 70_000))),
    lambda rng, n_layer, n: _floats(
        [rng.choice(_ODD_FLOATS) if rng.random() < 0.01 else 1.0 for _ in range(n * n_layer)]
    ),
    lambda rng, n_layer, n: _u32s(
        [rng.choice((0, 1, n, n - 1, 2 * n, 2**32 - 1, 2**31)) for _ in range(rng.choice((0, n_layer, n_layer + 1)))]
    ),
    lambda rng, n_layer, n: array("", rng.choice((U8, I32, BOOL, U64)), 8, rng.randbytes(64))[8:],
    lambda rng, n_layer, n: array("", STRING, rng.choice(EDGES), b"")[8:],
    lambda rng, n_layer, n: array("", ARRAY, 1, array("", U8, 1, b"x")[8:])[8:],
)
