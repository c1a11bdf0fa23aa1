"""A proof is as good as its judge: here one that knows the answer."""

from __future__ import annotations

import pytest

from kvtuner_gguf import Geometry, Pair
from kvtuner_gguf.calibrate.progress import Silent
from kvtuner_gguf.calibrate.proof import _shuffled, best_rivals, everywhere, prove, prove_own, ungrouped
from kvtuner_gguf.calibrate.results import Trial
from kvtuner_gguf.calibrate.write import plan_of
from kvtuner_gguf.kvectors import KVectors
from kvtuner_gguf.quality import Quality

Q8, Q4, MIX = Pair.parse("q8_0"), Pair.parse("q4_0"), Pair.parse("q8_0/q4_0")
NONE = Pair("", "")
GEOMETRY = Geometry((6400, 0, 6400), (6400, 0, 6400), 100)
PLAN = Trial.of((Q8, NONE, Q4), 0.02, GEOMETRY)
RIVAL, SECOND = (Trial.of((p, NONE, p), kld, GEOMETRY) for p, kld in ((MIX, 0.03), (Q4, 0.05)))


class Judge:
    """The KLD of each plan from a table; K's vectors are worth a tenth."""

    def __init__(self, of_plan: float, of_rival: float, vectors: tuple[KVectors, ...] = ()) -> None:
        self.klds = {PLAN.pairs: of_plan, RIVAL.pairs: of_rival, SECOND.pairs: 0.5, (Q4, NONE, Q8): 0.4}
        self.vectors, self.asked = vectors, []

    def vectors_of(self, pairs):
        return self.vectors

    def of_plan(self, pairs):
        self.asked.append(("plan", pairs))
        return Quality(self.klds[pairs] * 0.9, 1.0, 0.9)

    def of_stock(self, pairs):
        self.asked.append(("stock", pairs))
        return Quality(self.klds.get(pairs, 0.001), 1.0, 0.9)

    def of_floor(self, f16):
        self.asked.append(("floor", f16))
        return Quality(0.0001, 0.01, 0.99)


def proved(judge, **options):
    return prove(PLAN, [RIVAL, SECOND], judge, GEOMETRY, seed=0, progress=Silent(), **options)


def test_the_plan_wins_by_its_own_figure():
    proof = proved(Judge(0.04, 0.05))
    assert proof.beside.verdict == "won" and proof.quality.kld_mean == pytest.approx(0.036)
    assert proof.best[1] == RIVAL and proof.best[0].kld_mean == pytest.approx(0.05)


def test_a_plan_that_loses_is_said_to():
    proof = proved(Judge(0.06, 0.05))
    assert proof.beside.verdict == "lost" and proof.best[1] == RIVAL
    assert proved(Judge(0.05 / 0.9, 0.05)).beside.verdict == "tie"


def test_without_a_rival_there_is_nothing_to_lose_to():
    assert prove(PLAN, [], Judge(9.0, 0.0), GEOMETRY, seed=0, progress=Silent()).beside is None


def test_the_table_shows_floor_plan_rival_and_what_is_named():
    vectors = (KVectors((0.5,) * 4), KVectors(), KVectors((0.5,) * 4))
    judge = Judge(0.04, 0.05, vectors)
    rows = {row.name: row for row in proved(judge, named=("q8_0",)).rows}
    assert list(rows)[:4] == [
        "f16 (noise floor)",
        "plan",
        "plan, K not conditioned",
        "best uniform pair, q8_0/q4_0",
    ]
    assert "q8_0/q8_0" in rows and rows["f16 (noise floor)"].bits_per_value == 16
    # the bytes of K's vectors are counted where they are used
    assert rows["plan"].n_bytes == rows["plan, K not conditioned"].n_bytes + 2 * 4 * 4
    assert rows["plan"].quality.kld_mean < rows["plan, K not conditioned"].quality.kld_mean


def test_what_was_proved_on_a_copy_is_shown_on_the_model_itself():
    vectors = (KVectors((0.5,) * 4), KVectors(), KVectors((0.5,) * 4))
    judge = Judge(0.04, 0.05, vectors)
    plan = plan_of(PLAN.pairs, vectors, GEOMETRY, {})
    floor, row = prove_own(plan, judge, GEOMETRY, Silent())
    assert [floor.name, row.name] == ["own weights, f16 (noise floor)", "own weights, plan"]
    assert floor.quality.kld_mean == pytest.approx(0.0001) and row.quality.kld_mean == pytest.approx(0.036)
    assert row.bits_per_value == pytest.approx(plan.bits_per_value)
    uniform = plan_of(RIVAL.pairs, (), GEOMETRY, {})  # which is written where the plan lost
    assert prove_own(uniform, judge, GEOMETRY, Silent())[1].quality.kld_mean == pytest.approx(0.05)


def test_rivals_run_as_stock_runs_them():
    judge = Judge(0.04, 0.05, (KVectors((0.5,) * 4), KVectors(), KVectors()))
    proved(judge)
    assert ("stock", RIVAL.pairs) in judge.asked and ("plan", RIVAL.pairs) not in judge.asked
    assert ("floor", everywhere("f16", [True, False, True])) in judge.asked


def test_rivals_are_the_two_best_that_fit():
    close, large = Trial.of((Q4, NONE, Q4), 0.035, GEOMETRY), Trial.of((Q8, NONE, Q8), 0.028, GEOMETRY)
    assert best_rivals([close, large, RIVAL], RIVAL.n_bytes) == [RIVAL, close]
    assert best_rivals([close, large, RIVAL], large.n_bytes) == [large, RIVAL]
    assert best_rivals([close, large], 0) == []


def test_a_rival_far_behind_in_the_search_is_not_run_again():
    assert SECOND.kld > 1.3 * RIVAL.kld
    assert best_rivals([SECOND, RIVAL], RIVAL.n_bytes) == [RIVAL]


def test_a_plan_says_what_it_beat_and_what_it_costs():
    quality, rival = Quality(0.03, 0.1, 0.9), (Quality(0.04, 0.2, 0.8), RIVAL)
    plan = plan_of(PLAN.pairs, (), GEOMETRY, {"method": "fitted", "seed": 3}, quality, rival)
    assert plan.bits_per_value == pytest.approx(PLAN.bits_per_value) and plan.quality == quality
    assert (plan.rival, plan.rival_quality) == (MIX, rival[0])
    assert plan.rival_bits == pytest.approx(RIVAL.bits_per_value) and plan.calibration["seed"] == 3
    alone = plan_of(PLAN.pairs, (), GEOMETRY, {})
    assert alone.quality is None and alone.rival is None


def test_types_of_groups_are_shuffled_among_layers_with_a_basis():
    pairs = tuple(map(Pair.parse, ("k4_64/q8_0", "q8_0/q4_0", "k2_64/q4_0", "q4_0/q2_64", "k3_64/q3_64", "q6_32/q8_0")))
    found = {_shuffled(pairs, [True] * 6, seed) for seed in range(20)}
    assert len(found) > 10 and all(sorted(plan) == sorted(pairs) for plan in found)
    assert {tuple(i for i, p in enumerate(plan) if p.type_k.startswith("k")) for plan in found} == {(0, 2, 4)}


def test_without_bases_types_of_groups_give_way_to_their_neighbours():
    pairs = (
        *map(Pair.parse, ("k5_64/q5_0", "k4_64/q8_0", "k3_64/q3_64", "k2_64/q2_64", "f16/q8_0", "q6_32/f16")),
        NONE,
    )
    assert [str(p) for p in ungrouped(pairs)] == [
        "q5_0/q5_0",
        "t4_64/q8_0",
        "t3_64/q3_64",
        "t2_64/q2_64",
        "f16/q8_0",
        "q6_32/f16",
        "/",
    ]
