"""The two searches, on a model that is a formula."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from kvtuner_gguf import Geometry, Pair
from kvtuner_gguf.calibrate.goals import Search, WithinBytes, WithinKld
from kvtuner_gguf.calibrate.kld_model import KldModel
from kvtuner_gguf.calibrate.methods import fitted, known_trials, paper
from kvtuner_gguf.calibrate.progress import Silent
from kvtuner_gguf.calibrate.results import ErrorTable
from kvtuner_gguf.calibrate.solve import uniform_pairs

TYPES = ("f16", "q8_0", "q4_0", "q2_64")
PAIRS = tuple(Pair(k, v) for k in TYPES for v in TYPES)
N_LAYER = 3
GEOMETRY = Geometry((6400,) * N_LAYER, (6400,) * N_LAYER, 100)
STEP = {"f16": 0.0, "q8_0": 0.01, "q4_0": 0.1, "q2_64": 0.5}
WEIGHT_K, WEIGHT_V = np.array([4.0, 1.0, 0.25]), np.array([0.5, 0.25, 2.0])


def by(spent: int = 0, n_trials: int | None = None) -> Search:
    return Search(GEOMETRY, spent, n_trials, seed=0, progress=Silent())


def errors() -> ErrorTable:
    """The same in every layer: how much a layer matters is for runs to tell."""
    row = [(STEP[p.type_k] ** 2 + STEP[p.type_v] ** 2) ** 0.5 for p in PAIRS]
    table = np.array([row] * N_LAYER)
    return ErrorTable(PAIRS, tuple(range(N_LAYER)), {"output_error": table, "stream_error": table})


def kld(pairs: tuple[Pair, ...]) -> float:
    k, v = (np.array([STEP[t] ** 2 for t in side]) for side in zip(*((p.type_k, p.type_v) for p in pairs)))
    return float(WEIGHT_K @ k + WEIGHT_V @ v) / 100 + 1e-5 * any(p != PAIRS[0] for p in pairs)


def best_within(n_bytes: int) -> float:
    menus = product([p for p in PAIRS if "f16" not in (p.type_k, p.type_v)], repeat=N_LAYER)
    return min(kld(pairs) for pairs in menus if GEOMETRY.bytes(pairs) <= n_bytes)


GOAL = WithinBytes(27000)  # q4_0 everywhere is 21600


@pytest.mark.parametrize("spent", [0, 1000])
def test_the_default_finds_what_no_error_tells(spent):
    runs = []

    def run(pairs: tuple[Pair, ...]) -> float:
        runs.append(pairs)
        return kld(pairs)

    kld_model = KldModel.of(errors(), GEOMETRY)
    uniform = uniform_pairs(kld_model, GEOMETRY, GOAL.max_bytes)
    found = fitted(kld_model, uniform, run, GOAL, by(spent))
    assert found.n_bytes + spent <= GOAL.n_bytes
    assert found.kld <= 1.05 * best_within(GOAL.n_bytes - spent)
    assert found.kld < 0.8 * min(kld(p) for p in uniform if GEOMETRY.bytes(p) + spent <= GOAL.n_bytes)


def test_a_few_runs_are_as_many_as_allowed():
    runs = set()

    def run(pairs: tuple[Pair, ...]) -> float:
        runs.add(pairs)
        return kld(pairs)

    kld_model = KldModel.of(errors(), GEOMETRY)
    uniform = uniform_pairs(kld_model, GEOMETRY, GOAL.max_bytes)
    fitted(kld_model, uniform, run, GOAL, by(0, 12))
    assert len(uniform) < len(runs) <= 12


def test_a_kld_is_met_with_few_bytes():
    kld_model = KldModel.of(errors(), GEOMETRY)
    goal = WithinKld(best_within(GOAL.n_bytes) * 1.02)
    uniform = uniform_pairs(kld_model, GEOMETRY, None)
    found = fitted(kld_model, uniform, kld, goal, by())
    assert found.kld <= goal.max_kld and found.n_bytes <= 1.1 * GOAL.n_bytes


def test_the_papers_search_takes_its_types_and_stays_within_the_goal():
    types = ("q8_0", "q4_0", "q2_64")
    found = paper(errors(), types, kld, GOAL, by(0, 40))
    assert {t for p in found.pairs for t in (p.type_k, p.type_v)} <= {*types}
    assert found.n_bytes <= GOAL.n_bytes


def test_runs_that_are_read_back_are_those_of_these_types_that_tell_prices():
    kld_model = KldModel.of(errors().of_types(("f16", "q8_0", "q4_0")), GEOMETRY)
    good, foreign, replaced = ((Pair.parse(p),) + (PAIRS[0],) * (N_LAYER - 1) for p in ("q4_0", "q2_64", "q8_0"))
    runs = [(good, 0.1), (foreign, 0.1), (replaced, 0.3)]
    assert [t.pairs for t in known_trials(kld_model, runs, GEOMETRY)] == [good]
