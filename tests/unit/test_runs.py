"""How much of the text a run is measured on, and what it comes to on all of it."""

from __future__ import annotations

import pytest

from kvtuner_gguf.calibrate.runs import on_all_of
from kvtuner_gguf.pair import Pair, Pairs
from kvtuner_gguf.quality import Quality


def plan(*pairs: str) -> Pairs:
    return tuple(Pair("", "") if p == "/" else Pair.parse(p) for p in pairs)


def of_blocks(*blocks: float) -> Quality:
    return Quality(sum(blocks) / len(blocks), 1.0, 0.9, blocks=blocks)


def test_half_of_the_text_counts_for_what_all_of_it_does():
    """The second half is three times as hard as the first, by the uniform plans: in sum twice the one, 2/3 of the
    other."""
    uniform, whole = plan("q4_0/q4_0", "/", "q4_0/q4_0"), plan("q4_0/q8_0", "/", "q8_0/q8_0")
    k, v = plan("q4_0/f16", "/", "f16/f16"), plan("f16/f16", "/", "f16/q4_0")
    both = plan("q4_0/q4_0", "/", "f16/f16")
    runs = [(uniform, of_blocks(0.1, 0.1, 0.3, 0.3)), (plan("q8_0", "/", "q8_0"), of_blocks(0.01, 0.01, 0.03, 0.03))]
    runs += [(p, of_blocks(0.01, 0.03)) for p in (k, v)]
    runs += [(p, of_blocks(0.2, 0.2, 0.2, 0.2)) for p in (both, whole)]
    found = dict(on_all_of(runs, 2))
    assert found[k] == pytest.approx(0.04) and found[v] == pytest.approx(0.02 * 2 / 3)
    assert found[both] == found[whole] == pytest.approx(0.2) and found[uniform] == pytest.approx(0.2)


def test_a_text_of_one_chunk_is_not_divided():
    k = plan("q4_0/f16", "f16/f16")
    assert on_all_of([(k, of_blocks(0.1, 0.3)), (plan("q4_0", "q4_0"), of_blocks(1, 2))], 1)[0] == (
        k,
        pytest.approx(0.2),
    )


def test_without_a_uniform_plan_a_half_counts_as_it_is():
    k = plan("q4_0/f16", "f16/f16")
    assert on_all_of([(k, of_blocks(0.1, 0.3))], 2) == [(k, pytest.approx(0.2))]
