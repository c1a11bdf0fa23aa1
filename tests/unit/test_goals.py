"""What a goal makes of trials and prices, worked by hand."""

from __future__ import annotations

import numpy as np
import pytest

from kvtuner_gguf import Geometry, Pair
from kvtuner_gguf.calibrate.goals import Search, Target, WithinBits, WithinBytes, WithinKld
from kvtuner_gguf.calibrate.kld_model import Fit, KldModel
from kvtuner_gguf.calibrate.progress import Silent
from kvtuner_gguf.calibrate.results import ErrorTable, Trial, Trials
from kvtuner_gguf.errors import CalibrationError

F16, Q8, Q4 = Pair.parse("f16"), Pair.parse("q8_0"), Pair.parse("q4_0")
GEOMETRY = Geometry((6400, 6400), (6400, 6400), 100)  # two layers; a pair of q4_0 is 7200 bytes, of q8_0 13600
SMALL, MIDDLE, LARGE = (
    Trial.of(pairs, kld, GEOMETRY) for pairs, kld in (((Q4, Q4), 0.08), ((Q4, Q8), 0.05), ((Q8, Q8), 0.01))
)
TRIALS = Trials((LARGE, SMALL, MIDDLE))


def model() -> KldModel:
    """One error for each type, and a layer that bears twice as much as the other."""
    error = np.array([[0.0, 0.1, 0.4, 0.1, 0.4, 0.1, 0.4], [0.0, 0.2, 0.8, 0.2, 0.8, 0.2, 0.8]])
    pairs = ("f16", "q8_0/f16", "q4_0/f16", "f16/q8_0", "f16/q4_0", "q8_0", "q4_0")
    return KldModel.of(ErrorTable(tuple(map(Pair.parse, pairs)), (0, 1), {"stream_error": error}), GEOMETRY)


def test_a_number_of_bits_is_one_of_bytes_at_a_context():
    assert WithinBits(4.5).at(GEOMETRY) == WithinBytes(SMALL.n_bytes) == WithinBytes(14400)
    assert WithinBytes(7).at(GEOMETRY) == WithinBytes(7) and WithinKld(0.1).at(GEOMETRY) == WithinKld(0.1)


def test_bytes_choose_the_lowest_kld_that_fits():
    assert WithinBytes(LARGE.n_bytes).choose(TRIALS, 0) == LARGE
    assert WithinBytes(LARGE.n_bytes).choose(TRIALS, 1) == MIDDLE  # a byte goes to K's vectors
    assert WithinBytes(SMALL.n_bytes + 5).choose(TRIALS, 5) == SMALL
    with pytest.raises(CalibrationError, match=f"the smallest plan tried has {SMALL.n_bytes + 6}"):
        WithinBytes(SMALL.n_bytes + 5).choose(TRIALS, 6)


def test_a_kld_chooses_the_fewest_bytes_that_hold_it():
    assert [WithinKld(kld).choose(TRIALS, 0) for kld in (0.01, 0.049, 0.05, 1)] == [LARGE, LARGE, MIDDLE, SMALL]
    with pytest.raises(CalibrationError, match="the best plan tried has 0.010000"):
        WithinKld(0.009).choose(TRIALS, 0)


def test_bytes_spent_on_vectors_are_not_left_to_the_pairs():
    assert WithinBytes(100).left(30) == 70 and WithinKld(1).left(30) is None
    assert not WithinBytes(100).allows(101) and WithinKld(1).allows(10**12)


def test_the_plan_within_bytes_gives_them_to_the_layer_that_bears_less():
    x = np.ones(4)
    assert WithinBytes(20800).solve(Fit(model(), x, 0.0), 0) == (Q4, Q8)
    assert WithinBytes(20800).solve(Fit(model(), x, 0.0), 1) != (Q4, Q8)


def test_the_smallest_plan_within_a_kld():
    x = np.ones(4)  # q4_0 and q8_0: 2 * 0.16 + 2 * 0.04 = 0.4, the other way round 2 * 0.64 + 2 * 0.01 = 1.3
    assert WithinKld(0.45).solve(Fit(model(), x, 0.04), 0) == (Q4, Q8)
    assert WithinKld(1.65).solve(Fit(model(), x, 0.04), 0) == (Q4, Q4)
    with pytest.raises(CalibrationError, match="rounding of any quantized cache alone costs 0.500000"):
        WithinKld(0.45).solve(Fit(model(), x, 0.5), 0)


@pytest.mark.parametrize(("goal", "best"), [(WithinBytes(20800), (Q4, Q8)), (WithinKld(0.45), (Q4, Q8))])
def test_runs_around_the_goal_end_at_its_plan(goal, best):
    kld_model, seen = model(), []

    def kld(pairs: tuple[Pair, ...]) -> float:
        return 1e-3 + float(kld_model.features(pairs).sum())

    known = [Trial.of(p, kld(p), GEOMETRY) for p in ((Q8, F16), (F16, Q8), (Q4, Q4), (Q8, Q8), (Q4, F16), (F16, Q4))]
    by = Search(GEOMETRY, 0, None, 1, Silent())
    found = goal.refine(kld_model, known, kld, by, 6, seen.append)
    assert found.pairs == best and found.kld == pytest.approx(0.401)
    assert set(seen) == {1} and len(seen) <= 6


def test_both_goals_may_be_asked_the_same():
    """What the pipeline asks of a goal, either kind has."""
    asked = {name for name in vars(Target) if not name.startswith("_")} | {"on_copy"}
    for goal in (WithinBytes(1), WithinKld(1.0)):
        assert isinstance(goal, Target) and not type(goal).__abstractmethods__
        assert asked <= {*dir(goal)}
