"""The records that pass from stage to stage. Each checks itself when it is made, so a stage need not."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from kvtuner_gguf.calibrate.records import load_json, save_json
from kvtuner_gguf.errors import CalibrationError
from kvtuner_gguf.geometry import Geometry
from kvtuner_gguf.kvectors import KVectors
from kvtuner_gguf.pair import Pair, Pairs
from kvtuner_gguf.values import as_json

Evaluate = Callable[[Pairs], float]  # one pair per layer -> KLD against the f16 cache, nats


@dataclass(frozen=True, eq=False)
class ErrorTable:
    """What each pair does to each layer, mean over samples.

    pairs     the pairs tried, in the order of the columns
    il        the layers that have KV, ascending, in the order of the rows
    measures  name -> (len(il), len(pairs)) float64, >= 0, 0 means identical, NaN where a layer cannot hold the pair:
              those of error.MEASURES, and stream_error
    Raises CalibrationError if a measure has another shape, or holds anything else.
    """

    pairs: tuple[Pair, ...]
    il: tuple[int, ...]
    measures: Mapping[str, np.ndarray]

    def __post_init__(self) -> None:
        check_il("error table", self.il)
        if len(set(self.pairs)) != len(self.pairs) or not self.pairs:
            raise CalibrationError(
                f"error table: pairs {' '.join(map(str, self.pairs)) or 'none'}, need each once. Measure again."
            )
        shape = (len(self.il), len(self.pairs))
        first, *_ = self.measures
        holes = np.isnan(self.measures[first])
        for name, x in self.measures.items():
            if x.shape != shape:
                raise CalibrationError(f"error table: {name} has shape {x.shape}, need {shape}. Measure again.")
            if (np.isnan(x) != holes).any() or not (np.isfinite(x) & (x >= 0) | holes).all():
                raise CalibrationError(
                    f"error table: {name} holds a value that is negative, infinite, or NaN where {first} is not; "
                    "need finite errors >= 0. Capture again."
                )
        if holes.all(axis=1).any():
            raise CalibrationError(
                f"error table: layer {self.il[int(holes.all(axis=1).argmax())]} has no pair, need one. Allow it f16."
            )

    def measure(self, name: str) -> np.ndarray:
        """(len(il), len(pairs)) of the measure of this name. Raises CalibrationError, which lists the names."""
        if name not in self.measures:
            raise CalibrationError(f"measure '{name}' is not known. Use one of: {', '.join(self.measures)}.")
        return self.measures[name]

    def of_types(self, types: Sequence[str]) -> ErrorTable:
        """The same of the pairs of these types alone."""
        only = [i for i, p in enumerate(self.pairs) if {p.type_k, p.type_v} <= {*types}]
        measures = {name: x[:, only] for name, x in self.measures.items()}
        return ErrorTable(tuple(self.pairs[i] for i in only), self.il, measures)

    def save(self, path: Path) -> None:
        """As JSON."""
        measures = {
            name: [[None if math.isnan(x) else x for x in row] for row in table.tolist()]  # JSON has no NaN
            for name, table in self.measures.items()
        }
        save_json(path, "ErrorTable", {"pairs": _pairs_out(self.pairs), "il": list(self.il), "measures": measures})

    @classmethod
    def load(cls, path: Path) -> ErrorTable:
        """Raises CalibrationError if the file holds something else."""
        return load_json(
            path,
            "ErrorTable",
            lambda data: cls(
                _pairs_in(data["pairs"]),
                tuple(data["il"]),
                # null becomes NaN
                {name: np.array(table, dtype=np.float64) for name, table in data["measures"].items()},
            ),
        )


@dataclass(frozen=True)
class Conditions:
    """How each layer's K is to be conditioned, and what that was measured to be worth.

    k_vectors  one for each layer of the model, empty where K is cached as it is
    errors     il -> {"none": error, "mean": ...}: output_nrmse of each way that was tried, each in the type of K that
               condition.py measures it with
    """

    k_vectors: tuple[KVectors, ...]
    errors: Mapping[int, Mapping[str, float]]

    def save(self, path: Path) -> None:
        vectors = [
            {**vars(v), "basis": as_json(v.basis)} if v.basis else {"mean": v.mean, "scale": v.scale}
            for v in self.k_vectors
        ]
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
                tuple(KVectors(**v) for v in data["k_vectors"]),
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


@dataclass(frozen=True)
class Sensitivity:
    """What one side of one layer in one type adds to a plan's mean KLD, predicted, in nats.

    side  'k' or 'v'; 'kv' where V lies in K's rows
    """

    il: int
    side: str
    type: str
    bits_per_value: float
    kld: float


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
