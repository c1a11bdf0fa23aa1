"""Bases of K: what they make of data whose moments are known, exact in attention, and taken where they lower the
error."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from samples import assert_near
from test_condition import THETA, attended, scores, turns_of
from test_error import make_capture, make_sample
from test_error import round_trip as stock_round_trip

from kvtuner_gguf.calibrate.basis import BASES, _order, has_blocks, klt, matrices, mixing, sorted_pairs, with_basis
from kvtuner_gguf.calibrate.condition import best_basis, condition, vectors_of
from kvtuner_gguf.calibrate.error import after_codec, attention_scores, k_error, rotate
from kvtuner_gguf.calibrate.moments import Moments
from kvtuner_gguf.calibrate.results import Conditions
from kvtuner_gguf.kvectors import KVectors

every_way = pytest.mark.parametrize("way", BASES)
NO_PAIRS = (np.arange(0), np.arange(0))
BITS = {"k4_64": (7, 4, 3, 2), "k3_64": (6, 3, 2, 1), "k2_64": (4, 2, 1, 1), "t3_64": (3, 3, 3, 3)}


def levels(bits, n_step=200):
    """Lloyd-Max of N(0, 1)."""
    x = np.random.default_rng(0).standard_normal(20000)
    x.sort()
    below = np.cumsum([0, *x])  # the sum of as many values
    found = np.quantile(x, (np.arange(2**bits) + 0.5) / 2**bits)
    for _ in range(n_step):
        edges = np.array([0, *np.searchsorted(x, (found[1:] + found[:-1]) / 2), len(x)])
        n = np.diff(edges)
        found = np.where(n > 0, np.diff(below[edges]) / np.maximum(n, 1), found)
    return found


LEVELS = {bits: levels(bits) for bits in (1, 2, 3, 4, 6, 7)}


def round_trip(name, rows):
    """A codec of groups in numpy: 16 values of a block with bits of their own, the RMS of the block as their scale."""
    if name not in BITS:
        return stock_round_trip(name, rows)
    blocks = rows.reshape(-1, 4, 16)
    scale = np.sqrt(np.square(blocks).mean(axis=(1, 2), keepdims=True)) + 1e-30
    parts = []
    for group, bits in enumerate(BITS[name]):
        x = (blocks / scale)[:, group]
        parts.append(LEVELS[bits][np.abs(x[..., None] - LEVELS[bits]).argmin(axis=-1)])
    return (np.stack(parts, axis=1) * scale).reshape(rows.shape).astype(np.float32)


def second_moment(seed, head_dim, decay=0.12, n=2):
    """(n, head_dim, head_dim) of a falling spectrum in axes of its own."""
    rng = np.random.default_rng(seed)
    axes, _ = np.linalg.qr(rng.standard_normal((n, head_dim, head_dim)))
    return (axes * np.exp(-decay * np.arange(head_dim))) @ axes.swapaxes(1, 2)


def moments_of(k, q, pairs=NO_PAIRS):
    zero = np.zeros(k.shape[:2])
    return Moments(zero, k, q, pairs)


def in_basis(sample, way, *, mean=True, scale=True):
    moments = Moments.of(sample, *attended(sample))
    return with_basis(way, moments, vectors_of([moments], mean, scale))


def shaped(sample, seed=1, decay=0.12):
    """The sample with K and Q of a falling spectrum, the same axes for both."""
    root = np.linalg.cholesky(second_moment(seed, sample.k.shape[-1], decay, n=len(sample.k)))
    turn = root.swapaxes(1, 2)
    q = sample.q.reshape(len(sample.k), -1, sample.q.shape[-1]) @ turn
    k = 8 * sample.k @ turn  # attention that is neither even nor all on one token
    return replace(sample, k=k.astype(np.float16).astype(np.float32), q=q.reshape(sample.q.shape).astype(np.float32))


def samples_of(n, **fields):
    make = {"n_kv": 256, "n_q": 64, "rot_k": 64, "rot_v": 64, **fields}
    return [shaped(make_sample(seed, **make)) for seed in range(n)]


# ---- what a basis makes of K and Q


@every_way
@pytest.mark.parametrize("head_dim", [64, 128, 192, 256])
def test_k_in_a_basis_has_unit_variance(way, head_dim):
    k, q = second_moment(0, head_dim, 0.05), second_moment(1, head_dim, 0.05)
    matrix = matrices(with_basis(way, moments_of(k, q), KVectors()))
    variance = np.diagonal(matrix @ k @ matrix.swapaxes(1, 2), axis1=1, axis2=2)
    quarters = variance.reshape(2, head_dim // 64, 4, 16).mean(axis=(1, 3))
    assert quarters == pytest.approx(np.ones((2, 4)), rel=1e-4)
    if way == "klt" and head_dim != 192:  # channels that share nothing, and a Hadamard matrix: but for int8 all alike
        assert variance == pytest.approx(np.ones((2, head_dim)), rel=0.25)


def test_the_rows_of_klt_share_nothing_and_matter_less_and_less():
    k, q = second_moment(0, 64, 0.05), second_moment(1, 64, 0.05)
    rows = klt(k, q, NO_PAIRS)
    of_k = rows @ k @ rows.swapaxes(1, 2)
    inverse = np.linalg.inv(rows)
    of_q = (
        inverse.swapaxes(1, 2) @ (q + 1e-3 * np.trace(q, axis1=1, axis2=2)[:, None, None] / 64 * np.eye(64)) @ inverse
    )
    matter = np.diagonal(of_k * of_q, axis1=1, axis2=2)
    for moment in (of_k, of_q):
        diagonal = np.diagonal(moment, axis1=1, axis2=2)
        assert np.abs(moment - diagonal[:, None] * np.eye(64)).max() < 1e-9 * diagonal.max()
        assert (np.diff(diagonal, axis=1) < 1e-12).all()
    assert (matter[:, 0] > 30 * matter[:, 48]).all()


def test_quarters_of_klt_share_nothing_once_kept_as_int8():
    k, q = second_moment(0, 64, 0.05), second_moment(1, 64, 0.05)
    matrix = matrices(with_basis("klt", moments_of(k, q), KVectors()))
    of_k = np.abs(matrix @ k @ matrix.swapaxes(1, 2))
    between = of_k.reshape(2, 4, 16, 4, 16)
    assert max(between[:, a, :, b].max() for a in range(4) for b in range(4) if a != b) < 0.1


@every_way
@pytest.mark.parametrize("parts", [(False, False), (True, False), (False, True), (True, True)])
def test_a_basis_alone_changes_no_score(way, parts):
    sample = shaped(make_sample(0, n_kv=64))
    vectors = in_basis(sample, way, mean=parts[0], scale=parts[1])
    matrix = matrices(vectors)
    k = sample.k - (np.reshape(vectors.mean, (2, 1, 64)) if vectors.mean else 0)
    k = k @ matrix.swapaxes(1, 2)
    q = sample.q.reshape(2, -1, 64) @ np.linalg.inv(matrix)  # as rows: the inverse transpose
    same = replace(sample, q=q.reshape(sample.q.shape).astype(np.float32), k=k.astype(np.float32))
    assert_near(attention_scores(same, same.k), scores(sample), atol=1e-5)


@every_way
def test_after_codec_undoes_the_basis_and_rotates_nothing(way):
    sample, seen = shaped(make_sample(0, n_kv=64, rot_k=64)), []

    def exact(name, rows):
        seen.append(rows)
        return rows

    vectors = in_basis(sample, way)
    assert_near(after_codec(sample.k, "k3_64", 64, exact, vectors), sample.k, atol=2e-4)
    k = (sample.k - np.reshape(vectors.mean, (2, 1, 64))) @ matrices(vectors).swapaxes(1, 2)
    assert seen[0][5] == pytest.approx(k[:, 5].reshape(-1), abs=1e-4)
    # under another type, K is scaled and rotated as if there were no basis
    after_codec(sample.k, "q8_0", 64, exact, vectors)
    mean, scale = (np.reshape(x, (2, 1, 64)).astype(np.float32) for x in (vectors.mean, vectors.scale))
    assert seen[1][5] == pytest.approx(rotate((sample.k - mean) / scale, 64)[:, 5].reshape(-1), abs=1e-5)
    assert after_codec(sample.k, "f16", 64, exact, vectors) is sample.k


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_a_block_holds_16_of_each_quarter(head_dim):
    energy = np.exp(-0.01 * np.random.default_rng(0).permutation(head_dim))
    k = np.diag(energy)[None]
    vectors = with_basis("pairs", moments_of(k, k), KVectors())
    a = np.frombuffer(vectors.basis, np.int8).reshape(head_dim, head_dim)
    rank = np.argsort(np.argsort(-energy))
    for i, row in enumerate(a):
        assert set(rank[row != 0] // (head_dim // 4)) == {i % 64 // 16}


@pytest.mark.parametrize("n", [16, 32, 48, 64, 80])
def test_mixing_is_orthonormal_and_spreads(n):
    assert_near(mixing(n) @ mixing(n).T, np.eye(n), atol=1e-6)
    assert np.abs(mixing(n)).max() < 1.5 * np.sqrt(2 / n)


# ---- pairs


@pytest.mark.parametrize("far_pairs", [False, True])
@pytest.mark.parametrize("n_rot", [64, 32, 24])
def test_pairs_stay_together(far_pairs, n_rot):
    pairs = make_sample(0, n_rot=n_rot, far_pairs=far_pairs).rope_pairs
    matter = np.random.default_rng(n_rot).random(64)
    matter[pairs[1]] = matter[pairs[0]]
    order = _order(matter, pairs)
    assert sorted(order) == list(range(64))
    quarter = np.argsort(order) // 16
    assert (quarter[pairs[0]] == quarter[pairs[1]]).all()
    means = [matter[order[16 * i : 16 * i + 16]].mean() for i in range(4)]
    assert means == sorted(means, reverse=True)


@pytest.mark.parametrize("far_pairs", [False, True])
def test_sorted_pairs_are_the_same_at_every_place(far_pairs):
    """RoPE moves nothing from one quarter to another."""
    sample = shaped(make_sample(0, n_kv=64, n_rot=64, far_pairs=far_pairs, turns=turns_of(THETA, [0, 777, 5000])))
    matrix = matrices(in_basis(sample, "pairs", mean=False))
    energy = [np.square((sample.turned(i).k @ matrix.swapaxes(1, 2)).reshape(2, -1, 4, 16)).sum(-1) for i in range(3)]
    assert_near(energy[1:], [energy[0]] * 2, rtol=1e-3)


def test_sorted_pairs_are_exact_as_int8():
    """Where the layer has a scale, A holds nothing but 0 and 127 of either sign."""
    sample = shaped(make_sample(0, n_kv=64))
    assert set(np.frombuffer(in_basis(sample, "pairs").basis, np.int8).tolist()) == {-127, 0, 127}
    k, q = second_moment(0, 64, 0.05), second_moment(1, 64, 0.05)
    rows = sorted_pairs(k, q, NO_PAIRS)
    assert ((rows != 0).sum(axis=2) == 1).all() and ((rows != 0).sum(axis=1) == 1).all()


# ---- what is next to nothing


@every_way
@pytest.mark.parametrize("dead", ["channel of K", "channel of Q", "channels", "K", "Q", "both", "one token"])
def test_what_is_dead_makes_no_basis_that_cannot_be(way, dead):
    sample = shaped(make_sample(0, n_kv=64, n_q=16))
    k, q = sample.k.copy(), sample.q.copy()
    of_k = {"channel of K": 5, "channels": slice(8, 60), "K": slice(None), "both": slice(None)}.get(dead)
    of_q = {"channel of Q": 5, "channels": slice(20, 64), "Q": slice(None), "both": slice(None)}.get(dead)
    if of_k is not None:
        k[0, :, of_k] = 0
    if of_q is not None:
        q[:3, :, of_q] = 0
    if dead == "one token":
        k[:] = k[:, :1]
    vectors = in_basis(replace(sample, k=k, q=q), way)
    if vectors.basis:
        matrix = matrices(vectors)
        assert np.isfinite(matrix).all() and (np.linalg.cond(matrix) < 1e6).all()
        kept = after_codec(k, "k3_64", 64, lambda _, rows: rows, vectors)
        assert_near(kept, k, atol=0.01)


@every_way
@pytest.mark.parametrize("factor", [1e-4, 1e3])
def test_size_does_not_matter(way, factor):
    k, q = second_moment(0, 64, 0.05), second_moment(1, 64, 0.05)
    plain, sized = (with_basis(way, moments_of(f * f * k, q), KVectors()) for f in (1.0, factor))
    assert np.abs(np.frombuffer(sized.basis, np.int8).astype(int) - np.frombuffer(plain.basis, np.int8)).max() <= 1
    assert np.array(sized.basis_scale) * factor == pytest.approx(np.array(plain.basis_scale), rel=0.01)


# ---- what is chosen


def error(sample):
    return k_error(sample, round_trip=round_trip)


def test_groups_lose_less_in_a_basis(tmp_path):
    capture = make_capture(tmp_path, {0: samples_of(2)})
    found = condition(capture, error, attended, {0: "q4_0"}, basis=(0,))
    assert set(found.errors[0]) == {"none", "mean", "scale", "both", "rotated", "pairs", "klt"}
    assert found.errors[0]["klt"] < 0.7 * found.errors[0]["rotated"] and found.k_vectors[0].basis
    plain = condition(capture, error, attended, {0: "q4_0"})
    assert found.k_vectors[0].without_basis == plain.k_vectors[0]
    found.save(tmp_path / "conditions.json")
    assert Conditions.load(tmp_path / "conditions.json") == found


def test_a_basis_without_mean_and_scale(tmp_path):
    capture = make_capture(tmp_path, {0: samples_of(2)})
    found = condition(capture, error, attended, {0: "q4_0"}, mean=False, scale=False, basis=(0,))
    assert set(found.errors[0]) == {"none", "rotated", "pairs", "klt"}
    assert found.k_vectors[0] == found.k_vectors[0].basis_alone and found.k_vectors[0].basis


def test_k_that_is_even_all_over_gets_no_basis(tmp_path):
    samples = [make_sample(seed, n_kv=256, n_q=64, rot_k=64, rot_v=64) for seed in range(2)]
    found = condition(make_capture(tmp_path, {0: samples}), error, attended, {0: "q4_0"}, basis=(0,))
    assert not found.k_vectors[0].basis and "klt" in found.errors[0]


def test_heads_that_64_does_not_divide_get_no_basis(tmp_path):
    assert [n for n in (32, 64, 80, 96, 128, 256) if has_blocks(n)] == [64, 128, 256]
    samples = samples_of(2, head_dim_k=96, rot_k=32)
    found = condition(make_capture(tmp_path, {0: samples}), error, attended, {0: "q4_0"}, basis=(0,))
    assert "klt" not in found.errors[0] and not found.k_vectors[0].basis


def test_the_better_basis_is_kept_if_it_gains():
    assert best_basis({"rotated": 1.0, "pairs": 0.6, "klt": 0.5}) == "klt"
    assert best_basis({"rotated": 1.0, "pairs": 0.5, "klt": 0.5}) == "pairs"
    assert best_basis({"rotated": 1.0, "pairs": 0.99, "klt": 1.5}) is None
