"""The neighbours' methods as tests/bench/neighbours.py runs them: their arithmetic, and their bits."""

import sys
from pathlib import Path

import numpy as np
import pytest
from samples import make_sample

from kvtuner_gguf.calibrate.error import attention

sys.path.append(str(Path(__file__).parents[1] / "bench"))
from neighbour.cache import Kept, LayerKeeper, settled
from neighbour.chosen import Evict, EvictKeeper, Qaq, heavy_and_recent, kept_channels, key_sigma, last_scores
from neighbour.coded import Hack, Kivi, KvQuant, LowRank, Oscar
from neighbour.codes import Rope, fitted_levels, furthest, heads, index_bits, min_max, nearest, rows
from neighbour.method import Cost, Layer, Shape, exact_tokens, within

SHAPE = Shape(n_head_kv=2, head_dim=64, n_ctx=1024, n_counted=1024)
ROPE = Rope((np.arange(32), np.arange(32, 64)), 1e4)
rng = np.random.default_rng(0)


def normal(*shape):
    return rng.standard_normal(shape).astype(np.float16).astype(np.float32)


@pytest.fixture(scope="module")
def layer():
    samples = tuple(make_sample(seed, n_q=16, n_kv=256, n_rot=64, far_pairs=True) for seed in range(2))
    return Layer(0, samples, ROPE)


def through(keeper: LayerKeeper, k, v, step):
    """What the cells hold after the tokens came step by step. k v (n_tokens, n_head_kv, head_dim)"""
    k_cells, v_cells = np.zeros_like(k, np.float16), np.zeros_like(v, np.float16)
    for first in range(0, len(k), step):
        last = first + step
        k_cells[first:last], v_cells[first:last] = k[first:last], v[first:last]
        keeper.keys(k_cells, first, last)
        keeper.values(v_cells, first, last)
    return k_cells.astype(np.float32), v_cells.astype(np.float32)


def test_min_max_keeps_a_constant_and_the_ends():
    x = np.array([[0.5, 0.5, 0.5, 0.5], [-1, 0.2, 0.9, 2]], np.float32)
    np.testing.assert_array_equal(min_max(x, 2), [[0.5, 0.5, 0.5, 0.5], [-1, 0, 1, 2]])


def test_min_max_errs_less_with_more_bits_and_by_half_a_step_at_most():
    x = normal(64, 32)
    errors = [np.abs(min_max(x, n_bits) - x).max(axis=1) for n_bits in (2, 3, 4)]
    for n_bits, error in zip((2, 3, 4), errors):
        span = np.ptp(x, axis=1)
        assert (error <= span / (2**n_bits - 1) / 2 + 2**-9 * np.abs(x).max()).all()
    assert errors[0].mean() > 1.8 * errors[1].mean() > 3.2 * errors[2].mean()


def test_rounding_by_chance_is_right_on_average():
    x = np.tile(np.float32([0, 0.3, 3]), (20000, 1))
    np.testing.assert_allclose(min_max(x, 2, np.random.default_rng(1)).mean(axis=0), x[0], atol=0.02)


def test_levels_are_those_of_the_values():
    x = np.repeat(np.float32([-0.9, -0.1, 0.4, 0.8]), 10)
    levels = fitted_levels(x, np.ones(40), 2)
    np.testing.assert_allclose(levels, [-0.9, -0.1, 0.4, 0.8], atol=1e-6)
    np.testing.assert_allclose(nearest(np.float32([-2, 0.3, 0.61]), levels), [-0.9, 0.4, 0.8], atol=1e-6)


def test_furthest_marks_so_many_of_each_row():
    x = np.float32([[1, -5, 2, 0], [3, 0, 0, -1]])
    np.testing.assert_array_equal(furthest(x, 2), [[0, 1, 1, 0], [1, 0, 0, 1]])
    assert not furthest(x, 0).any()


@pytest.mark.parametrize("pairs", [(np.arange(32), np.arange(32, 64)), (np.arange(0, 64, 2), np.arange(1, 64, 2))])
def test_rope_undone_and_done_is_what_was_cached(pairs):
    x, rope = normal(2, 40, 64), Rope(pairs, 1e4)
    plain = rope.undone(x, 1000)
    assert np.abs(plain - x).max() > 1
    np.testing.assert_allclose(rope.turned(plain, 1000), x, atol=2**-11)
    q = rope.turned(np.broadcast_to(x[:1, :1], (1, 40, 64)), 7)  # scores depend on the distance alone
    np.testing.assert_allclose((q[0, 3:] * q[0, :-3]).sum(axis=1), (q[0, 3] * q[0, 0]).sum(), rtol=1e-3)


def test_rows_and_heads_undo_each_other():
    x = normal(3, 5, 64)
    assert rows(x)[1, 64:128] == pytest.approx(x[1, 1])
    np.testing.assert_array_equal(heads(rows(x), 3), x)


def test_windows_and_blocks_settle_as_their_methods_say():
    assert settled(0, 512, 0, 1) == 512  # every token by itself: at once
    assert settled(127, 128, 128, 1) == 0 and settled(128, 129, 128, 1) == 1  # the newest 128, its own among them
    assert [settled(t, t + 1, 0, 32) for t in (31, 32, 63, 64)] == [0, 32, 32, 64]
    assert exact_tokens(128, 1, 1) == 128
    assert exact_tokens(0, 32, 1) == exact_tokens(0, 32, 32) == 16.5
    assert exact_tokens(128, 1, 32) == 143.5  # those that the batch has pushed out: 15.5 on average


def test_bits_by_hand():
    # 2 bits, scale and minimum of 32; K has 16.5 exact tokens of 1024, V 32 and a batch's 15.5
    k, v = Kivi(2, 32, 32).bits(SHAPE)
    assert k == pytest.approx((16.5 * 16 + 1007.5 * 3) / 1024)
    assert v == pytest.approx((47.5 * 16 + 976.5 * 3) / 1024)
    # 2 bits, 8-bit sums of 64 codes up to 3, 32 bits of scale and minimum; V's open partition 32.5 tokens
    assert Hack(2, 64).bits(SHAPE)[0] == pytest.approx(2 + 40 / 64)
    assert Hack(2, 64).bits(SHAPE)[1] == pytest.approx((32.5 * 16 + 991.5 * 2.625) / 1024)
    # one outlier of 16 + 8 bits a token of 128 values; the first token; a level table, for K zero and range of channels
    k, v = KvQuant(2, 1, 0).bits(SHAPE)
    assert k == pytest.approx((16 + 1023 * (2 + 24 / 128)) / 1024 + (64 / 128 + 32) / 1024)
    assert v == pytest.approx((16 + 1023 * (2 + 32 / 128)) / 1024 + 64 / 128 / 1024)
    assert Oscar(2, 0, 0).bits(SHAPE) == pytest.approx((2.5 + 16 * 64 / 1024, 2.5))
    assert LowRank(64, "q4_0").bits(SHAPE) == pytest.approx((2.25 + 16 / 1024,) * 2)
    assert Evict("q8_0", 0.25).bits(SHAPE) == pytest.approx(((8.5 + 16 / 128) / 4,) * 2)
    assert Cost(2, exact=2000).bits(SHAPE) == 16
    assert index_bits(256) == 8 and index_bits(257) == 16


def test_within_takes_most_bits_below_the_goal_or_the_fewest():
    choices = [Hack(b, 64) for b in (2, 3, 4)]
    assert within(choices, SHAPE, 4.2) == [Hack(3, 64)]  # 2 bits are too far below
    assert within(choices, SHAPE, 1.0) == [Hack(2, 64)]
    three, two = within(Kivi.choices(SHAPE, 4.6), SHAPE, 4.6)  # codes, or a window
    assert (three.n_bits, two.n_bits) == (3, 2) and 4.6 >= sum(three.bits(SHAPE)) / 2 > sum(two.bits(SHAPE)) / 2


@pytest.mark.parametrize("method", [Kivi(4, 32, 64), KvQuant(4, 2, 2), Hack(4, 64), Oscar(4, 16, 32)])
def test_exact_tokens_are_exact_and_more_bits_err_less(method, layer):
    k, v = normal(192, 2, 64), normal(192, 2, 64)
    found = through(method.keeper(layer, SHAPE), k, v, 32)
    fewer = type(method)(**{**vars(method), "n_bits": 2})
    coarse = through(fewer.keeper(layer, SHAPE), k, v, 32)
    for x, x_hat, x_coarse in zip((k, v), found, coarse):
        same = (x == x_hat).all(axis=(1, 2))
        error, more = (np.square(x - hat).sum() for hat in (x_hat, x_coarse))
        assert 0 < 5 * error < more
        if isinstance(method, KvQuant):
            assert same[0] and not same[1:].any()
        if isinstance(method, Oscar):  # the query at 160 sees 32 to itself; the batch's other 31 came after it
            assert same[:16].all() and same[129:].all() and not same[16:129].any()
    if isinstance(method, Kivi):
        same_k, same_v = ((x == hat).all(axis=(1, 2)) for x, hat in zip((k, v), found))
        assert same_k[128:].all() and not same_k[:128].any()
        assert same_v[97:].all() and not same_v[:97].any()


def test_kvquant_keeps_outliers():
    samples = tuple(make_sample(seed, n_q=16, n_kv=256, n_rot=64, far_pairs=True) for seed in range(2))
    v = normal(2, 8, 64)
    v[0, 3, 5] = 100
    keeper = KvQuant(2, 1, 1).keeper(Layer(0, samples, ROPE), SHAPE)
    v_hat = keeper.v.code(v, 1)
    assert v_hat[0, 3, 5] == 100
    assert np.abs(v_hat - v).max() < 2


def test_low_rank_of_all_directions_is_its_type(layer, monkeypatch):
    monkeypatch.setattr("neighbour.coded.round_trip", lambda _, x: x)
    k = normal(2, 32, 64)
    keeper = LowRank(128, "f16").keeper(layer, SHAPE)
    np.testing.assert_allclose(keeper.k.code(k, 5), k, atol=1e-3)
    np.testing.assert_allclose(keeper.v.code(k, 5), k, atol=1e-3)


def test_think_keeps_the_channels_that_queries_read():
    q, k = np.ones((4, 8, 64), np.float32), np.ones((2, 16, 64), np.float32)
    q[:2, :, 10:42] *= 3  # heads 0 and 1 share K of head 0
    k[1, :, 32:] *= 3
    np.testing.assert_array_equal(kept_channels(q, k), [np.arange(10, 42), np.arange(32, 64)])


def test_qaq_bits_follow_from_the_bound():
    method, x = Qaq(3, 3, 3), normal(50, 128)
    span = method.ranges(x, SHAPE)
    sigma = 0.2
    bits = method.n_bits(span, sigma)
    x_hat = method.code(x, bits, SHAPE)
    inside = x != x_hat
    assert (bits >= 1).all() and ((span / 2**bits / np.sqrt(12) <= sigma) | (bits == method.most)).all()
    assert (np.abs(x - x_hat)[inside] <= (span / 2**bits)[:, None].repeat(128, 1)[inside] * 0.51).all()
    assert method.overhead(SHAPE) == pytest.approx((32 + 4 + 24) / 128)
    assert method.n_bits(span, 1e9).max() == 0 and method.n_bits(span, 0).min() == method.most
    # bounds small beside T^-1.5 give sigma_K = T sigma_S / |q|, but for T/(T-1)
    assert key_sigma(1e-6, 1000, 4.0) == pytest.approx(1e-3 / 2, rel=1e-2)


def test_last_scores_are_those_of_attention():
    sample = make_sample(n_q=9, n_kv=9)
    a, _ = attention(sample, sample.k, sample.v)
    np.testing.assert_allclose(last_scores(sample.q, sample.k, 5, sample.scale), a[:, -5:].max(axis=(0, 1)), rtol=1e-5)


def test_eviction_keeps_the_newest_and_the_heaviest():
    got = np.float32([9, 1, 5, 0, 7, 0, 0, 0])
    np.testing.assert_array_equal(heavy_and_recent(np.arange(8), got, 5), [0, 2, 4, 6, 7])
    np.testing.assert_array_equal(heavy_and_recent(np.arange(3), got[:3], 5), [0, 1, 2])


@pytest.mark.parametrize("share", [1.0, 0.25])
def test_eviction_of_none_is_attention(share):
    shape, step = Shape(2, 64, 64, 64), 8
    sample = make_sample(n_q=64, n_kv=64)
    _, o = attention(sample, sample.k, sample.v)
    cells = [np.ascontiguousarray(x.transpose(1, 0, 2)).astype(np.float16) for x in (sample.k, sample.v)]
    keeper = EvictKeeper(lambda x, _: x, lambda x, _: x, share, shape)
    out = np.zeros((64, 6, 64), np.float32)
    for first in range(0, 64, step):
        keeper.queries(sample.q[:, first : first + step])
        keeper.keys(cells[0], first, first + step)
        keeper.values(cells[1], first, first + step)
        keeper.output(out[first : first + step], sample.scale)
    far = np.abs(out.transpose(1, 0, 2) - o).max(axis=(0, 2))
    assert far[: shape.n_ctx // 4].max() < 1e-5  # the prompt is whole
    assert (far < 1e-5).all() if share == 1 else (far[32:] > 0.01).all()


def test_a_new_context_starts_anew():
    kept = Kept(lambda x, _: x + 1, window=4)
    cells = np.zeros((16, 1, 2), np.float16)
    for _ in range(2):
        cells[:] = 0
        for first in range(0, 16, 4):
            kept.write(cells, first, first + 4)
        np.testing.assert_array_equal(cells[:, 0, 0], [1] * 9 + [0] * 7)
