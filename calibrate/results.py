"""The records that pass from stage to stage. Each checks itself when it is made, so a stage need not."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from kvtuner_gguf.calibrate.records import load_json, save_json
from kvtuner_gguf.errors import CalibrationError
from kvtuner_gguf.geometry import Geometry
from kvtuner_gguf.kvectors import KVectors
from kvtuner_gguf.pair import Pair


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
        check_il("error table", self.il)
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
        check_il("menus", self.il)
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
        check_il("groups", self.il)
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


def check_il(where: str, il: tuple[int, ...]) -> None:
    """Raises CalibrationError unless there are layers, ascending."""
    if not il or il[0] < 0 or any(a >= b for a, b in pairwise(il)):
        raise CalibrationError(f"{where}: layers {il}, need at least one, ascending from 0 up. Capture again.")


def _pairs_out(pairs: Sequence[Pair]) -> list[list[str]]:
    return [[pair.type_k, pair.type_v] for pair in pairs]


def _pairs_in(pairs: Sequence[Sequence[str]]) -> tuple[Pair, ...]:
    return tuple(Pair(type_k, type_v) for type_k, type_v in pairs)
