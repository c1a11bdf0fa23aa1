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
# standard deviations of logarithms
SIDE_SPREAD = 1.0  # of the x of all K, or of all V, about 1
LAYER_SPREAD = 0.8  # of a layer's, about that of its side (SmolLM2 .4, Qwen2.5-Coder-0.5B .6, gemma-3-270m 1)
TYPE_SPREAD = 0.3  # of a type's factor about 1
FLOOR_SPREAD = 2.0  # of the floor, about half of the least KLD
# of a measured KLD, about that on any text: in all, and of a single layer, whose KLD hangs on few positions. Times what
# of these the trials make likeliest, as some have next to none
NOISE, NOISE_OF_LAYER, NOISES = 0.2, 0.3, (1.0, 0.1)
ALIKE = 0.85  # correlation of the x of a layer's K and of its V: what lies above a layer amplifies both (SmolLM2: 0.87)
LEAST = 1e-7  # nats: what is less is rounding
MOST = 50.0  # logarithm of an x that a step of the fit may come to


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
    """x, the floor, and the factors of types that explain the logarithms of the trials' KLDs best, and are likely
    themselves: least squares with a prior, as logarithms, since a KLD's noise grows with it and x differ by factors.
    How noisy the trials are is what they make likeliest: by Laplace's approximation of the evidence."""
    from scipy.optimize import least_squares

    found: list[tuple[float, Fit]] = []
    z = None
    for noise in NOISES:
        unknowns = _Unknowns(kld_model, trials, noise)
        start = unknowns.likely if z is None else z
        z = least_squares(unknowns.residuals, start, unknowns.jacobian, method="lm").x
        found.append((unknowns.evidence(z), unknowns.fit_of(z)))
    return max(found, key=lambda of_noise: of_noise[0])[1]


class _Unknowns:
    """The unknowns as logarithms in one vector, and how far they are from the trials and from what is likely.

    In order: x of all K, and of all V, and the floor; each layer's x beside those, of K, then of V; factors of K's
    types, then of V's.
    """

    def __init__(self, kld_model: KldModel, trials: Sequence[Trial], noise: float) -> None:
        self.kld_model, n = kld_model, len(kld_model.il)
        columns = np.array([[kld_model.column[t.pairs[il]] for il in kld_model.il] for t in trials])
        rows = np.arange(n)
        self.squares = np.hstack([kld_model.sq_k[rows, columns], kld_model.sq_v[rows, columns]])  # (trial, 2n)
        type_k, of_k = np.unique([p.type_k for p in kld_model.pairs], return_inverse=True)
        type_v, of_v = np.unique([p.type_v for p in kld_model.pairs], return_inverse=True)
        self.factor_of = of_k, of_v + len(type_k)  # of each pair's K and V
        self.factors = np.hstack([of[columns] for of in self.factor_of])  # (trial, 2n)
        self.layers = slice(3, 3 + 2 * n)
        self.n = 3 + 2 * n + len(type_k) + len(type_v)
        kld = np.maximum([t.kld for t in trials], LEAST)
        self.target, self.floors = np.log(kld), _floors(kld_model, trials)
        n_changed = np.maximum((self.squares.reshape(len(trials), 2, n) > 0).any(axis=1).sum(axis=1), 1)
        self.weight = 1 / (noise * np.hypot(NOISE, NOISE_OF_LAYER / np.sqrt(n_changed)))
        self.likely = np.zeros(self.n)
        self.likely[2] = np.log(kld.min() / 2)
        self.prior = self._prior(n)

    def _prior(self, n: int) -> np.ndarray:
        """What makes the unknowns, less what is likely, independent of each other and of unit variance."""
        spreads = [SIDE_SPREAD, SIDE_SPREAD, FLOOR_SPREAD, *[LAYER_SPREAD] * (2 * n)]
        prior = np.diag(1 / np.array(spreads + [TYPE_SPREAD] * (self.n - len(spreads))))
        both, apart = (np.eye(n) / np.sqrt(2 * (1 + way * ALIKE)) / LAYER_SPREAD for way in (1, -1))
        prior[self.layers, self.layers] = np.block([[both, both], [apart, -apart]])
        return prior

    def _parts(self, z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What each side of each layer adds to each trial's KLD (trial, 2n), and the floor (trial,)."""
        log_x = self._log_x(z) + z[self.layers.stop + self.factors]
        return self.squares * np.exp(np.minimum(log_x, MOST)), np.exp(min(z[2], MOST)) * self.floors

    def _log_x(self, z: np.ndarray) -> np.ndarray:
        return z[self.layers] + np.repeat(z[:2], len(self.kld_model.il))

    def residuals(self, z: np.ndarray) -> np.ndarray:
        sides, floor = self._parts(z)
        told = np.log(sides.sum(axis=1) + floor + LEAST)
        return np.concatenate([(told - self.target) * self.weight, self.prior @ (z - self.likely)])

    def jacobian(self, z: np.ndarray) -> np.ndarray:
        sides, floor = self._parts(z)
        by = self.weight / (sides.sum(axis=1) + floor + LEAST)
        sides, floor = sides * by[:, None], floor * by
        of_trials = np.zeros((len(by), self.n))
        of_trials[:, :2] = sides.reshape(len(by), 2, -1).sum(axis=2)
        of_trials[:, 2] = floor
        of_trials[:, self.layers] = sides
        np.add.at(of_trials, (np.arange(len(by))[:, None], self.factors + self.layers.stop), sides)
        return np.vstack([of_trials, self.prior])

    def evidence(self, z: np.ndarray) -> float:
        """Logarithm of how likely the trials are, whatever the unknowns, but for a constant; z: the likeliest."""
        jacobian, residuals = self.jacobian(z), self.residuals(z)
        volume = np.linalg.slogdet(self.prior)[1] - np.linalg.slogdet(jacobian.T @ jacobian)[1] / 2
        return float(np.log(self.weight).sum() + volume - residuals @ residuals / 2)

    def fit_of(self, z: np.ndarray) -> Fit:
        of_k, of_v = (np.exp(z[self.layers.stop + of]) for of in self.factor_of)
        squares = {"sq_k": self.kld_model.sq_k * of_k, "sq_v": self.kld_model.sq_v * of_v}
        return Fit(replace(self.kld_model, **squares), np.exp(self._log_x(z)), float(np.exp(z[2])))


def _floors(kld_model: KldModel, trials: Sequence[Trial]) -> np.ndarray:
    """(n_trial,) relative to that of a plan that is quantized from the first layer on."""
    shape = floor_shape(kld_model, trials)
    rows = [kld_model.first_quantized(t.pairs) for t in trials]
    return np.array([0.0 if row is None else shape[row] for row in rows])
