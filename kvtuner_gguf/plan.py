"""A plan: the K type and the V type of every layer, what it was measured to cost, and how it was made."""

from __future__ import annotations

import json
import os
import re
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

from .atomic import atomic_file
from .codecs import codec
from .errors import PlanError
from .kvectors import SIDES, KVectors, joined, k_vectors_of, vector_bytes
from .pair import Pair
from .quality import QUALITY_FIELDS, REQUIRED, Quality
from .reading import opened
from .room import write_errors
from .values import as_json, blamed_on, brief, checked

PREFIX = "kvtuner."
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
    ("k_basis", "arr_i8", "k_basis"),
    ("k_basis.n_values", "arr_u32", "k_basis_n_values"),
    ("k_basis_scale", "arr_f32", "k_basis_scale"),
    ("k_basis_scale.n_values", "arr_u32", "k_basis_scale_n_values"),
    ("checksum", "str", "checksum"),
    ("bits_per_value", "f32", "bits_per_value"),
    *((key, kind, f"quality.{key}") for key, kind in QUALITY_FIELDS),
    ("rival", "str", "rival"),
    ("rival.bits_per_value", "f32", "rival_bits"),
    *((f"rival.{key}", kind, f"rival_quality.{key}") for key, kind in QUALITY_FIELDS),
)
_CALIBRATION = "calibration."
_CALIBRATION_KEY = re.compile(r"[a-z0-9_]+(\.[a-z0-9_]+)*")
# types of a thousand layers are 30 KB; vectors of 80 layers of 64 heads, 128 channels each, 16 MB; bases of 80 layers
# of 8 such heads, 14 MB
_MAX_JSON_BYTES = 64 << 20


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
                object.__setattr__(self, key, checked(key, "f32", getattr(self, key)))
        self._check_pairs()
        for key in self.calibration:
            if not isinstance(key, str) or not _CALIBRATION_KEY.fullmatch(key):
                raise PlanError(f"calibration key {key!r:.60}: need words of a-z, 0-9, _ joined by dots. Rename it.")
        made = {k: checked(_CALIBRATION + k, _calibration_kind(v), v) for k, v in self.calibration.items()}
        object.__setattr__(self, "calibration", MappingProxyType(made))

    def _check_pairs(self) -> None:
        if not self.pairs:
            raise PlanError("plan: got 0 layers, need one pair per layer of the model. Calibrate again.")
        for il, pair in enumerate(self.pairs):
            if bool(pair.type_k) != bool(pair.type_v):
                raise PlanError(f"layer {il}: got '{pair}', need a type on both sides or on none. Add the other type.")
        if self.k_vectors and len(self.k_vectors) != self.n_layer:
            raise PlanError(
                f"k_vectors: got {len(self.k_vectors)} layers, the plan has {self.n_layer}. Calibrate again."
            )
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
        return joined(v.mean for v in self.k_vectors)

    @property
    def k_scale(self) -> tuple[float, ...] | None:
        """The scales of all layers, one after another; None if there are none."""
        return joined(v.scale for v in self.k_vectors)

    @property
    def k_basis(self) -> bytes | None:
        """The bases of all layers, one after another; None if there are none."""
        return b"".join(v.basis for v in self.k_vectors) or None

    @property
    def k_basis_scale(self) -> tuple[float, ...] | None:
        """The scales of their rows, likewise."""
        return joined(v.basis_scale for v in self.k_vectors)

    def _n_values(self, side: str) -> tuple[int, ...] | None:
        n_values = tuple(len(getattr(v, side)) for v in self.k_vectors)
        return n_values if any(n_values) else None

    @property
    def k_mean_n_values(self) -> tuple[int, ...] | None:
        """How many values of k_mean each layer has, 0 = none."""
        return self._n_values("mean")

    @property
    def k_scale_n_values(self) -> tuple[int, ...] | None:
        """How many values of k_scale each layer has, 0 = none."""
        return self._n_values("scale")

    @property
    def k_basis_n_values(self) -> tuple[int, ...] | None:
        """How many values of k_basis each layer has, 0 = none."""
        return self._n_values("basis")

    @property
    def k_basis_scale_n_values(self) -> tuple[int, ...] | None:
        """How many values of k_basis_scale each layer has, 0 = none."""
        return self._n_values("basis_scale")

    @property
    def checksum(self) -> str:
        """8 hex digits of CRC-32 over what the run time obeys: the types and the vectors, as
        native/llama/kvt-plan.cpp reads them."""
        names = "".join(f"{name}\0" for name in (*self.type_k, *self.type_v)).encode()
        sides = ((getattr(self, key), getattr(self, f"{key}_n_values")) for key in SIDES)
        numbers = (_packed(x) + struct.pack(f"<{len(n)}I", *n) for x, n in sides if x and n)
        return f"{zlib.crc32(b''.join((names, *numbers))):08x}"

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

    def runs(self) -> list[tuple[int, int, Pair]]:
        """Neighbours with equal pairs as (first layer, last layer, pair), in layer order."""
        groups = (list(group) for _, group in groupby(enumerate(self.pairs), key=lambda item: item[1]))
        return [(group[0][0], group[-1][0], group[0][1]) for group in groups]

    def to_metadata(self) -> list[tuple[str, str, Any]]:
        """The plan as GGUF metadata: (key, kind, value), kind one of u32, f32, str, arr_str, arr_f32,
        arr_u32, and arr_i8, whose value is bytes."""
        rows = []
        for key, kind, where in _FIELDS:
            value: Any = self
            for name in where.split("."):
                value = getattr(value, name, None)
            if value is not None:
                rows.append(
                    (key, kind, str(value) if kind == "str" else list(value) if type(value) is tuple else value)
                )
        rows += ((_CALIBRATION + key, _calibration_kind(value), value) for key, value in self.calibration.items())
        return [(PREFIX + key, kind, value) for key, kind, value in rows]

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, object]) -> Plan | None:
        """The plan in GGUF metadata (key -> Python value), None if it has no kvtuner.type_k and no kvtuner.type_v.

        Keys that this version does not know are left out. Raises PlanError for any fault.
        """
        values = {key[len(PREFIX) :]: value for key, value in metadata.items() if key.startswith(PREFIX)}
        for side in ("type_k", "type_v"):  # the run time reads a name up to its first NUL
            if isinstance(names := values.get(side), list):
                values[side] = [name.split("\0")[0] if isinstance(name, str) else name for name in names]
        return cls._from_values(values) if "type_k" in values or "type_v" in values else None

    @classmethod
    def _from_values(cls, values: Mapping[str, Any]) -> Plan:
        if values.get("schema_version") != cls.schema_version:
            raise PlanError(
                f"schema_version: got {brief(values.get('schema_version'))}, this version reads {cls.schema_version}. "
                "Update kvtuner-gguf, or calibrate again."
            )
        found = {where: checked(key, kind, values[key]) for key, kind, where in _FIELDS if key in values}
        with blamed_on("rival"):
            rival = Pair.parse(found["rival"][:80]) if "rival" in found else None
        plan = cls(
            pairs=_pairs(found.get("type_k"), found.get("type_v")),
            bits_per_value=found.get("bits_per_value"),
            quality=_quality(found, "quality"),
            rival=rival,
            rival_quality=_quality(found, "rival_quality"),
            rival_bits=found.get("rival_bits"),
            k_vectors=k_vectors_of(found),
            calibration={k[len(_CALIBRATION) :]: v for k, v in values.items() if k.startswith(_CALIBRATION)},
        )
        if "checksum" in found and found["checksum"] != (have := plan.checksum):
            raise PlanError(
                f"checksum: is {brief(found['checksum'])}, the types and vectors have {have}: they are not as they "
                "were written. "
                "Calibrate again, or take the checksum out if you changed them yourself."
            )
        return plan

    def to_json(self) -> str:
        """The sidecar's text: the keys of to_metadata without their prefix, one to a line, however long its array."""
        rows = (
            (json.dumps(text, ensure_ascii=False, default=as_json) for text in (key[len(PREFIX) :], value))
            for key, _, value in self.to_metadata()
        )
        return "{\n" + ",\n".join("  " + ": ".join(row) for row in rows) + "\n}\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> Plan:
        """The plan of a sidecar's text. Raises PlanError for any fault."""
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as err:
            raise PlanError(f"plan: not JSON ({err}). Write it with 'kvtuner-gguf', or correct it there.") from err
        if not isinstance(values, dict):
            raise PlanError(f"plan: got JSON {brief(values)}, need an object with type_k and type_v. Calibrate again.")
        return cls._from_values(values)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the sidecar in one step: the file is the old one or the new one, and never one that was a model. Raises
        PlanError."""
        data = self.to_json().encode()
        try:
            target = Path(path).resolve()
        except (OSError, RuntimeError) as err:  # RuntimeError: a loop of links, before Python 3.13
            raise PlanError(f"{path}: plan not written ({err}). Choose a folder that can be written.") from err
        with write_errors(Path(path), len(data), "Choose a folder that can be written."):
            if is_gguf(target):
                raise PlanError(f"{path}: is a GGUF model, which a sidecar must not replace. Choose another name.")
            with atomic_file(target) as out:
                out.write(data)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read a sidecar. Raises PlanError, which starts with the path."""
        with opened(path, "a plan's JSON") as file:
            data = file.read(_MAX_JSON_BYTES + 1)
        if data.startswith(b"GGUF"):
            raise PlanError(f"{path}: is a GGUF model, need a plan's JSON. Give it as the model.")
        if len(data) > _MAX_JSON_BYTES:
            raise PlanError(f"{path}: more than {_MAX_JSON_BYTES >> 20} MiB, too large for a plan. Check the path.")
        with blamed_on(path):
            return cls.from_json(data)


def is_gguf(path: Path) -> bool:
    """Whether a file is there and starts as a model does. Raises OSError."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return file.read(4) == b"GGUF"


def _pairs(type_k: list[str] | None, type_v: list[str] | None) -> tuple[Pair, ...]:
    if type_k is None or type_v is None:
        key = "type_k" if type_k is None else "type_v"
        raise PlanError(f"{key}: is missing, need one type name per layer. Calibrate again.")
    for key, names in (("type_k", type_k), ("type_v", type_v)):
        for il, name in enumerate(names):
            with blamed_on(f"{key}: layer {il}"):
                codec(name[:32] or "f16")  # a known name is shorter; none is a layer without KV of its own
    if len(type_k) != len(type_v):
        raise PlanError(f"type_v: got {len(type_v)} layers, type_k has {len(type_k)}, need the same. Calibrate again.")
    return tuple(map(Pair, type_k, type_v))


def _quality(found: Mapping[str, Any], name: str) -> Quality | None:
    values = {where[len(name) + 1 :]: value for where, value in found.items() if where.startswith(name + ".")}
    missing = [key for key in REQUIRED if key not in values]
    if values and missing:
        raise PlanError(f"{name}: {', '.join(missing)} missing, need all figures or none. Calibrate again.")
    return Quality(**values) if values else None


def _packed(values: bytes | Sequence[float]) -> bytes:
    """As a GGUF holds them."""
    return values if isinstance(values, bytes) else struct.pack(f"<{len(values)}f", *values)


def _calibration_kind(value: object) -> str:
    return "str" if isinstance(value, str) else "u32"
