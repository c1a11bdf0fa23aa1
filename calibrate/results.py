"""The records that pass from stage to stage. Each checks itself when it is made, so a stage need not."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import CalibrationError
from ..geometry import Geometry
from ..kvectors import KVectors
from ..pair import Pair
from .records import load_arrays, load_json, save_arrays, save_json


@dataclass(frozen=True, eq=False)
class LayerSample:
    """What one layer's attention read and gave in one sample. All arrays float32.

    q              (n_head, n_q, head_dim_k)     after RoPE
    k              (n_head_kv, n_kv, head_dim_k) after RoPE
    v              (n_head_kv, n_kv, head_dim_v)
    mask           (n_q, n_kv) added to the logits: 0 or -inf; ALiBi distances where max_bias > 0
    scale          factor of the logits
    logit_softcap  the logits s become cap*tanh(s/cap); 0 = none
    max_bias       ALiBi's; 0 = none
    sinks          (n_head,) extra logit of each head, or None
    rot_k rot_v    size of the Hadamard blocks by which the run time rotates this K, V if quantized; 0 = none
    n_rot          first channels of a head that RoPE turns in pairs; 0 = none
    far_pairs      a pair is (i, i + n_rot/2), else (2i, 2i + 1)
    turns          (n_place, n_rot/2, 2) cos and sin by which RoPE would turn each pair of K and Q further, were the
                   same text at other places of the context; None = looked at where it stands only
    output         (n_head, n_q, head_dim_v) as the run time computed it, for a control, or None
    Raises CalibrationError if the shapes do not fit together.
    """

    il: int
    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    mask: np.ndarray
    scale: float
    logit_softcap: float = 0.0
    max_bias: float = 0.0
    sinks: np.ndarray | None = None
    rot_k: int = 0
    rot_v: int = 0
    n_rot: int = 0
    far_pairs: bool = False
    turns: np.ndarray | None = None
    output: np.ndarray | None = None

    def __post_init__(self) -> None:
        for name in ("q", "k", "v"):
            if getattr(self, name).ndim != 3:
                self._fail(f"{name} has shape {getattr(self, name).shape}", "(heads, tokens, head_dim)")
        n_head, n_q, head_dim_k = self.q.shape
        n_head_kv, n_kv, _ = self.k.shape
        if n_head % n_head_kv:
            self._fail(f"{n_head} heads", f"a multiple of its {n_head_kv} KV heads")
        self._check_shape("k", (n_head_kv, n_kv, head_dim_k))
        self._check_shape("v", (n_head_kv, n_kv, self.head_dim_v))
        self._check_shape("mask", (n_q, n_kv))
        self._check_shape("sinks", (n_head,))
        self._check_shape("output", (n_head, n_q, self.head_dim_v))
        if self.turns is not None:
            self._check_shape("turns", (len(self.turns), self.n_rot // 2, 2))
        for name, n, head_dim in (("rot_k", self.rot_k, head_dim_k), ("rot_v", self.rot_v, self.head_dim_v)):
            if n and (n & (n - 1) or head_dim % n):
                self._fail(f"{name} is {n}", f"0 or a power of two that divides head_dim {head_dim}")
        if self.n_rot % 2 or not 0 <= self.n_rot <= head_dim_k:
            self._fail(f"n_rot is {self.n_rot}", f"an even number up to head_dim {head_dim_k}")

    def _check_shape(self, name: str, shape: tuple[int, ...]) -> None:
        x = getattr(self, name)
        if x is not None and (x.shape != shape or x.dtype != np.float32):
            self._fail(f"{name} is {x.dtype} of shape {x.shape}", f"float32 of {shape}")

    def _fail(self, got: str, need: str) -> None:
        raise CalibrationError(f"layer {self.il}: {got}, need {need}. Capture again with this model.")

    @property
    def head_dim_v(self) -> int:
        return self.v.shape[-1]

    @property
    def rope_pairs(self) -> tuple[np.ndarray, np.ndarray]:
        """The channels of a head that RoPE turns, as first and second of each pair."""
        first = np.arange(self.n_rot // 2) if self.far_pairs else np.arange(0, self.n_rot, 2)
        return first, first + (self.n_rot // 2 if self.far_pairs else 1)

    def turned(self, place: int) -> LayerSample:
        """The same text at another place of the context: K and Q of every token turned alike, so the same attention."""
        first, second = self.rope_pairs
        cos, sin = self.turns[place, :, 0], self.turns[place, :, 1]

        def turn(x: np.ndarray) -> np.ndarray:
            out = x.copy()
            out[..., first] = x[..., first] * cos - x[..., second] * sin
            out[..., second] = x[..., first] * sin + x[..., second] * cos
            return out

        return replace(self, q=turn(self.q), k=turn(self.k))

    @property
    def v_in_k(self) -> bool:
        """True if V is the front of K's rows, as in MLA: there is one tensor then, so one type."""
        return self.head_dim_v < self.k.shape[-1] and np.array_equal(self.v, self.k[..., : self.head_dim_v])


@dataclass(frozen=True)
class Capture:
    """Samples of every layer that has KV, kept on disk and read one at a time.

    path      directory; one .npz for each layer and sample beside the index
    n_layer   layers of the model
    il        the layers that have KV of their own, ascending
    n_sample  samples of each of them
    share     of each of them: |attention's output|^2 / |residual stream after it|^2, mean over tokens
    """

    path: Path
    n_layer: int
    il: tuple[int, ...]
    n_sample: int
    share: tuple[float, ...] = ()

    INDEX = "capture.json"

    def __post_init__(self) -> None:
        _check_il(f"capture {self.path}", self.il)
        if self.il[-1] >= self.n_layer or self.n_sample < 1:
            raise CalibrationError(
                f"capture {self.path}: {self.n_sample} samples of layers up to {self.il[-1]}, "
                f"need at least one, of a model of {self.n_layer} layers. Capture again."
            )
        if not self.share:
            object.__setattr__(self, "share", (1.0,) * len(self.il))
        if len(self.share) != len(self.il) or not all(math.isfinite(s) and s >= 0 for s in self.share):
            raise CalibrationError(
                f"capture {self.path}: shares {self.share}, need one >= 0 for each of {len(self.il)} layers. "
                "Capture again."
            )

    def sample(self, il: int, i: int) -> LayerSample:
        """Sample i of layer il, read from disk. Raises CalibrationError if it is not there."""
        path = sample_path(self.path, il, i)
        if not path.is_file():
            raise CalibrationError(f"{path}: there is no such file, need sample {i} of layer {il}. Capture again.")
        return LayerSample(**{name: _from_array(x) for name, x in load_arrays(path).items()})

    def save(self) -> None:
        """Write the index, once all samples are there: a capture without it is unfinished."""
        save_json(Path(self.path) / self.INDEX, "Capture", {k: v for k, v in vars(self).items() if k != "path"})

    @classmethod
    def load(cls, path: Path) -> Capture:
        """The capture in a directory. Raises CalibrationError if it has no index or a damaged one."""
        return load_json(
            Path(path) / cls.INDEX,
            "Capture",
            lambda data: cls(Path(path), data["n_layer"], tuple(data["il"]), data["n_sample"], tuple(data["share"])),
        )


def sample_path(path: Path, il: int, i: int) -> Path:
    """Where a capture keeps sample i of layer il."""
    return Path(path) / f"l{il:03d}_s{i:02d}.npz"


def save_sample(path: Path, i: int, sample: LayerSample) -> None:
    """Write sample i of a layer into a capture's directory; K and V as float16, as the cache held them.

    Raises CalibrationError if K or V holds what float16 cannot.
    """
    fields = {name: value for name, value in vars(sample).items() if value is not None}
    for name in ("k", "v"):
        with np.errstate(over="ignore"):
            fields[name] = fields[name].astype(np.float16)
        if not np.isfinite(fields[name]).all():
            raise CalibrationError(
                f"layer {sample.il}: {name} holds values outside float16, need at most 65504. Leave this layer at f16."
            )
    save_arrays(sample_path(path, sample.il, i), **fields)


def _from_array(x: np.ndarray) -> Any:
    """A stored field as LayerSample has it: a plain number, or float32."""
    return x.item() if x.ndim == 0 else x.astype(np.float32)


@dataclass(frozen=True, eq=False)
class ErrorTable:
    """What each pair does to each layer, mean over samples.

    pairs  the pairs tried, in the order of the columns
    il     the layers that have KV, ascending, in the order of the rows
    Each measure is (len(il), len(pairs)), float64, >= 0, 0 means identical, NaN where a layer cannot hold the pair:
    key_error     relative L1 norm, mean over KV heads; the same for every type_v
    value_error   relative L1 norm, mean over KV heads; the same for every type_k
    score_error   absolute, mean over the cells that a query sees; the same for every type_v
    output_error  relative L1 norm, mean over heads: the paper's measure to prune and cluster by
    output_nrmse  relative Frobenius norm over all heads, the root of the nmse
    stream_error  output_nrmse times the root of attention's share: relative error of the residual stream, which tells
                  what a layer does to the model better than output_nrmse does
    Raises CalibrationError if a measure has another shape, or holds anything else.
    """

    pairs: tuple[Pair, ...]
    il: tuple[int, ...]
    key_error: np.ndarray
    value_error: np.ndarray
    score_error: np.ndarray
    output_error: np.ndarray
    output_nrmse: np.ndarray
    stream_error: np.ndarray

    MEASURES = ("key_error", "value_error", "score_error", "output_error", "output_nrmse", "stream_error")

    def __post_init__(self) -> None:
        _check_il("error table", self.il)
        if len(set(self.pairs)) != len(self.pairs) or not self.pairs:
            raise CalibrationError(
                f"error table: pairs {' '.join(map(str, self.pairs)) or 'none'}, need each once. Measure again."
            )
        shape = (len(self.il), len(self.pairs))
        holes = np.isnan(self.output_error)
        for name in self.MEASURES:
            x = getattr(self, name)
            if x.shape != shape:
                raise CalibrationError(f"error table: {name} has shape {x.shape}, need {shape}. Measure again.")
            if (np.isnan(x) != holes).any() or not (np.isfinite(x) & (x >= 0) | holes).all():
                raise CalibrationError(
                    f"error table: {name} holds a value that is negative, infinite, or NaN where output_error is not; "
                    "need finite errors >= 0. Capture again."
                )
        if holes.all(axis=1).any():
            raise CalibrationError(
                f"error table: layer {self.il[int(holes.all(axis=1).argmax())]} has no pair, need one. Allow it f16."
            )

    def measure(self, name: str) -> np.ndarray:
        """(len(il), len(pairs)) of the measure of this name. Raises CalibrationError, which lists the names."""
        if name not in self.MEASURES:
            raise CalibrationError(f"measure '{name}' is not known. Use one of: {', '.join(self.MEASURES)}.")
        return getattr(self, name)

    def save(self, path: Path) -> None:
        data: dict[str, Any] = {"pairs": _pairs_out(self.pairs), "il": list(self.il)}
        for name in self.MEASURES:  # JSON has no NaN
            data[name] = [[None if math.isnan(x) else x for x in row] for row in self.measure(name).tolist()]
        save_json(path, "ErrorTable", data)

    @classmethod
    def load(cls, path: Path) -> ErrorTable:
        """Raises CalibrationError if the file holds something else."""
        return load_json(
            path,
            "ErrorTable",
            lambda data: cls(
                _pairs_in(data["pairs"]),
                tuple(data["il"]),
                *(np.array(data[name], dtype=np.float64) for name in cls.MEASURES),  # null becomes NaN
            ),
        )


@dataclass(frozen=True)
class Conditions:
    """How each layer's K is to be conditioned, and what that was measured to be worth.

    k_vectors  one for each layer of the model, empty where K is cached as it is
    errors     il -> {"none": error, "mean": ...}: output_nrmse with K in the coarsest type, of each way that was tried
    """

    k_vectors: tuple[KVectors, ...]
    errors: Mapping[int, Mapping[str, float]]

    def save(self, path: Path) -> None:
        vectors = [{"mean": v.mean, "scale": v.scale} for v in self.k_vectors]
        save_json(
            path, "Conditions", {"k_vectors": vectors, "errors": {str(il): dict(e) for il, e in self.errors.items()}}
        )

    @classmethod
    def load(cls, path: Path) -> Conditions:
        """Raises CalibrationError if the file holds something else."""
        return load_json(
            path,
            "Conditions",
            lambda data: cls(
                tuple(KVectors(tuple(v["mean"]), tuple(v["scale"])) for v in data["k_vectors"]),
                {int(il): errors for il, errors in data["errors"].items()},
            ),
        )


@dataclass(frozen=True)
class Menus:
    """The pairs left to each layer, ordered by the bits they cost it, cheapest first.

    il     the layers that have KV, ascending
    pairs  the menu of each of them, in that order
    """

    il: tuple[int, ...]
    pairs: tuple[tuple[Pair, ...], ...]

    def __post_init__(self) -> None:
        _check_il("menus", self.il)
        if len(self.pairs) != len(self.il):
            raise CalibrationError(f"menus: got {len(self.pairs)}, need one for {len(self.il)} layers. Prune again.")
        for il, menu in zip(self.il, self.pairs):
            if not menu or len(set(menu)) != len(menu):
                raise CalibrationError(
                    f"layer {il}: menu {' '.join(map(str, menu)) or 'is empty'}, need each pair once. Prune again."
                )

    def menu(self, il: int) -> tuple[Pair, ...]:
        """The pairs of layer il. Raises CalibrationError if it has no KV."""
        if il not in self.il:
            raise CalibrationError(f"layer {il}: has no menu, need one of layers {self.il}. Prune again.")
        return self.pairs[self.il.index(il)]

    def save(self, path: Path) -> None:
        save_json(path, "Menus", {"il": list(self.il), "pairs": [_pairs_out(menu) for menu in self.pairs]})

    @classmethod
    def load(cls, path: Path) -> Menus:
        """Raises CalibrationError if the file holds something else."""
        return load_json(
            path, "Menus", lambda data: cls(tuple(data["il"]), tuple(_pairs_in(menu) for menu in data["pairs"]))
        )


@dataclass(frozen=True)
class Groups:
    """The layers that share a pair: a partition of the layers that have KV.

    il      the layers that have KV, ascending
    layers  the groups
    """

    il: tuple[int, ...]
    layers: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        _check_il("groups", self.il)
        if sorted(il for group in self.layers for il in group) != list(self.il) or not all(self.layers):
            raise CalibrationError(f"groups {self.layers}: not a partition of layers {self.il}. Cluster again.")

    def save(self, path: Path) -> None:
        save_json(path, "Groups", {"il": list(self.il), "layers": [list(group) for group in self.layers]})

    @classmethod
    def load(cls, path: Path) -> Groups:
        """Raises CalibrationError if the file holds something else."""
        return load_json(
            path, "Groups", lambda data: cls(tuple(data["il"]), tuple(tuple(group) for group in data["layers"]))
        )


@dataclass(frozen=True)
class Trial:
    """One assignment of pairs to layers that was tried.

    pairs           one for each layer of the model, Pair("", "") where it has no KV of its own
    kld             mean KL divergence to the f16 cache, nats
    bits_per_value  real bits, averaged over cached values
    n_bytes         of the whole cache
    """

    pairs: tuple[Pair, ...]
    kld: float
    bits_per_value: float
    n_bytes: int

    def __post_init__(self) -> None:
        if not self.pairs or not math.isfinite(self.kld) or self.n_bytes < 0:
            raise CalibrationError(
                f"trial {' '.join(map(str, self.pairs))}: KLD {self.kld} at {self.n_bytes} bytes, "
                "need a finite KLD. Leave these types out."
            )

    @property
    def uniform_pair(self) -> Pair:
        """The pair of all layers, of a uniform plan."""
        return next(p for p in self.pairs if p.type_k)

    @classmethod
    def of(cls, pairs: tuple[Pair, ...], kld: float, geometry: Geometry) -> Trial:
        """The trial of these pairs, with what they cost at the geometry."""
        return cls(pairs, kld, geometry.bits_per_value(pairs), geometry.bytes(pairs))


@dataclass(frozen=True)
class Trials:
    """The trials of one search, in the order in which they were tried."""

    trials: tuple[Trial, ...]

    def __post_init__(self) -> None:
        n_layer = {len(trial.pairs) for trial in self.trials}
        if len(n_layer) != 1:
            raise CalibrationError(f"trials: of models of {sorted(n_layer)} layers, need one model. Search again.")

    def front(self) -> tuple[Trial, ...]:
        """The trials that no other beats in both n_bytes and kld, by ascending bytes; the first of equals."""
        keep = non_dominated([t.n_bytes for t in self.trials], [t.kld for t in self.trials])
        return tuple(self.trials[i] for i in keep)

    def save(self, path: Path) -> None:
        save_json(path, "Trials", {"trials": [{**vars(t), "pairs": _pairs_out(t.pairs)} for t in self.trials]})

    @classmethod
    def load(cls, path: Path) -> Trials:
        """Raises CalibrationError if the file holds something else."""

        def trial(fields: dict[str, Any]) -> Trial:
            return Trial(**{**fields, "pairs": _pairs_in(fields["pairs"])})

        return load_json(path, "Trials", lambda data: cls(tuple(map(trial, data["trials"]))))


def non_dominated(cost: Sequence[float], error: Sequence[float]) -> list[int]:
    """Indices that no other beats in one of (cost, error) without losing in the other, by ascending cost.

    Both are minimised. Of points that are equal in both, the first stays.
    """
    keep: list[int] = []
    for i in sorted(range(len(cost)), key=lambda i: (cost[i], error[i], i)):
        if not keep or error[i] < error[keep[-1]]:
            keep.append(i)
    return keep


def _check_il(where: str, il: tuple[int, ...]) -> None:
    if not il or il[0] < 0 or any(a >= b for a, b in pairwise(il)):
        raise CalibrationError(f"{where}: layers {il}, need at least one, ascending from 0 up. Capture again.")


def _pairs_out(pairs: Sequence[Pair]) -> list[list[str]]:
    return [[pair.type_k, pair.type_v] for pair in pairs]


def _pairs_in(pairs: Sequence[Sequence[str]]) -> tuple[Pair, ...]:
    return tuple(Pair(type_k, type_v) for type_k, type_v in pairs)
