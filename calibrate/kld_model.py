"""The KLD of a plan as a sum over its layers, from errors that were computed and a few plans that were run.

KLD(plan) ~ floor + sum over layers of  x_k * error(type_k)^2 + x_v * error(type_v)^2

The squared error of the residual stream tells how a layer's damage grows from type to type, and roughly how much the
layer matters. What remains is fitted to measured KLDs: x, and a factor of each type of K and of V, as errors of two
types that are as large on a few samples need not do as much. The floor is what any change of rounding does to the
model; it grows through the layers above the first one that is quantized. A single KLD is noisy for the same reason, so
a plan is chosen by the fitted model, not by its luckiest run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from kvtuner_gguf.calibrate.results import ErrorTable, Trial
from kvtuner_gguf.geometry import Geometry
from kvtuner_gguf.pair import Pair

F16 = Pair("f16", "f16")
# how far a layer's x may lie from its side's mean, relative to the larger of the two: one standard deviation
PRIOR_SPREAD = 1.0
ALIKE = 0.85  # correlation of the x of a layer's K and of its V: what lies above a layer amplifies both (SmolLM2: 0.87)
N_REWEIGHT = 5
TYPE_SPREAD = 0.5  # of a type's factor about 1
TYPE_RANGE = (0.25, 4.0)
NOISE = 0.1  # how far a measured KLD may lie from the model, relative


@dataclass(frozen=True, eq=False)
class KldModel:
    """Squared stream_error of each layer and pair, split by side, and the bytes they cost.

    il       (n_il,) layers that have KV
    pairs    the pairs of the columns
    sq_k     (n_il, n_pair) squared error of the pair's K type alone, NaN where the layer cannot hold the pair
    sq_v     (n_il, n_pair) of its V type alone; 0 where V lies in K's rows
    n_bytes  (n_il, n_pair) at the geometry's n_ctx, its vectors included
    """

    il: tuple[int, ...]
    pairs: tuple[Pair, ...]
    sq_k: np.ndarray
    sq_v: np.ndarray
    n_bytes: np.ndarray
    n_layer: int

    @classmethod
    def of(cls, errors: ErrorTable, geometry: Geometry) -> KldModel:
        column = {pair: i for i, pair in enumerate(errors.pairs)}
        error = errors.measure("stream_error") ** 2
        sq_k, sq_v = np.full(error.shape, np.nan), np.full(error.shape, np.nan)
        for i, pair in enumerate(errors.pairs):
            k, v = column.get(Pair(pair.type_k, "f16")), column.get(Pair("f16", pair.type_v))
            alone = np.full(len(error), np.nan)
            k_alone = error[:, k] if k is not None else alone
            v_alone = error[:, v] if v is not None else alone
            one_tensor = np.isnan(k_alone) & ~np.isnan(error[:, i])  # V lies in K's rows
            sq_k[:, i] = np.where(one_tensor, error[:, i], k_alone)
            sq_v[:, i] = np.where(one_tensor, 0.0, v_alone)
        holes = np.isnan(error)
        sq_k[holes] = sq_v[holes] = np.nan
        n_bytes = np.array([[geometry.layer(il).bytes((pair,)) for pair in errors.pairs] for il in errors.il])
        return cls(errors.il, errors.pairs, sq_k, sq_v, n_bytes, geometry.n_layer)

    @cached_property
    def column(self) -> dict[Pair, int]:
        """Of each pair in the tables."""
        return {pair: i for i, pair in enumerate(self.pairs)}

    def features(self, pairs: Sequence[Pair]) -> np.ndarray:
        """(2*n_il,) squared errors that a plan has: of K in each layer, then of V."""
        columns = [self.column[pairs[il]] for il in self.il]
        rows = np.arange(len(self.il))
        return np.concatenate([self.sq_k[rows, columns], self.sq_v[rows, columns]])

    def first_quantized(self, pairs: Sequence[Pair]) -> int | None:
        """Row of the first layer that has an error; None if none has."""
        n = len(self.il)
        rows = np.nonzero(self.features(pairs).reshape(2, n).any(axis=0))[0]
        return int(rows[0]) if len(rows) else None

    def lowered(self, pair_of_row: Mapping[int, Pair]) -> tuple[Pair, ...]:
        """The plan of f16 but for these rows."""
        pairs = [Pair("", "")] * self.n_layer
        for row, il in enumerate(self.il):
            pairs[il] = pair_of_row.get(row, F16)
        return tuple(pairs)

    def finest(self, row: int) -> Pair | None:
        """The quantized pair of this layer that does least harm; None if the layer holds none."""
        harm = self.sq_k[row] + self.sq_v[row]
        held = [i for i, p in enumerate(self.pairs) if not np.isnan(harm[i]) and "f16" not in (p.type_k, p.type_v)]
        return self.pairs[min(held, key=lambda i: (harm[i], i))] if held else None

    def prices(self, x: np.ndarray) -> np.ndarray:
        """(n_il, n_pair) what each pair adds to the KLD; NaN where a layer cannot hold it."""
        n = len(self.il)
        return x[:n, None] * self.sq_k + x[n:, None] * self.sq_v


def floor_shape(kld_model: KldModel, trials: Sequence[Trial]) -> np.ndarray:
    """(n_il,) the floor of a plan by its first quantized layer, relative to that of one quantized from the first layer
    on.

    From trials in which one layer alone has its finest pair; 1 everywhere if there are none.
    """
    known: dict[int, float] = {}
    for trial in trials:
        row = kld_model.first_quantized(trial.pairs)
        if row is not None and trial.pairs == kld_model.lowered({row: kld_model.finest(row) or F16}):
            known[row] = trial.kld
    if len(known) < 2 or not known[min(known)] > 0:
        return np.ones(len(kld_model.il))
    rows = sorted(known)
    shape = np.interp(np.arange(len(kld_model.il)), rows, [known[row] for row in rows])
    return np.minimum.accumulate(shape / shape[0])


@dataclass(frozen=True, eq=False)
class Fit:
    """What trials tell of the plans that were not run.

    kld_model  with squared errors times the factors of their types
    x          (2*n_il,) of K in each layer, then of V
    floor      of a plan that is quantized from the first layer on
    """

    kld_model: KldModel
    x: np.ndarray
    floor: float

    @property
    def prices(self) -> np.ndarray:
        """(n_il, n_pair) as KldModel.prices."""
        return self.kld_model.prices(self.x)

    def kld(self, pairs: Sequence[Pair]) -> float:
        """Of a plan that is quantized from the first layer on, foretold."""
        return self.floor + float(self.kld_model.features(pairs) @ self.x)


def fit(kld_model: KldModel, trials: Sequence[Trial]) -> Fit:
    """x, the floor, and the factors of types that explain the trials' KLDs best."""
    floors = _floors(kld_model, trials)
    found = _of_types(kld_model, trials, floors, *_of_layers(kld_model, trials, floors))
    return Fit(found, *_of_layers(found, trials, floors))


def _of_types(
    kld_model: KldModel, trials: Sequence[Trial], floors: np.ndarray, x: np.ndarray, floor: float
) -> KldModel:
    """With squared errors times a factor of their type, of K and of V: ridge regression towards 1, given the layers'
    x."""
    from scipy.optimize import lsq_linear

    columns = np.array([[kld_model.column[t.pairs[il]] for il in kld_model.il] for t in trials])
    types = np.array([(p.type_k, p.type_v) for p in kld_model.pairs]).T  # of each column of a side's squares
    parts = []
    for of_layers, squares, of_column in zip(np.split(x, 2), (kld_model.sq_k, kld_model.sq_v), types):
        each = of_layers * squares[np.arange(len(squares)), columns]  # (trial, layer)
        parts += [np.where(of_column[columns] == name, each, 0).sum(axis=1) for name in np.unique(of_column)]
    y = np.array([t.kld for t in trials])
    weight = 1 / (NOISE * np.maximum(y, 1e-6))
    target = (y - floor * floors) * weight
    unknowns = np.vstack([np.column_stack(parts) * weight[:, None], np.eye(len(parts)) / TYPE_SPREAD])
    factors = lsq_linear(unknowns, np.append(target, np.full(len(parts), 1 / TYPE_SPREAD)), bounds=TYPE_RANGE).x
    of_k = np.unique(types[0], return_inverse=True)[1]
    of_v = np.unique(types[1], return_inverse=True)[1] + of_k.max() + 1
    return replace(kld_model, sq_k=kld_model.sq_k * factors[of_k], sq_v=kld_model.sq_v * factors[of_v])


def _floors(kld_model: KldModel, trials: Sequence[Trial]) -> np.ndarray:
    """(n_trial,) relative to that of a plan that is quantized from the first layer on."""
    shape = floor_shape(kld_model, trials)
    rows = [kld_model.first_quantized(t.pairs) for t in trials]
    return np.array([0.0 if row is None else shape[row] for row in rows])


def _of_layers(kld_model: KldModel, trials: Sequence[Trial], floors: np.ndarray) -> tuple[np.ndarray, float]:
    """x (2*n_il,) and the floor that explain the trials' KLDs best: ridge regression towards one x per side.

    What a layer's x departs from that by is expected to be much the same for its K and its V. The floor is that of a
    plan which is quantized from the first layer on. Residuals count relative to the KLD, as its noise grows with it.
    """
    from scipy.optimize import lsq_linear, nnls

    a = np.array([kld_model.features(t.pairs) for t in trials])
    y = np.array([t.kld for t in trials])
    n = len(kld_model.il)
    weight = 1 / np.maximum(y, 1e-6)
    sides = np.column_stack([a[:, :n].sum(axis=1), a[:, n:].sum(axis=1), floors])
    mean, _ = nnls(sides * weight[:, None], y * weight)
    least = 1e-3 * mean[:2].max() if mean[:2].max() > 0 else 1.0
    prior = np.repeat(np.maximum(mean[:2], least), n)
    center = np.append(prior, max(mean[2], 1e-6))
    data, target = np.column_stack([a, floors]) * (weight / NOISE)[:, None], y * weight / NOISE
    alike = _whitened(n)
    found = center
    for _ in range(N_REWEIGHT):
        spread = PRIOR_SPREAD * np.maximum(center, found)
        # of the data, in units of their spread
        unknowns = np.vstack([data * spread, alike])
        found = lsq_linear(unknowns, np.concatenate([target, alike @ (center / spread)]), bounds=(0, np.inf)).x * spread
    return found[:-1], float(found[-1])


def _whitened(n: int) -> np.ndarray:
    """(2n + 1, 2n + 1): makes independent of each other the x of n layers' K and V, and the floor."""
    both, apart = 1 / np.sqrt(2 * (1 + ALIKE)), 1 / np.sqrt(2 * (1 - ALIKE))
    eye = np.eye(n)
    result = np.eye(2 * n + 1)
    result[: 2 * n, : 2 * n] = np.block([[both * eye, both * eye], [apart * eye, -apart * eye]])
    return result
