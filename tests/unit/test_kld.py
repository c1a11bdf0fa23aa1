"""KL divergence of log-probabilities that were kept as float16, and the pieces it is taken in."""

from __future__ import annotations

import numpy as np
import pytest

from kvtuner_gguf.calibrate.kld import Chunks, _blocks, kl_divergence, log_softmax


def test_kl_divergence_of_two_coins():
    p, q = np.array([[0.5, 0.5], [0.9, 0.1]]), np.array([[0.25, 0.75], [0.9, 0.1]])
    found = kl_divergence(np.log(p).astype(np.float32), (np.log(q) + 7).astype(np.float32))  # logits know no sum
    assert found == pytest.approx([0.5 * np.log(2) + 0.5 * np.log(2 / 3), 0], abs=1e-6)


@pytest.mark.parametrize("n_vocab", [260, 50_000])
def test_the_same_logits_are_at_no_distance(n_vocab):
    logits = 3 * np.random.default_rng(0).standard_normal((4, n_vocab)).astype(np.float32)
    kept = log_softmax(logits).astype(np.float16)
    assert (kl_divergence(kept, logits) >= 0).all()
    assert kl_divergence(kept, logits).max() < 1e-5  # the rounding of what is kept, far below any cache's


def test_an_impossible_token_costs_nothing_where_it_is_impossible():
    base = np.array([[0.0, -np.inf]], np.float32)
    assert kl_divergence(
        np.nan_to_num(base, neginf=-6e4).astype(np.float16), np.array([[3.0, 3.0]], np.float32)
    ) == pytest.approx([np.log(2)])


@pytest.mark.parametrize("n_vocab", [260, 262_144, 2**20])
def test_blocks_cover_all_rows_in_order(n_vocab):
    logits = np.broadcast_to(np.arange(40, dtype=np.float32)[:, None], (40, n_vocab))
    blocks = list(_blocks(logits))
    assert np.concatenate([b[:, 0] for b in blocks]).tolist() == list(range(40))
    assert max(b.size for b in blocks) <= max(n_vocab, 2**18)


def test_scored_are_the_end_of_a_chunk_or_each_so_many_th_of_it():
    tokens = np.zeros((3, 32), np.int32)
    assert list(Chunks(tokens).positions) == list(range(16, 32))
    assert list(Chunks(tokens, 24).positions) == list(range(24, 32))
    assert list(Chunks(tokens, 20, 4).positions) == [23, 27, 31]
    assert list(Chunks(tokens, 21, 4).positions) == [23, 27, 31]
    assert Chunks(tokens, 24, 4).n_positions == 6
