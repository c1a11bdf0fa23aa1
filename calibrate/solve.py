"""Prices -> plans: the best one under a byte budget, exactly, and the searches that put the model to the test where it
will be used."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from kvtuner_gguf.calibrate.kld_model import F16, Fit, KldModel, fit
from kvtuner_gguf.calibrate.results import Evaluate, Sensitivity, Trial, Trials
from kvtuner_gguf.codecs import codec
from kvtuner_gguf.errors import CalibrationError
from kvtuner_gguf.geometry import Geometry
from kvtuner_gguf.pair import Pair

# bits per value around the goal, within which uniform pairs are worth a run: far off, KLDs no longer add up
REACH = 2.75
TIME_LIMIT = 10.0  # of one integer program, seconds
# how far, and how often, a KLD that is aimed at is lowered where the plan for it was run before
STEP, N_STEPS = 0.97, 20
SPREAD = 0.3  # of the prices of a first refinement, as logarithms: one standard deviation


def cheapest(kld_model: KldModel) -> int:
    """Fewest bytes that any plan can have."""
    return int(np.where(np.isnan(kld_model.sq_k), np.inf, kld_model.n_bytes).min(axis=1).sum())


def solve(kld_model: KldModel, prices: np.ndarray, max_bytes: int) -> tuple[Pair, ...]:
    """The plan of the lowest summed price within max_bytes, by integer programming (SciPy's HiGHS), to 0.01 %.

    prices  (n_il, n_pair), NaN where not allowed
    Raises CalibrationError if no plan fits.
    """
    if cheapest(kld_model) > max_bytes:
        raise CalibrationError(
            f"budget of {max_bytes} bytes: the cheapest plan of these types needs {cheapest(kld_model)}. Allow more "
            "bits, or cheaper types."
        )
    plan = _program(kld_model, prices, prices, kld_model.n_bytes, max_bytes)
    if plan is None:
        raise CalibrationError(
            f"budget of {max_bytes} bytes: the solver found no plan in {TIME_LIMIT:g} s. Allow more bits."
        )
    return plan


def fewest_bytes(kld_model: KldModel, prices: np.ndarray, max_price: float) -> tuple[Pair, ...] | None:
    """The plan of the fewest bytes whose summed price is within max_price, likewise; None if there is none. Shapes as
    in solve."""
    return _program(kld_model, prices, kld_model.n_bytes, prices, max_price) if max_price > 0 else None


def _program(
    kld_model: KldModel, prices: np.ndarray, cost: np.ndarray, size: np.ndarray, limit: float
) -> tuple[Pair, ...] | None:
    """One pair for each layer, of the lowest summed cost whose summed size is within the limit. cost, size (n_il,
    n_pair)"""
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import coo_array

    rows, columns = np.nonzero(_undominated(prices, kld_model.n_bytes))
    of_each, size_of_each = cost[rows, columns], size[rows, columns]
    one_each = coo_array((np.ones(len(rows)), (rows, np.arange(len(rows)))), shape=(len(kld_model.il), len(rows)))
    unit = limit / 1e3  # HiGHS' tolerances are absolute
    result = milp(
        of_each / max(float(of_each.max()), 1e-30),
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint((size_of_each / unit)[None, :], -np.inf, limit / unit),
        ],
        integrality=np.ones(len(rows)),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 1e-4, "time_limit": TIME_LIMIT},
    )
    if result.x is None:
        return None
    pairs = [Pair("", "")] * kld_model.n_layer
    for i in np.nonzero(result.x > 0.5)[0]:
        pairs[kld_model.il[rows[i]]] = kld_model.pairs[columns[i]]
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


def near(pairs: Sequence[Pair], bits: float) -> list[Pair]:
    """The pairs of types within REACH of so many bits per value; all if none is, but f16 only where it must be."""
    quantized = [p for p in pairs if "f16" not in vars(p).values()] or list(pairs)
    return [
        p for p in quantized if all(abs(codec(t).bits_per_value - bits) < REACH for t in vars(p).values())
    ] or quantized


def uniform_pairs(kld_model: KldModel, geometry: Geometry, max_bytes: int | None) -> list[tuple[Pair, ...]]:
    """Uniform plans to compare with and to fit the model to: the likeliest within the budget; cheapest and best at the
    ends. Stock can run them: none has a type of groups, which is nothing without a basis.

    max_bytes  None: no budget, and the plan of the most bytes is the last
    """
    quantized = [
        (i, p) for i, p in enumerate(kld_model.pairs) if p.type_k != "f16" != p.type_v and not codec(p.type_k).groups
    ]
    everywhere = [p for i, p in quantized if not np.isnan(kld_model.sq_k[:, i]).any()]
    plans = {p: tuple(p if il in kld_model.il else Pair("", "") for il in range(kld_model.n_layer)) for p in everywhere}
    sizes = {p: geometry.bytes(plans[p]) for p in everywhere}
    sums = {p: kld_model.features(plans[p]).reshape(2, -1).sum(axis=1) for p in everywhere}
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


def refine(
    kld_model: KldModel,
    known: Sequence[Trial],
    evaluate: Evaluate,
    geometry: Geometry,
    max_bytes: int,
    *,
    n_trials: int,
    seed: int,
    progress: Callable[[int], None] = lambda n: None,
) -> tuple[Trials, Trial]:
    """All trials, and the plan within max_bytes that the model, fitted to all of them, holds for the best.

    known     what was run before: uniform pairs, prices
    evaluate  one pair per layer -> KLD, nats. Never called twice with the same pairs.
    n_trials  runs to make: the fitted model's own solutions, with noise on its prices that shrinks to none, since the
              KLDs of low types do not quite add up, and least where they were not measured together
    """
    rng = np.random.default_rng(seed)
    tried = {t.pairs: t for t in known}
    n_known = len(tried)

    def run(pairs: tuple[Pair, ...]) -> Trial:
        if pairs not in tried:
            tried[pairs] = Trial.of(pairs, float(evaluate(pairs)), geometry)
            progress(1)
        return tried[pairs]

    stale = 0
    while len(tried) - n_known < n_trials - 1 and stale < 10:
        found = fit(kld_model, list(tried.values()))
        spread = SPREAD * (1 - (len(tried) - n_known) / n_trials) + 0.1 * stale
        noise = np.exp(spread * rng.standard_normal(len(found.x)))
        plan = solve(kld_model, found.kld_model.prices(found.x * noise), max_bytes)
        stale = stale + 1 if plan in tried else 0
        run(plan)
    best = run(solve(kld_model, fit(kld_model, list(tried.values())).prices, max_bytes))
    return Trials(tuple(tried.values())), best


def kld_search(
    kld_model: KldModel,
    known: Sequence[Trial],
    evaluate: Evaluate,
    geometry: Geometry,
    max_kld: float,
    *,
    n_trials: int,
    progress: Callable[[int], None] = lambda n: None,
) -> Trials:
    """Trials towards the fewest bytes whose KLD is within max_kld: what the fitted model, corrected by each run, says
    they are.

    known     what was run before: uniform pairs, prices
    evaluate  one pair per layer -> KLD, nats
    n_trials  runs to make; fewer if the same plan is found again
    """
    tried = {t.pairs: t for t in known}
    n_known = len(tried)
    while len(tried) - n_known < n_trials:
        found = fit(kld_model, list(tried.values()))
        plans = (
            fewest_bytes(kld_model, found.prices, (max_kld - found.floor) * STEP**i) or finest(kld_model)
            for i in range(N_STEPS)
        )
        new = next((plan for plan in plans if plan not in tried), None)
        if new is None:
            break
        tried[new] = Trial.of(new, evaluate(new), geometry)
        progress(1)
        if len(tried) - n_known > 8 and sum(t.kld <= max_kld for t in list(tried.values())[-4:]) >= 3:
            break
    return Trials(tuple(tried.values()))


def finest(kld_model: KldModel) -> tuple[Pair, ...]:
    """The quantized plan that does least harm; f16 where a layer holds no quantized pair."""
    return kld_model.lowered({row: kld_model.finest(row) or F16 for row in range(len(kld_model.il))})


def front(found: Fit, n_points: int = 20) -> list[tuple[tuple[Pair, ...], float]]:
    """(plan, predicted KLD) of budgets from the cheapest plan to the best of quantized pairs; distinct, by ascending
    bytes."""
    kld_model, prices = found.kld_model, found.prices
    dearest = finest(kld_model)
    most = sum(kld_model.n_bytes[row, kld_model.column[dearest[il]]] for row, il in enumerate(kld_model.il))
    plans = dict.fromkeys(solve(kld_model, prices, int(b)) for b in np.linspace(cheapest(kld_model), most, n_points))
    return [(plan, found.kld(plan)) for plan in plans]


def sensitivities(found: Fit) -> tuple[Sensitivity, ...]:
    """What each type adds to the KLD on each side of each layer, the other side at f16."""
    result = []
    for row, il in enumerate(found.kld_model.il):
        for pair, price in zip(found.kld_model.pairs, found.prices[row]):
            side = _side(found.kld_model, row, pair)
            if side and np.isfinite(price):
                name = pair.type_v if side == "v" else pair.type_k
                result.append(Sensitivity(il, side, name, codec(name).bits_per_value, float(price)))
    return tuple(sorted(result, key=lambda s: (s.il, s.side, -s.bits_per_value, s.type)))


def _side(kld_model: KldModel, row: int, pair: Pair) -> str:
    """Which side of a layer a pair alone tells of; "" if it is both."""
    if (pair.type_k == "f16") != (pair.type_v == "f16"):
        return "v" if pair.type_k == "f16" else "k"
    alone = kld_model.column.get(Pair(pair.type_k, "f16"))
    in_one = alone is None or np.isnan(kld_model.sq_k[row, alone])  # V lies in K's rows
    return "kv" if in_one and pair.type_k == pair.type_v != "f16" else ""
