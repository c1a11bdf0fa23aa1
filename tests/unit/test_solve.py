"""The default search on made-up layers, where the right answer is known."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from scipy.optimize import Bounds, LinearConstraint, milp

from kvtuner_gguf.calibrate.kld_model import Fit, KldModel, fit, floor_shape
from kvtuner_gguf.calibrate.prices import MOST, floor_plans, price, price_ladders, replaced
from kvtuner_gguf.calibrate.results import ErrorTable, Trial
from kvtuner_gguf.calibrate.solve import cheapest, fewest_bytes, front, kld_search, refine, solve, uniform_pairs
from kvtuner_gguf.errors import CalibrationError
from kvtuner_gguf.geometry import Geometry
from kvtuner_gguf.kvectors import KVectors
from kvtuner_gguf.pair import Pair

TYPES = ("f16", "q8_0", "q5_0", "q4_0")
ERROR = {"f16": 0.0, "q8_0": 0.01, "q5_0": 0.06, "q4_0": 0.12}
GEOMETRY = Geometry((3200,) * 4, (3200,) * 4, 100)
FLOOR = 0.002
X_K, X_V = np.array([4.0, 1.0, 0.5, 0.1]), np.array([0.4, 0.2, 0.2, 0.1])  # what a layer's error does to the KLD


@pytest.fixture(scope="module")
def model() -> KldModel:
    pairs = tuple(Pair(k, v) for k, v in product(TYPES, TYPES))
    error = np.array([[np.hypot(ERROR[p.type_k], ERROR[p.type_v]) for p in pairs]] * 4)
    return KldModel.of(ErrorTable(pairs, (0, 1, 2, 3), {"stream_error": error}), GEOMETRY)


def kld(pairs: tuple[Pair, ...]) -> float:
    return FLOOR + sum(x * ERROR[p.type_k] ** 2 + y * ERROR[p.type_v] ** 2 for x, y, p in zip(X_K, X_V, pairs))


@pytest.fixture(scope="module")
def every(model: KldModel) -> tuple[np.ndarray, np.ndarray]:
    """(n_plan,) bytes and KLD of every plan there is."""
    size = np.array([GEOMETRY.bytes((pair,) * 4) // 4 for pair in model.pairs])
    harm = np.array(
        [[x * ERROR[p.type_k] ** 2 + y * ERROR[p.type_v] ** 2 for p in model.pairs] for x, y in zip(X_K, X_V)]
    )
    plans = np.array(list(product(range(len(model.pairs)), repeat=4)))
    n_bytes, klds = size[plans].sum(axis=1), FLOOR + harm[range(4), plans].sum(axis=1)
    for i in range(0, len(plans), 4999):
        plan = tuple(model.pairs[column] for column in plans[i])
        assert n_bytes[i] == GEOMETRY.bytes(plan) and klds[i] == pytest.approx(kld(plan), rel=1e-12)
    return n_bytes, klds


def best_within(every: tuple[np.ndarray, np.ndarray], max_bytes: int) -> float:
    n_bytes, klds = every
    return float(klds[n_bytes <= max_bytes].min())


def fewest_within(every: tuple[np.ndarray, np.ndarray], max_kld: float) -> int:
    n_bytes, klds = every
    return int(n_bytes[klds <= max_kld].min())


def test_solver_finds_the_optimum_of_all_plans(model, every):
    prices = model.prices(np.concatenate([X_K, X_V]))
    max_bytes = int(GEOMETRY.bytes((Pair("q5_0", "q5_0"),) * 4) * 1.1)
    plan = solve(model, prices, max_bytes)
    assert GEOMETRY.bytes(plan) <= max_bytes
    assert kld(plan) == pytest.approx(best_within(every, max_bytes), rel=1e-3)


def test_solver_names_the_least_budget(model):
    with pytest.raises(CalibrationError, match=str(cheapest(model))):
        solve(model, model.prices(np.ones(8)), cheapest(model) - 1)
    plan = solve(model, model.prices(np.ones(8)), cheapest(model))
    assert set(plan) == {Pair("q4_0", "q4_0")}


def test_fit_finds_which_layers_matter(model):
    rng = np.random.default_rng(0)
    plans = [tuple(model.pairs[i] for i in rng.integers(len(model.pairs), size=4)) for _ in range(60)]
    found = fit(model, [Trial(p, kld(p), GEOMETRY.bits_per_value(p), GEOMETRY.bytes(p)) for p in plans])
    assert found.x[:4] == pytest.approx(X_K, rel=0.2)
    assert found.floor == pytest.approx(FLOOR, rel=0.2)


def run(pairs: tuple[Pair, ...]) -> Trial:
    return Trial.of(pairs, kld(pairs), GEOMETRY)


def known(model: KldModel, n_runs: int = 8) -> list[Trial]:
    uniform = [(Pair(*names),) * 4 for names in (("q5_0", "q5_0"), ("q4_0", "q5_0"), ("q4_0", "q4_0"))]
    return [run(p) for p in uniform] + [price(ladder, run) for ladder in price_ladders(model, n_runs)]


def test_prices_are_of_one_side_of_one_layer(model):
    ladders = price_ladders(model, 8)
    assert len(ladders) == 8
    for ladder, (side, il) in zip(ladders, product("kv", range(4))):
        for plan, name in zip(ladder, ("q4_0", "q5_0", "q8_0"), strict=True):
            lowered = Pair(name, "f16") if side == "k" else Pair("f16", name)
            assert plan == tuple(lowered if i == il else Pair("f16", "f16") for i in range(4))


@pytest.mark.parametrize("n_runs", [7, 4])
def test_fewer_runs_price_both_sides_of_a_layer_together(model, n_runs):
    ladders = price_ladders(model, n_runs)
    assert [[p != Pair("f16", "f16") for p in ladder[0]].index(True) for ladder in ladders] == [0, 1, 2, 3]
    assert [ladders[0][step][0] for step in range(3)] == [
        Pair("q4_0", "q4_0"),
        Pair("q5_0", "q5_0"),
        Pair("q8_0", "q8_0"),
    ]


def test_the_fewest_runs_price_neighbours_together(model):
    q4, f16 = Pair("q4_0", "q4_0"), Pair("f16", "f16")
    assert [ladder[0] for ladder in price_ladders(model, 2)] == [(q4, q4, f16, f16), (f16, f16, q4, q4)]


def test_prices_of_whole_layers_tell_what_each_costs(model):
    found = fit(model, [*known(model, n_runs=4), *map(run, floor_plans(model))])
    for row in range(4):
        plan = model.lowered({row: Pair("q5_0", "q5_0")})
        # by one price each; without, layers differ eightfold
        assert found.kld(plan) == pytest.approx(kld(plan), rel=0.2)


def test_a_type_that_ruins_the_model_is_no_price(model):
    ladder = price_ladders(model, 8)[0]
    ruined = {ladder[0]: 5.0, ladder[1]: 2 * MOST, ladder[2]: 0.1}
    asked = []

    def run_ruined(pairs: tuple[Pair, ...]) -> Trial:
        asked.append(pairs)
        return Trial.of(pairs, ruined[pairs], GEOMETRY)

    assert price(ladder, run_ruined).pairs == ladder[2]
    assert asked == list(ladder)
    assert [replaced(run_ruined(plan)) for plan in ladder] == [True, True, False]
    assert not replaced(Trial.of((Pair("q4_0", "q4_0"),) * 4, 5.0, GEOMETRY))


def test_floor_is_what_rounding_does_above_a_layer(model):
    plans = floor_plans(model)
    assert [p.index(Pair("q8_0", "q8_0")) for p in plans] == [0, 1, 2, 3]
    trials = [Trial.of(p, k, GEOMETRY) for p, k in zip(plans, (0.004, 0.003, 0.0035, 0.001))]
    assert floor_shape(model, trials) == pytest.approx([1, 0.75, 0.75, 0.25])
    assert floor_shape(model, [run((Pair("q8_0", "q8_0"),) * 4)]) == pytest.approx(np.ones(4))


def test_a_fit_by_prices_foretells_whole_plans(model):
    """The floor too: lower where fewer layers lie above, as rounding has it."""
    shape = np.array([1, 0.8, 0.5, 0.2])

    def of(plan: tuple[Pair, ...]) -> Trial:
        row = model.first_quantized(plan)
        return Trial.of(plan, kld(plan) - FLOOR * (1 - shape[row]), GEOMETRY)

    trials = [of(p) for p in floor_plans(model)] + [price(ladder, of) for ladder in price_ladders(model, 8)]
    found = fit(model, [of((Pair("q5_0", "q5_0"),) * 4), *trials])
    for pair in (Pair("q8_0", "q8_0"), Pair("q5_0", "q4_0"), Pair("q4_0", "q4_0")):
        assert found.kld((pair,) * 4) == pytest.approx(kld((pair,) * 4), rel=0.1)


def test_whole_plans_tell_of_a_type_that_costs_more_than_its_error(model):
    """As types of groups do, whose errors are as large on other channels."""
    dear = np.array([1.6 if pair.type_k == "q5_0" else 1.0 for pair in model.pairs])
    truth = Fit(replace(model, sq_k=model.sq_k * dear), np.concatenate([X_K, X_V]), FLOOR)
    rng = np.random.default_rng(1)
    plans = [tuple(model.pairs[i] for i in rng.integers(len(model.pairs), size=4)) for _ in range(40)]
    trials = [Trial.of(p, truth.kld(p), GEOMETRY) for p in plans[:20]]
    trials += [price(ladder, lambda p: Trial.of(p, truth.kld(p), GEOMETRY)) for ladder in price_ladders(model, 8)]
    found = fit(model, trials)
    factor = found.kld_model.sq_k[0] / np.where(model.sq_k[0] > 0, model.sq_k[0], 1)
    assert {p.type_k for p, f in zip(model.pairs, factor) if f > 1.3} == {"q5_0"}
    foretold = np.array([found.kld(p) / truth.kld(p) for p in plans[20:]])
    assert np.abs(foretold - 1).mean() < 0.07  # .059, .109 without


def test_search_beats_every_uniform_pair_of_its_bytes(model, every):
    max_bytes = GEOMETRY.bytes((Pair("q5_0", "q5_0"),) * 4)
    asked = []

    def evaluate(pairs: tuple[Pair, ...]) -> float:
        asked.append(pairs)
        return kld(pairs)

    before = known(model)
    trials, best = refine(model, before, evaluate, GEOMETRY, max_bytes, n_trials=6, seed=0)
    assert len(asked) == len(set(asked)) == len(trials.trials) - len(before) <= 6
    assert best in trials.trials and best.n_bytes <= max_bytes
    assert best.kld < 1.02 * best_within(every, max_bytes)
    assert best.kld < kld((Pair("q5_0", "q5_0"),) * 4)


def test_search_is_the_same_for_a_seed(model):
    def plans() -> list[tuple[Pair, ...]]:
        trials, _ = refine(model, known(model), kld, GEOMETRY, 15500, n_trials=3, seed=3)
        return [t.pairs for t in trials.trials]

    assert plans() == plans()


def test_least_bytes_within_a_kld(model, every):
    trials = kld_search(model, known(model), kld, GEOMETRY, 0.02, n_trials=5).trials
    assert min(t.n_bytes for t in trials if t.kld <= 0.02) <= 1.1 * fewest_within(every, 0.02)


@pytest.mark.parametrize("max_kld", [0.003, 0.01, 0.02, 0.06])
def test_fewest_bytes_of_all_plans_within_a_kld(model, every, max_kld):
    plan = fewest_bytes(model, model.prices(np.concatenate([X_K, X_V])), max_kld - FLOOR)
    assert kld(plan) <= max_kld * 1.0001
    assert GEOMETRY.bytes(plan) == fewest_within(every, max_kld)


def test_no_plan_is_within_a_kld_below_the_floor(model):
    assert fewest_bytes(model, model.prices(np.concatenate([X_K, X_V])), -0.001) is None


def test_front_never_gets_worse_with_more_bytes(model):
    points = front(Fit(model, np.concatenate([X_K, X_V]), FLOOR))
    sizes, klds = [GEOMETRY.bytes(p) for p, _ in points], [k for _, k in points]
    assert sizes == sorted(sizes) and klds == sorted(klds, reverse=True)
    assert set(points[0][0]) == {Pair("q4_0", "q4_0")} and set(points[-1][0]) == {Pair("q8_0", "q8_0")}
    assert all(k == pytest.approx(kld(p)) for p, k in points)


def test_one_tensor_for_k_and_v_has_one_type(model):
    """Where V lies in K's rows (MLA), the table holds equal pairs only."""
    pairs = tuple(Pair(t, t) for t in TYPES)
    error = np.array([[ERROR[t] for t in TYPES]])
    table = ErrorTable(pairs, (0,), {"stream_error": error})
    mla = KldModel.of(table, Geometry((3200,), (0,), 100))
    assert solve(mla, mla.prices(np.ones(2)), 3200 * 34 // 32) == (Pair("q8_0", "q8_0"),)


def with_groups(n_basis: int) -> KldModel:
    """Four layers with k3_64 for K, which is worth its basis of so many bytes where there is room."""
    types = {**ERROR, "k3_64": 0.08}
    pairs = tuple(Pair(k, v) for k, v in product(types, TYPES))
    error = np.array([[np.hypot(types[p.type_k], ERROR[p.type_v]) for p in pairs]] * 4)
    error[3, [p.type_k == "k3_64" for p in pairs]] = np.nan  # the last layer has no basis
    basis = KVectors((), (), bytes(n_basis), (1.0,) * int(n_basis**0.5))
    geometry = Geometry((3200,) * 4, (3200,) * 4, 100, (basis,) * 3 + (KVectors(),))
    return KldModel.of(ErrorTable(pairs, (0, 1, 2, 3), {"stream_error": error}), geometry)


def test_a_type_of_groups_is_chosen_where_its_basis_pays():
    x = np.concatenate([X_K, X_V])
    for n_basis, pays in ((64, True), (3600, False)):
        found = with_groups(n_basis)
        groups = Pair("k3_64", "q4_0")
        cost = found.n_bytes[:, found.column[groups]]
        assert cost[0] == 3200 // 64 * 25 + 3200 // 32 * 18 + n_basis + 4 * int(n_basis**0.5)
        plan = solve(found, found.prices(x), 4 * 2 * 3200 // 32 * 18)
        assert ("k3_64" in {p.type_k for p in plan[:3]}) == pays and plan[3].type_k != "k3_64"


def test_a_side_is_priced_by_a_type_that_a_plan_would_take():
    """With a small basis, k3_64 has fewer bytes than q4_0 and less error."""
    for n_basis, coarsest in ((64, "k3_64"), (3600, "q4_0")):
        ladders = price_ladders(with_groups(n_basis), 8)
        assert [ladders[il][0][il].type_k for il in range(4)] == [coarsest] * 3 + ["q4_0"]


def test_no_uniform_pair_has_a_type_of_groups():
    found = with_groups(64)
    everywhere = KldModel(found.il, found.pairs, np.nan_to_num(found.sq_k), found.sq_v, found.n_bytes, 4)
    plans = uniform_pairs(everywhere, GEOMETRY, None)
    assert plans and not [p for plan in plans for p in plan if p.type_k == "k3_64"]


@pytest.mark.parametrize("seed", [318, 899, 1317, 2060])
def test_scipys_solver_prints_nothing(seed, capfd):
    """On plans whose fractions it has to mend: SciPy 1.17 prints a line there, into what --json prints."""
    rng, (n_il, n_pair) = np.random.default_rng(seed), (6, 12)
    bits = np.sort(rng.uniform(2, 16, (n_il, n_pair)), 1)
    cost = np.exp(-0.7 * bits) * rng.lognormal(0, 1.5, (n_il, 1)) * rng.lognormal(0, 0.1, (n_il, n_pair))
    limit = n_il * rng.uniform(3, 6) / 1e3
    of_each = LinearConstraint(np.repeat(np.eye(n_il), n_pair, axis=1), 1, 1)
    in_all = LinearConstraint(np.round(bits * 4096).reshape(1, -1) / (4096 * limit), -np.inf, 1e3)
    integers = {"integrality": np.ones(cost.size), "bounds": Bounds(0, 1), "options": {"mip_rel_gap": 1e-4}}
    assert milp(cost.ravel() / cost.max(), constraints=[of_each, in_all], **integers).x is not None
    assert capfd.readouterr() == ("", "")
