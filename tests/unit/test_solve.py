"""The default search on made-up layers, where the right answer is known."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from kvtuner_gguf.calibrate.results import ErrorTable, Trial
from kvtuner_gguf.calibrate.solve import Additive, cheapest, fit, fitted_search, solve
from kvtuner_gguf.errors import CalibrationError
from kvtuner_gguf.geometry import Geometry
from kvtuner_gguf.pair import Pair

TYPES = ("f16", "q8_0", "q5_0", "q4_0")
ERROR = {"f16": 0.0, "q8_0": 0.01, "q5_0": 0.06, "q4_0": 0.12}
GEOMETRY = Geometry((3200,) * 4, (3200,) * 4, 100)
FLOOR = 0.002
X_K, X_V = np.array([4.0, 1.0, 0.5, 0.1]), np.array([0.4, 0.2, 0.2, 0.1])  # what a layer's error does to the KLD


@pytest.fixture(scope="module")
def model() -> Additive:
    pairs = tuple(Pair(k, v) for k, v in product(TYPES, TYPES))
    error = np.array([[np.hypot(ERROR[p.type_k], ERROR[p.type_v]) for p in pairs]] * 4)
    return Additive.of(ErrorTable(pairs, (0, 1, 2, 3), *[error] * 6), GEOMETRY)


def kld(pairs: tuple[Pair, ...]) -> float:
    return FLOOR + sum(x * ERROR[p.type_k] ** 2 + y * ERROR[p.type_v] ** 2 for x, y, p in zip(X_K, X_V, pairs))


def best_by_brute_force(model: Additive, max_bytes: int) -> float:
    return min(kld(plan) for plan in product(model.pairs, repeat=4) if GEOMETRY.bytes(plan) <= max_bytes)


def test_solver_finds_the_optimum_of_all_plans(model):
    prices = model.prices(np.concatenate([X_K, X_V]))
    max_bytes = int(GEOMETRY.bytes((Pair("q5_0", "q5_0"),) * 4) * 1.1)
    plan = solve(model, prices, max_bytes)
    assert GEOMETRY.bytes(plan) <= max_bytes
    assert kld(plan) == pytest.approx(best_by_brute_force(model, max_bytes), rel=1e-3)


def test_solver_names_the_least_budget(model):
    with pytest.raises(CalibrationError, match=str(cheapest(model))):
        solve(model, model.prices(np.ones(8)), cheapest(model) - 1)
    plan = solve(model, model.prices(np.ones(8)), cheapest(model))
    assert set(plan) == {Pair("q4_0", "q4_0")}


def test_fit_finds_which_layers_matter(model):
    rng = np.random.default_rng(0)
    plans = [tuple(model.pairs[i] for i in rng.integers(len(model.pairs), size=4)) for _ in range(60)]
    x, floor = fit(model, [Trial(p, kld(p), GEOMETRY.bits_per_value(p), GEOMETRY.bytes(p)) for p in plans])
    assert x[:4] == pytest.approx(X_K, rel=0.2)
    assert floor == pytest.approx(FLOOR, rel=0.2)


def test_search_beats_every_uniform_pair_of_its_bytes(model):
    max_bytes = GEOMETRY.bytes((Pair("q5_0", "q5_0"),) * 4)
    uniform = [(Pair(*names),) * 4 for names in (("q5_0", "q5_0"), ("q4_0", "q5_0"), ("q4_0", "q4_0"))]
    asked = []

    def evaluate(pairs: tuple[Pair, ...]) -> float:
        asked.append(pairs)
        return kld(pairs)

    trials, best = fitted_search(model, uniform, evaluate, GEOMETRY, max_bytes, n_trials=20, seed=0)
    assert len(asked) == len(set(asked)) == len(trials.trials) <= 20
    assert best in trials.trials and best.n_bytes <= max_bytes
    assert best.kld < 1.1 * best_by_brute_force(model, max_bytes)
    assert best.kld < kld(uniform[0])


def test_search_is_the_same_for_a_seed(model):
    def run() -> list[tuple[Pair, ...]]:
        trials, _ = fitted_search(model, [(Pair("q5_0", "q5_0"),) * 4], kld, GEOMETRY, 15500, n_trials=10, seed=3)
        return [t.pairs for t in trials.trials]

    assert run() == run()


def test_one_tensor_for_k_and_v_has_one_type(model):
    """Where V lies in K's rows (MLA), the table holds equal pairs only."""
    pairs = tuple(Pair(t, t) for t in TYPES)
    error = np.array([[ERROR[t] for t in TYPES]])
    table = ErrorTable(pairs, (0,), *[error] * 6)
    mla = Additive.of(table, Geometry((3200,), (0,), 100))
    assert solve(mla, mla.prices(np.ones(2)), 3200 * 34 // 32) == (Pair("q8_0", "q8_0"),)
