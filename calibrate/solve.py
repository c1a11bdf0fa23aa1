"""The default search: an additive model of the KLD, fitted to real runs, solved exactly under a byte budget.

KLD(plan) ~ floor + sum over layers of  x_k * error(type_k)^2 + x_v * error(type_v)^2

The squared error of the residual stream tells how a layer's damage grows from type to type, and roughly how much the layer
matters. What remains, x, is fitted to measured KLDs of whole plans: each run tells of all layers at once. A single KLD is
noisy, as any change of rounding moves the model a little, so the plan is chosen by the fitted model, not by its luckiest run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ..codecs import codec
from ..errors import CalibrationError
from ..geometry import Geometry
from ..pair import Pair
from .results import ErrorTable, Trial, Trials

Evaluate = Callable[[tuple[Pair, ...]], float]

PRIOR_SPREAD = 1.0  # how far a layer's x may lie from its side's mean, relative: one standard deviation
FIT_REACH = 2.75  # bits per value around the goal, within which types are run to fit the model: far off it is not additive
NOISE = 0.1  # how far a measured KLD may lie from the model, relative


@dataclass(frozen=True, eq=False)
class Additive:
    """Squared stream_error of each layer and pair, split by side, and the bytes they cost.

    il     (n_il,) layers that have KV
    pairs  the pairs of the columns
    sq_k   (n_il, n_pair) squared error of the pair's K type alone, NaN where the layer cannot hold the pair
    sq_v   (n_il, n_pair) of its V type alone; 0 where V lies in K's rows
    bytes  (n_il, n_pair) at the geometry's n_ctx
    """

    il: tuple[int, ...]
    pairs: tuple[Pair, ...]
    sq_k: np.ndarray
    sq_v: np.ndarray
    n_bytes: np.ndarray
    n_layer: int

    @classmethod
    def of(cls, errors: ErrorTable, geometry: Geometry) -> Additive:
        column = {pair: i for i, pair in enumerate(errors.pairs)}
        error = errors.stream_error**2
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
        n_bytes = np.array([[_layer_bytes(geometry, il, pair) for pair in errors.pairs] for il in errors.il])
        return cls(errors.il, errors.pairs, sq_k, sq_v, n_bytes, geometry.n_layer)

    def features(self, pairs: Sequence[Pair]) -> np.ndarray:
        """(2*n_il,) squared errors that a plan has: of K in each layer, then of V."""
        columns = [self.pairs.index(pairs[il]) for il in self.il]
        rows = np.arange(len(self.il))
        return np.concatenate([self.sq_k[rows, columns], self.sq_v[rows, columns]])

    def prices(self, x: np.ndarray) -> np.ndarray:
        """(n_il, n_pair) what each pair adds to the KLD; NaN where a layer cannot hold it."""
        n = len(self.il)
        return x[:n, None] * self.sq_k + x[n:, None] * self.sq_v


def _layer_bytes(geometry: Geometry, il: int, pair: Pair) -> int:
    one = Geometry((geometry.values_k[il],), (geometry.values_v[il],), geometry.n_ctx)
    return one.bytes((pair,))


def cheapest(model: Additive) -> int:
    """Fewest bytes that any plan can have."""
    return int(np.where(np.isnan(model.sq_k), np.inf, model.n_bytes).min(axis=1).sum())


def solve(model: Additive, prices: np.ndarray, max_bytes: int) -> tuple[Pair, ...]:
    """The plan of the lowest summed price within max_bytes, by integer programming (SciPy's HiGHS), to 0.01 %.

    prices  (n_il, n_pair), NaN where not allowed
    Raises CalibrationError if no plan fits.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import coo_array

    if cheapest(model) > max_bytes:
        raise CalibrationError(
            f"budget of {max_bytes} bytes: the cheapest plan of these types needs {cheapest(model)}. Allow more bits, or cheaper types."
        )
    rows, columns = np.nonzero(_undominated(prices, model.n_bytes))
    cost, n_bytes = prices[rows, columns], model.n_bytes[rows, columns]
    one_each = coo_array((np.ones(len(rows)), (rows, np.arange(len(rows)))), shape=(len(model.il), len(rows)))
    unit = max_bytes / 1e3  # HiGHS' tolerances are absolute
    result = milp(
        cost / max(float(cost.max()), 1e-30),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint((n_bytes / unit)[None, :], -np.inf, max_bytes / unit)],
        integrality=np.ones(len(rows)),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 1e-4, "time_limit": 10.0},
    )
    if result.x is None:
        raise CalibrationError(f"budget of {max_bytes} bytes: the solver found no plan ({result.message}). Allow more bits.")
    pairs = [Pair("", "")] * model.n_layer
    for i in np.nonzero(result.x > 0.5)[0]:
        pairs[model.il[rows[i]]] = model.pairs[columns[i]]
    return tuple(pairs)


def _undominated(prices: np.ndarray, n_bytes: np.ndarray) -> np.ndarray:
    """(n_il, n_pair) True where no other pair of the layer has neither more bytes nor a higher price."""
    keep = np.zeros(prices.shape, bool)
    for row, (price, size) in enumerate(zip(prices, n_bytes)):
        best = np.inf
        for i in sorted(np.nonzero(~np.isnan(price))[0], key=lambda i: (size[i], price[i], i)):
            if price[i] < best:
                best, keep[row, i] = price[i], True
    return keep


def fit(model: Additive, trials: Sequence[Trial]) -> tuple[np.ndarray, float]:
    """x (2*n_il,) and the floor that explain the trials' KLDs best: ridge regression towards one x per side.

    Residuals count relative to the KLD, as its noise grows with it.
    """
    from scipy.optimize import lsq_linear, nnls

    a = np.array([model.features(t.pairs) for t in trials])
    y = np.array([t.kld for t in trials])
    n = len(model.il)
    weight = 1 / np.maximum(y, 1e-6)
    sides = np.column_stack([a[:, :n].sum(axis=1), a[:, n:].sum(axis=1), np.ones(len(a))])
    mean, _ = nnls(sides * weight[:, None], y * weight)
    least = 1e-3 * mean[:2].max() if mean[:2].max() > 0 else 1.0
    prior = np.repeat(np.maximum(mean[:2], least), n)
    # unknowns: x/prior of each layer and side, and the floor, scaled alike
    scale = np.append(prior, max(mean[2], 1e-6))
    data = np.column_stack([a, np.ones(len(a))]) * scale * (weight / NOISE)[:, None]
    ridge = np.eye(2 * n + 1) / PRIOR_SPREAD
    target = np.concatenate([y * weight / NOISE, np.append(np.ones(2 * n), mean[2] / scale[-1]) / PRIOR_SPREAD])
    found = lsq_linear(np.vstack([data, ridge]), target, bounds=(0, np.inf)).x * scale
    return found[:-1], float(found[-1])


def near(pairs: Sequence[Pair], bits: float) -> list[Pair]:
    """The pairs of types within FIT_REACH of so many bits per value; all if none is, but f16 only where it must be."""
    quantized = [p for p in pairs if "f16" not in vars(p).values()] or list(pairs)
    return [p for p in quantized if all(abs(codec(t).bits_per_value - bits) < FIT_REACH for t in vars(p).values())] or quantized


def uniform_pairs(model: Additive, geometry: Geometry, max_bytes: int | None) -> list[tuple[Pair, ...]]:
    """Uniform plans to compare with and to fit the model to: the likeliest within the budget; cheapest and best at the ends.

    max_bytes  None: no budget, and the plan of the most bytes is the last
    """
    everywhere = [p for i, p in enumerate(model.pairs) if not np.isnan(model.sq_k[:, i]).any() and p.type_k != "f16" != p.type_v]
    plans = {p: tuple(p if il in model.il else Pair("", "") for il in range(model.n_layer)) for p in everywhere}
    sizes = {p: geometry.bytes(plans[p]) for p in everywhere}
    sums = {p: model.features(plans[p]).reshape(2, -1).sum(axis=1) for p in everywhere}
    within = [p for p in everywhere if max_bytes is None or sizes[p] <= max_bytes]
    chosen: dict[Pair, None] = {}
    for weight in ((1, 1), (4, 1), (1, 4)):  # K may count for more than V, or less
        ranked = sorted(within, key=lambda p: (float(sums[p] @ weight), p))
        chosen |= dict.fromkeys(ranked[:2])
    if everywhere:
        chosen[min(near(everywhere, geometry.bits_of(max_bytes or 0)), key=lambda p: (sizes[p], p))] = None
        best = max(everywhere, key=lambda p: (sizes[p], p))
        if max_bytes is None:
            chosen.pop(best, None)
            chosen[best] = None
    return [plans[p] for p in chosen]


def fitted_search(
    model: Additive,
    start: Sequence[tuple[Pair, ...]],
    evaluate: Evaluate,
    geometry: Geometry,
    max_bytes: int,
    *,
    n_trials: int,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Trials, Trial]:
    """All trials, and the plan within max_bytes that the model, fitted to all of them, holds for the best.

    start     plans to begin with: the rivals, which also tell what the sides' shares are
    evaluate  one pair per layer -> KLD, nats. Never called twice with the same pairs.
    A third of the trials are contrasts, which tell the layers apart; the rest are the fitted model's own solutions, with
    noise that shrinks to none.
    """
    rng = np.random.default_rng(seed)
    tried: dict[tuple[Pair, ...], Trial] = {}

    def run(pairs: tuple[Pair, ...]) -> Trial:
        if pairs not in tried:
            tried[pairs] = Trial.of(pairs, float(evaluate(pairs)), geometry)
        if progress:
            progress(len(tried), n_trials)
        return tried[pairs]

    for pairs in start:
        run(pairs)
    n_contrast = len(tried) + max(0, n_trials - len(tried)) // 3
    for _ in range(n_contrast - len(tried)):
        run(contrast(model, geometry, max_bytes, rng))
    stale = 0
    while len(tried) < n_trials - 1 and stale < 10:
        x, _ = fit(model, list(tried.values()))
        spread = 0.5 * (n_trials - len(tried)) / max(1, n_trials - n_contrast) + 0.1 * stale
        plan = solve(model, model.prices(x * np.exp(spread * rng.standard_normal(len(x)))), max_bytes)
        stale = stale + 1 if plan in tried else 0
        run(plan)
    x, _ = fit(model, list(tried.values()))
    best = run(solve(model, model.prices(x), max_bytes))
    return Trials(tuple(tried.values())), best


def kld_search(
    model: Additive,
    start: Sequence[tuple[Pair, ...]],
    evaluate: Evaluate,
    geometry: Geometry,
    max_kld: float,
    *,
    n_trials: int,
    progress: Callable[[int, int], None] | None = None,
) -> Trials:
    """Trials towards the fewest bytes whose KLD is within max_kld: the budget is moved to where the fitted model meets it.

    start     plans to begin with, the dearest last
    evaluate  one pair per layer -> KLD, nats
    """
    trials = [Trial.of(pairs, evaluate(pairs), geometry) for pairs in start]
    budgets = np.linspace(cheapest(model), geometry.bytes(start[-1]), 40).astype(int)
    while len(trials) < n_trials:
        x, floor = fit(model, trials)
        prices = model.prices(x)
        plans = [solve(model, prices, int(b)) for b in budgets]
        fits = [p for p in plans if floor + float(model.features(p) @ x) <= max_kld] or [plans[-1]]
        new = next((p for p in fits if p not in {t.pairs for t in trials}), None)
        if new is None:
            break
        trials.append(Trial.of(new, evaluate(new), geometry))
        if progress:
            progress(len(trials), n_trials)
        if sum(t.kld <= max_kld for t in trials[-4:]) >= 3 and len(trials) > len(start) + 8:
            break
    return Trials(tuple(trials))


def contrast(model: Additive, geometry: Geometry, max_bytes: int, rng: np.random.Generator) -> tuple[Pair, ...]:
    """Half of the layers at their worst pair near the goal, half at their best, K and V apart where a layer can: a plan for fitting."""
    bits = geometry.bits_of(max_bytes)
    pairs = [Pair("", "")] * model.n_layer
    n = len(model.il)
    low_k, low_v = rng.permutation(n) < n / 2, rng.permutation(n) < n / 2
    for row, il in enumerate(model.il):
        held = {pair: i for i, pair in enumerate(model.pairs) if not np.isnan(model.sq_k[row, i])}
        allowed = [held[pair] for pair in near(list(held), bits)]
        size = model.n_bytes[row]

        def preference(i: int) -> float:
            k, v = model.sq_k[row, i], model.sq_v[row, i]
            return (-k if low_k[row] else k) + (-v if low_v[row] else v)

        pairs[il] = model.pairs[min(allowed, key=lambda i: (preference(i), size[i]))]
    return tuple(pairs)
