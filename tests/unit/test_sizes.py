"""The text that the stages work on is there, however few positions a model has."""

from __future__ import annotations

import pytest

from kvtuner_gguf.calibrate.sizes import Sizes


@pytest.mark.parametrize("n_positions", [32, 64, 100, 128, 511, 512, 513, 1000, 1024, 2048])
def test_each_stage_has_the_text_that_it_needs(n_positions):
    for n_chunk in (2, 3, 4, 5, 7, 12, 1000):
        _check_sizes(Sizes(n_chunk, 1024, 512, 4).fitting(lambda n: min(n, n_positions)), n_positions)


def _check_sizes(sizes: Sizes, n_positions: int) -> None:
    assert 16 <= sizes.search_ctx <= sizes.stream <= min(1024, n_positions)
    assert 0 < sizes.n_vectors < sizes.n_captured and sizes.n_captured * sizes.stream <= sizes.n_calibration
    of_no_vector = sizes.n_calibration - sizes.n_vectors * sizes.stream
    assert sizes.n_searched * sizes.search_ctx <= of_no_vector
    skipped = sizes.skipped(sizes.search_ctx)
    assert 0 <= skipped < sizes.search_ctx and sizes.n_heldout >= sizes.stream
    assert sizes.n_scored >= sizes.n_searched * ((sizes.search_ctx - skipped) // sizes.search_every)


def test_a_model_without_a_table_gets_the_sizes_as_they_are():
    assert Sizes(4, 1024, 512, 4).fitting(lambda n: n) == Sizes(4, 1024, 512, 4)
