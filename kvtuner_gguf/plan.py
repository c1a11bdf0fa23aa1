"""A plan: the K type and the V type of every layer, what it was measured to cost, and how it was made."""

from __future__ import annotations

import json
import math
import os
import re
import secrets
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import accumulate, chain, groupby, zip_longest
from numbers import Integral, Real
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, ClassVar

from .codecs import codec
from .errors import CodecError, PlanError

PREFIX = "kvtuner."
_QUALITY = (("kld_mean", "f32"), ("kld_p999", "f32"), ("same_top", "f32"), ("n_positions", "u32"))
# The one list of what a plan stores: key after PREFIX, kind of value, where it stands in a Plan.
# calibration.* follows it, with the kind of each value's own type. JSON has the same keys, without PREFIX.
_FIELDS = (
    ("schema_version", "u32", "schema_version"),
    ("type_k", "arr_str", "type_k"),
    ("type_v", "arr_str", "type_v"),
    ("k_mean", "arr_f32", "k_mean"),
    ("k_mean.n_values", "arr_u32", "k_mean_n_values"),
    ("k_scale", "arr_f32", "k_scale"),
    ("k_scale.n_values", "arr_u32", "k_scale_n_values"),
    ("bits_per_value", "f32", "bits_per_value"),
    *((key, kind, f"quality.{key}") for key, kind in _QUALITY),
    ("rival", "str", "rival"),
    ("rival.bits_per_value", "f32", "rival_bits"),
    *((f"rival.{key}", kind, f"rival_quality.{key}") for key, kind in _QUALITY),
)
_CALIBRATION = "calibration."
_CALIBRATION_KEY = re.compile(r"[a-z0-9_]+(\.[a-z0-9_]+)*")
_LAYERS = re.compile(r"(\d{1,9})(?:-(\d{1,9}))?:(\w+)", re.ASCII)
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")  # would garble a terminal, or has no UTF-8
_MAX_JSON_BYTES = 64 << 20  # types of a thousand layers are 30 KB; vectors of 80 layers of 64 heads, 128 channels each, 16 MB
K_SCALE_RANGE = (1e-4, 1e4)  # the run time's


@dataclass(frozen=True, order=True)
class Pair:
    """The ggml type names of one layer's K and V; both empty for a layer that has no KV of its own."""

    type_k: str
    type_v: str

    def __post_init__(self) -> None:
        for name in (self.type_k, self.type_v):
            if name:
                codec(name)

    def __str__(self) -> str:
        return f"{self.type_k}/{self.type_v}"

    @classmethod
    def parse(cls, text: str) -> Pair:
        """'q8_0/q4_0' -> Pair; one name stands for both sides. Raises PlanError or CodecError."""
        names = text.split("/")
        if len(names) == 1:
            names *= 2
        if len(names) != 2 or not all(names):
            raise PlanError(f"pair '{text}': need K/V, for example q8_0/q4_0, or one type for both.")
        return cls(*names)


def allocated_pairs(layers: Iterable[Any], n_layer: int) -> tuple[Pair, ...]:
    """One pair per layer from what a context has allocated (native.LayerCache); none for a layer without KV of its own."""
    found = {layer.il: Pair(layer.type_k, layer.type_v or layer.type_k) for layer in layers}
    return tuple(found.get(il, Pair("", "")) for il in range(n_layer))


@dataclass(frozen=True)
class KVectors:
    """How one layer's K is conditioned: cached as (K - mean) / scale, after RoPE, and Q multiplied by scale. See native/kvt-cond.h.

    mean scale  n_head_kv * head_dim values each, head after head, kept as f32; () = none
    Raises PlanError for lengths that differ, a value that is no finite number, a scale out of K_SCALE_RANGE.
    """

    mean: tuple[float, ...] = ()
    scale: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for key in ("mean", "scale"):
            object.__setattr__(self, key, tuple(_checked(f"k_{key}", "arr_f32", list(getattr(self, key)))))
        if self.mean and self.scale and len(self.mean) != len(self.scale):
            raise PlanError(f"k_mean: got {len(self.mean)} values, k_scale has {len(self.scale)}, need the same. Calibrate again.")
        low, high = K_SCALE_RANGE
        if self.scale and not (min(self.scale) >= low and max(self.scale) <= high):
            raise PlanError(f"k_scale: got {min(self.scale):g} to {max(self.scale):g}, need {low:g} to {high:g}. Calibrate again.")

    def __bool__(self) -> bool:
        return bool(self.mean or self.scale)


@dataclass(frozen=True)
class Geometry:
    """How many values a model caches: what a plan's bytes are computed from.

    values_k values_v  cached values of each layer at n_ctx (cells times row); 0 where a layer has no KV of its own
    n_ctx              tokens of context at which they are counted
    """

    values_k: tuple[int, ...]
    values_v: tuple[int, ...]
    n_ctx: int

    @property
    def n_layer(self) -> int:
        return len(self.values_k)

    def bytes(self, pairs: tuple[Pair, ...], k_vectors: Iterable[KVectors] = ()) -> int:
        """Bytes of the cache with these pairs, and of the vectors. Raises PlanError if there is not one pair per layer."""
        if len(pairs) != self.n_layer:
            raise PlanError(f"plan has {len(pairs)} layers, the model has {self.n_layer}. Calibrate this model again.")
        total = vector_bytes(k_vectors)
        for pair, n_k, n_v in zip(pairs, self.values_k, self.values_v):
            total += codec(pair.type_k or "f16").row_bytes(n_k) if n_k else 0
            total += codec(pair.type_v or "f16").row_bytes(n_v) if n_v else 0
        return total

    def bits_per_value(self, pairs: tuple[Pair, ...], k_vectors: Iterable[KVectors] = ()) -> float:
        """Real bits per cached value, scales and vectors included, averaged over all cached values."""
        n_values = sum(self.values_k) + sum(self.values_v)
        return 8 * self.bytes(pairs, k_vectors) / n_values if n_values else 0.0


@dataclass(frozen=True)
class Quality:
    """How far the output is from that of an f16 cache, on held-out text.

    kld_mean kld_p999  mean and 99.9 % quantile of the KL divergence, in nats, kept as f32 (as the file keeps them)
    same_top           share of the positions whose most likely token is the same, 0 to 1
    n_positions        positions measured; 0 = not recorded
    Raises PlanError for a value that is no finite number, or out of its range.
    """

    kld_mean: float
    kld_p999: float
    same_top: float
    n_positions: int = 0

    def __post_init__(self) -> None:
        for key, kind in _QUALITY:
            object.__setattr__(self, key, _checked(key, kind, getattr(self, key)))
        if not 0 <= self.same_top <= 1:
            raise PlanError(f"same_top: got {self.same_top}, need a share from 0 to 1. Measure again.")


@dataclass(frozen=True)
class Plan:
    """The pair of every layer, what it was measured to cost, and how it was made.

    pairs           one per layer, as many as the model's block_count
    bits_per_value  real bits, scales included, averaged over the cached values at the calibrated context
    quality         measured on held-out text
    rival ...       the best uniform pair at the same bytes, its quality, its bits per value
    k_vectors       how each layer's K is conditioned, one per layer; () = no layer's is
    calibration     how it was made (text, text_sha256, tokens, n_ctx, seed, version, ...), str or u32; read-only

    Floats are kept as f32, so that a plan is equal to itself read back from either form.
    Raises PlanError for no layers, a layer with one type only, figures of a rival that is not named, a value
    that the file format cannot hold.
    """

    pairs: tuple[Pair, ...]
    bits_per_value: float | None = None
    quality: Quality | None = None
    rival: Pair | None = None
    rival_quality: Quality | None = None
    rival_bits: float | None = None
    calibration: Mapping[str, str | int] = field(default_factory=dict, hash=False)
    k_vectors: tuple[KVectors, ...] = ()
    schema_version: ClassVar[int] = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "pairs", tuple(self.pairs))
        object.__setattr__(self, "k_vectors", tuple(self.k_vectors) if any(self.k_vectors) else ())
        for key in ("bits_per_value", "rival_bits"):
            if getattr(self, key) is not None:
                object.__setattr__(self, key, _checked(key, "f32", getattr(self, key)))
        self._check_pairs()
        for key in self.calibration:
            if not isinstance(key, str) or not _CALIBRATION_KEY.fullmatch(key):
                raise PlanError(f"calibration key {key!r:.60}: need words of a-z, 0-9, _ joined by dots. Rename it.")
        made = {k: _checked(_CALIBRATION + k, _calibration_kind(v), v) for k, v in self.calibration.items()}
        object.__setattr__(self, "calibration", MappingProxyType(made))

    def _check_pairs(self) -> None:
        if not self.pairs:
            raise PlanError("plan: got 0 layers, need one pair per layer of the model. Calibrate again.")
        for il, pair in enumerate(self.pairs):
            if bool(pair.type_k) != bool(pair.type_v):
                raise PlanError(f"layer {il}: got '{pair}', need a type on both sides or on none. Add the other type.")
        if self.k_vectors and len(self.k_vectors) != self.n_layer:
            raise PlanError(f"k_vectors: got {len(self.k_vectors)} layers, the plan has {self.n_layer}. Calibrate again.")
        if self.rival is None and (self.rival_quality is not None or self.rival_bits is not None):
            raise PlanError("rival: got its figures without its pair, need both. Name the pair, or drop the figures.")
        if self.rival is not None and not (self.rival.type_k and self.rival.type_v):
            raise PlanError(f"rival: got '{self.rival}', need a type on both sides, for example q4_0/q4_0.")

    def __reduce__(self) -> tuple[object, ...]:
        return Plan.from_json, (self.to_json(),)  # a mappingproxy cannot be pickled or copied

    @property
    def n_layer(self) -> int:
        return len(self.pairs)

    @property
    def type_k(self) -> tuple[str, ...]:
        return tuple(pair.type_k for pair in self.pairs)

    @property
    def type_v(self) -> tuple[str, ...]:
        return tuple(pair.type_v for pair in self.pairs)

    @property
    def k_mean(self) -> tuple[float, ...] | None:
        """The means of all layers, one after another; None if there are none."""
        return _joined(v.mean for v in self.k_vectors)

    @property
    def k_scale(self) -> tuple[float, ...] | None:
        """The scales of all layers, one after another; None if there are none."""
        return _joined(v.scale for v in self.k_vectors)

    @property
    def k_mean_n_values(self) -> tuple[int, ...] | None:
        """How many values of k_mean each layer has, 0 = none."""
        return tuple(len(v.mean) for v in self.k_vectors) if self.k_mean else None

    @property
    def k_scale_n_values(self) -> tuple[int, ...] | None:
        """How many values of k_scale each layer has, 0 = none."""
        return tuple(len(v.scale) for v in self.k_vectors) if self.k_scale else None

    @property
    def vector_bytes(self) -> int:
        """Bytes of the vectors of K, which bits_per_value counts too."""
        return vector_bytes(self.k_vectors)

    @classmethod
    def uniform(cls, pair: Pair, n_layer: int, has_kv: Sequence[bool] | None = None) -> Plan:
        """One pair on every layer; none where has_kv, one flag per layer, is false."""
        flags = [True] * n_layer if has_kv is None else has_kv
        if len(flags) != n_layer:
            raise PlanError(f"has_kv: got {len(flags)} flags, need {n_layer}, one per layer. Pass block_count flags.")
        return cls(tuple(pair if flag else Pair("", "") for flag in flags))

    @staticmethod
    def parse_layers(text: str, n_layer: int) -> tuple[str, ...]:
        """'0-1:q8_0,2-25:q4_0' -> the type names of one side, one per layer; f16 where no range names the layer.

        Ranges include both ends. Raises PlanError for anything else, with the faulty part.
        """
        types: dict[int, str] = {}
        for part in text.split(","):
            match = _LAYERS.fullmatch(part.strip())
            if not match:
                raise PlanError(f"layers '{part}': need FIRST-LAST:TYPE or LAYER:TYPE, for example 0-1:q8_0,2-25:q4_0.")
            first, last = int(match[1]), int(match[2] or match[1])
            if first > last:
                raise PlanError(f"layers '{part}': starts at {first}, after its end {last}. Write {last}-{first}.")
            if last >= n_layer:
                raise PlanError(f"layers '{part}': the model has {n_layer} layers. Use 0 to {n_layer - 1}.")
            with blamed_on(f"layers '{part}'"):
                codec(match[3])
            for il in range(first, last + 1):
                if il in types:
                    raise PlanError(f"layers '{part}': layer {il} is already {types[il]}. Give each layer once.")
                types[il] = match[3]
        return tuple(types.get(il, "f16") for il in range(n_layer))

    def runs(self) -> list[tuple[int, int, Pair]]:
        """Neighbours with equal pairs as (first layer, last layer, pair), in layer order."""
        groups = (list(group) for _, group in groupby(enumerate(self.pairs), key=lambda item: item[1]))
        return [(group[0][0], group[-1][0], group[0][1]) for group in groups]

    def to_metadata(self) -> list[tuple[str, str, object]]:
        """The plan as GGUF metadata: (key, kind, value), kind one of u32, f32, str, arr_str, arr_f32, arr_u32."""
        rows = []
        for key, kind, where in _FIELDS:
            value: object = self
            for name in where.split("."):
                value = getattr(value, name, None)
            if value is not None:
                rows.append((key, kind, str(value) if kind == "str" else list(value) if kind.startswith("arr_") else value))
        rows += ((_CALIBRATION + key, _calibration_kind(value), value) for key, value in self.calibration.items())
        return [(PREFIX + key, kind, value) for key, kind, value in rows]

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, object]) -> Plan | None:
        """The plan in GGUF metadata (key -> Python value), None if it has no kvtuner.type_k and no kvtuner.type_v.

        Keys that this version does not know are left out. Raises PlanError for any fault.
        """
        values = {key[len(PREFIX) :]: value for key, value in metadata.items() if key.startswith(PREFIX)}
        return cls._from_values(values) if "type_k" in values or "type_v" in values else None

    @classmethod
    def _from_values(cls, values: Mapping[str, object]) -> Plan:
        if values.get("schema_version") != cls.schema_version:
            raise PlanError(
                f"schema_version: got {_brief(values.get('schema_version'))}, this version reads {cls.schema_version}. "
                "Update kvtuner-gguf, or calibrate again."
            )
        found = {where: _checked(key, kind, values[key]) for key, kind, where in _FIELDS if key in values}
        with blamed_on("rival"):
            rival = Pair.parse(found["rival"][:80]) if "rival" in found else None
        return cls(
            pairs=_pairs(found.get("type_k"), found.get("type_v")),
            bits_per_value=found.get("bits_per_value"),
            quality=_quality(found, "quality"),
            rival=rival,
            rival_quality=_quality(found, "rival_quality"),
            rival_bits=found.get("rival_bits"),
            k_vectors=_k_vectors(found),
            calibration={k[len(_CALIBRATION) :]: v for k, v in values.items() if k.startswith(_CALIBRATION)},
        )

    def to_json(self) -> str:
        """The sidecar's text: the keys of to_metadata without their prefix, one to a line, however long its array."""
        rows = ((json.dumps(text, ensure_ascii=False) for text in (key[len(PREFIX) :], value)) for key, _, value in self.to_metadata())
        return "{\n" + ",\n".join("  " + ": ".join(row) for row in rows) + "\n}\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> Plan:
        """The plan of a sidecar's text. Raises PlanError for any fault."""
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as err:
            raise PlanError(f"plan: not JSON ({err}). Write it with 'kvtuner-gguf', or correct it there.") from err
        if not isinstance(values, dict):
            raise PlanError(f"plan: got JSON {_brief(values)}, need an object with type_k and type_v. Calibrate again.")
        return cls._from_values(values)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the sidecar in one step: the file is the old one or the new one. Raises PlanError."""
        try:
            with atomic_file(Path(path).resolve()) as out:
                out.write(self.to_json().encode())
        except (OSError, RuntimeError) as err:  # RuntimeError: a loop of links, before Python 3.13
            raise PlanError(f"{path}: plan not written ({err}). Choose a folder that can be written.") from err

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read a sidecar. Raises PlanError, which starts with the path."""
        try:
            with open(path, "rb") as file:
                data = file.read(_MAX_JSON_BYTES + 1)
        except OSError as err:
            raise PlanError(f"{path}: plan not read ({err.strerror}). Check the path.") from err
        if data[:4] == b"GGUF":
            raise PlanError(f"{path}: is a GGUF model, need a plan's JSON. Give it as the model.")
        if len(data) > _MAX_JSON_BYTES:
            raise PlanError(f"{path}: more than {_MAX_JSON_BYTES >> 20} MiB, too large for a plan. Check the path.")
        with blamed_on(path):
            return cls.from_json(data)


def _pairs(type_k: list[str] | None, type_v: list[str] | None) -> tuple[Pair, ...]:
    for key, names in (("type_k", type_k), ("type_v", type_v)):
        if names is None:
            raise PlanError(f"{key}: is missing, need one type name per layer. Calibrate again.")
        for il, name in enumerate(names):
            with blamed_on(f"{key}: layer {il}"):
                codec(name[:32] or "f16")  # a known name is shorter; none is a layer without KV of its own
    if len(type_k) != len(type_v):
        raise PlanError(f"type_v: got {len(type_v)} layers, type_k has {len(type_k)}, need the same. Calibrate again.")
    return tuple(map(Pair, type_k, type_v))


def _k_vectors(found: Mapping[str, Any]) -> tuple[KVectors, ...]:
    sides: list[list[list[float]]] = []
    for key in ("k_mean", "k_scale"):
        values, n_values = found.get(key), found.get(f"{key}_n_values")
        if (values is None) != (n_values is None):
            raise PlanError(f"{key}: got it without its n_values or the other way round, need both. Calibrate again.")
        if values is not None and sum(n_values) != len(values):
            raise PlanError(f"{key}: got {len(values)} values, {key}.n_values adds up to {sum(n_values)}. Calibrate again.")
        ends = list(accumulate(n_values or ()))
        sides.append([values[end - n : end] for n, end in zip(n_values or (), ends)])
    mean, scale = sides
    if mean and scale and len(mean) != len(scale):
        raise PlanError(f"k_scale.n_values: got {len(scale)} layers, k_mean.n_values has {len(mean)}, need the same. Calibrate again.")
    vectors = []
    for il, (m, s) in enumerate(zip_longest(mean, scale, fillvalue=())):
        with blamed_on(f"layer {il}"):
            vectors.append(KVectors(tuple(m), tuple(s)))
    return tuple(vectors)


def _joined(parts: Iterable[tuple[float, ...]]) -> tuple[float, ...] | None:
    return tuple(chain.from_iterable(parts)) or None


def vector_bytes(k_vectors: Iterable[KVectors]) -> int:
    """Bytes of the vectors as a plan stores them."""
    return 4 * sum(len(v.mean) + len(v.scale) for v in k_vectors)


def where_quantized(k_vectors: Sequence[KVectors], pairs: Sequence[Pair]) -> tuple[KVectors, ...]:
    """The vectors of the layers whose K is quantized; elsewhere they would cost time and change nothing."""
    return tuple(v if p.type_k and codec(p.type_k).block_size > 1 else KVectors() for v, p in zip(k_vectors, pairs))


@contextmanager
def blamed_on(where: object) -> Iterator[None]:
    """Turns a CodecError or PlanError of the block into a PlanError that starts with where."""
    try:
        yield
    except (CodecError, PlanError) as err:
        raise PlanError(f"{where}: {err}") from err


def _quality(found: Mapping[str, object], name: str) -> Quality | None:
    values = {where[len(name) + 1 :]: value for where, value in found.items() if where.startswith(name + ".")}
    missing = [key for key, kind in _QUALITY if kind == "f32" and key not in values]
    if values and missing:
        raise PlanError(f"{name}: {', '.join(missing)} missing, need all figures or none. Calibrate again.")
    return Quality(**values) if values else None


def _calibration_kind(value: object) -> str:
    return "str" if isinstance(value, str) else "u32"


def _checked(key: str, kind: str, value: object) -> object:
    """The value as it is stored, or PlanError if it is not of this kind."""
    if kind == "arr_str" and isinstance(value, (list, tuple)) and all(map(_is_text, value)):
        return list(value)
    if kind == "arr_f32" and isinstance(value, (list, tuple)):
        return [_checked(key, "f32", x) for x in value]
    if kind == "arr_u32" and isinstance(value, (list, tuple)):
        return [_checked(key, "u32", x) for x in value]
    if kind == "str" and _is_text(value):
        return value
    if kind == "u32" and isinstance(value, Integral) and not isinstance(value, bool) and 0 <= value < 1 << 32:
        return int(value)
    if kind == "f32" and isinstance(value, Real) and not isinstance(value, bool):
        with suppress(OverflowError):
            if math.isfinite(value):
                return _shortest_f32(float(value))
    need = {"arr_str": "an array of strings", "arr_f32": "an array of floats", "arr_u32": "an array of whole numbers", "str": "one line of text", "f32": "a finite 32-bit float"}
    raise PlanError(f"{key}: got {_brief(value)}, need {need.get(kind, 'a whole number below 2^32')}. Calibrate again.")


def _is_text(value: object) -> bool:
    return isinstance(value, str) and not _CONTROL.search(value)


def _shortest_f32(value: float) -> float:
    """The decimal with the fewest digits that is the same f32, so that JSON and GGUF read back alike."""
    packed = struct.pack("<f", value)
    value = struct.unpack("<f", packed)[0]
    return next(x for x in (float(f"{value:.{n}g}") for n in range(6, 10)) if struct.pack("<f", x) == packed)


def _brief(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


@contextmanager
def atomic_file(target: Path, like: os.stat_result | None = None) -> Iterator[BinaryIO]:
    """A file to write that becomes target when the block ends, and leaves no trace if it does not end well.

    It lies beside the target, is synced and then renamed over it. Mode and owner are those of `like`,
    else of the target if there is one. Unbuffered: write() may take less than it is given for huge data.
    Raises OSError; what stood at target is then unchanged.
    """
    if like is None and target.exists():
        like = os.stat(target)
    temp = target.with_name(f"{target.name[:50]}.{secrets.token_hex(8)}.kvtuner-tmp")  # seen, if a power cut leaves it
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    try:
        with open(os.open(temp, flags, 0o666 if like is None else 0o600), "w+b", buffering=0) as out:
            yield out
            os.fsync(out.fileno())
        if like is not None:
            with suppress(AttributeError, OSError):  # only root may give a file away; Windows has no owners
                os.chown(temp, like.st_uid, like.st_gid)
            os.chmod(temp, like.st_mode & 0o7777)
        os.replace(temp, target)
    except BaseException:
        with suppress(OSError):
            os.unlink(temp)
        raise
    with suppress(OSError):  # makes the rename durable, where the system knows how: Windows does not
        fd = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
