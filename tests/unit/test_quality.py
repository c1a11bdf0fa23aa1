"""A plan's KLD beside a rival's, within what the text allows to say."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from kvtuner_gguf.calibrate.kld import Chunks, quality_of
from kvtuner_gguf.quality import Beside, Comparison, Grade, Quality, Row, standard_error
from kvtuner_gguf.report import comparison_text


def of_blocks(*blocks: float) -> Quality:
    mean = sum(blocks) / len(blocks)
    return Quality(mean, 1.0, 0.9, 100, standard_error(blocks), 0.0, blocks)


def test_the_standard_error_is_of_blocks_and_not_of_positions():
    """A position repeated tells nothing new."""
    of_block = np.random.default_rng(0).exponential(size=(4, 4))
    kld = np.repeat(of_block.reshape(-1), 256)
    quality = quality_of(kld, kld > 1, Chunks(np.zeros((4, 1024), np.int32), 0))
    assert quality.blocks == pytest.approx(of_block.reshape(-1))
    assert quality.kld_se == pytest.approx(of_block.std(ddof=1) / 4, rel=1e-6)
    assert quality.same_top_se == pytest.approx((of_block > 1).std(ddof=1) / 4, rel=1e-6)
    every = quality_of(kld[3::4], kld[3::4] > 1, Chunks(np.zeros((4, 1024), np.int32), 0, 4))
    assert every.blocks == pytest.approx(quality.blocks) and every.n_positions == 1024


def test_a_short_text_has_shorter_blocks():
    quality = quality_of(np.arange(32.0), np.ones(32, bool), Chunks(np.zeros((2, 32), np.int32)))
    assert len(quality.blocks) == 8 and quality.kld_se > 0 and quality.same_top_se == 0


def test_what_a_text_does_to_both_does_not_count():
    plan, rival = of_blocks(0.009, 0.018, 0.091, 0.045), of_blocks(0.01, 0.02, 0.1, 0.05)
    beside = Beside.of(plan, rival)
    assert beside.ratio == pytest.approx(0.163 / 0.18) and beside.ratio_se < 0.01 and beside.verdict == "won"
    assert rival.kld_se > 0.3 * rival.kld_mean  # by which nothing could be said
    assert Beside.of(rival, plan).verdict == "lost"


def test_a_plan_behind_within_the_noise_is_a_tie():
    rival = of_blocks(0.01, 0.02, 0.1, 0.05)
    assert Beside.of(of_blocks(0.012, 0.019, 0.104, 0.049), rival).verdict == "tie"
    assert Beside.of(rival, rival) == Beside(1.0, 0.0)


def test_without_blocks_the_errors_of_both_count():
    plan, rival = Quality(0.02, 1, 0.9, 9, 0.003), Quality(0.04, 1, 0.9, 9, 0.004)
    beside = Beside.of(plan, rival)
    assert beside.ratio == pytest.approx(0.5)
    assert beside.ratio_se == pytest.approx((0.003**2 + 0.002**2) ** 0.5 / 0.04)


def test_a_rival_without_any_kld():
    none = Quality(0, 0, 1)
    assert Beside.of(none, none).verdict == "tie" and Beside.of(Quality(0.1, 1, 1), none).verdict == "lost"


@pytest.mark.parametrize(
    ("kld", "se", "word", "is_clear"),
    [
        (0.003, 0.001, "safe", True),
        (0.009, 0.001, "safe", False),
        (0.012, 0.0005, "visible", True),
        (0.012, 0.002, "visible", False),
        (0.08, 0.005, "visible", True),
        (0.08, 0.02, "visible", False),
        (0.12, 0.02, "broken", False),
        (1.6, 0.2, "broken", True),
    ],
)
def test_a_grade_is_clear_by_two_standard_errors(kld, se, word, is_clear):
    assert Grade.of(Quality(kld, kld, 0.9, kld_se=se)) == Grade(word, is_clear)


def test_the_safe_row_of_the_fewest_bytes_is_named():
    rows = [Row(str(n), n, n, Quality(kld, kld, 0.9)) for n, kld in ((1, 0.0), (16, 0.001), (6, 0.009), (4, 0.02))]
    assert Comparison("", 1, 1, 1, tuple(rows)).safe == rows[2]
    assert Comparison("", 1, 1, 1, (rows[0], rows[3])).safe is None


def test_the_table_names_what_was_measured_on_less_than_all():
    rows = [
        Row(name, 4.5, 1, Quality(kld, kld, 0.5, n_positions=n)) for name, kld, n in (("plan", 0.01, 8), ("q4_0", 2, 4))
    ]
    said = comparison_text(Comparison("some", 8, 16, 1, tuple(rows)))
    assert "8 scored positions in chunks of 16 tokens (fewer of q4_0, as that was clear sooner)" in said
    assert "fewer" not in comparison_text(Comparison("some", 8, 16, 1, (rows[0],)))
    own = (replace(rows[0], name="own weights, plan", quality=Quality(0.02, 0.02, 0.5, n_positions=4)),)
    said = comparison_text(Comparison("some", 8, 16, 1, (rows[0],), weights="bf16", own=own))
    assert "own weights, plan  4.50" in said and "0.02000" in said and "fewer" not in said
    assert "weights in bf16, in the last rows the model's own, on a part of the text" in said
