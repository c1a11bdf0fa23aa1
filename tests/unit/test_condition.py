"""Mean and balanced scale of K: worked out by hand, exact in attention, and taken only where they are measured to
help."""

from dataclasses import replace

import numpy as np
import pytest
from samples import assert_near
from test_error import make_capture, make_sample, round_trip

from kvtuner_gguf.calibrate.capture import _turns_of
from kvtuner_gguf.calibrate.condition import best_way
from kvtuner_gguf.calibrate.condition import condition as condition_by
from kvtuner_gguf.calibrate.condition import vectors_of as vectors_of_moments
from kvtuner_gguf.calibrate.error import after_codec, attention, attention_scores, error_table, k_error
from kvtuner_gguf.calibrate.moments import Moments, _moved, balanced_scale, tied
from kvtuner_gguf.calibrate.results import Conditions
from kvtuner_gguf.kvectors import KVectors

N_KV_HEAD, HEAD_DIM = 2, 64


def with_offset(sample, offset):
    """The sample with a constant added to K."""
    return replace(sample, k=sample.k + np.float32(offset))


def shaped(sample, of_k, of_q):
    """The sample with channels of K and of Q multiplied."""
    return replace(sample, k=sample.k * of_k.astype(np.float32), q=sample.q * of_q.astype(np.float32))


def offset_of(seed):
    return 4 * np.random.default_rng(seed).standard_normal((N_KV_HEAD, 1, HEAD_DIM))


def error(sample):
    return k_error(sample, round_trip=round_trip)


def scores(sample):
    return attention_scores(sample, sample.k)


def moments_of(sample):
    return Moments.of(sample, *attended(sample))


def attended(sample):
    return attention(sample, sample.k, sample.v)


def condition(capture, error, type_k, **kwargs):
    return condition_by(capture, error, attended, type_k, **kwargs)


def vectors_of(samples, mean, scale):
    return vectors_of_moments([moments_of(s) for s in samples], mean, scale)


def samples_of(n, make=lambda s: s, **fields):
    return [make(make_sample(seed, n_kv=256, n_q=64, rot_k=64, rot_v=64, **fields)) for seed in range(n)]


# ---- what is estimated


def test_pairs_of_rope_share_their_energy():
    energy = np.array([[1.0, 3.0, 5.0, 7.0, 9.0, 11.0]])

    def by(n_rot, far_pairs):
        return tied(energy, *replace(make_sample(0), n_rot=n_rot, far_pairs=far_pairs).rope_pairs).tolist()

    assert by(4, False) == [[2, 2, 6, 6, 9, 11]]
    assert by(4, True) == [[3, 5, 3, 5, 9, 11]]
    assert by(6, True) == [[4, 6, 8, 4, 6, 8]]
    assert by(0, True) == energy.tolist()
    assert energy[0, 0] == 1.0


def test_the_scale_balances_k_and_q():
    k_sq, q_sq = np.array([[16.0, 1.0, 1.0]]), np.array([[1.0, 1.0, 16.0]])
    # sqrt(rms_k/rms_q): 2, 1, 1/2
    assert balanced_scale(k_sq, q_sq) == pytest.approx(np.array([[2.0, 1.0, 0.5]]))
    # as much of one as of the other in each channel, once applied
    s_sq = balanced_scale(k_sq, q_sq) ** 2
    assert k_sq / s_sq == pytest.approx(q_sq * s_sq)


def test_the_scale_has_geometric_mean_1_in_each_head():
    rng = np.random.default_rng(0)
    scale = balanced_scale(rng.random((3, 64)) * [[1], [1e3], [1e-3]], rng.random((3, 64)))
    assert np.exp(np.log(scale).mean(axis=1)) == pytest.approx(np.ones(3))


@pytest.mark.parametrize("dead", [(0.0, 1.0), (1.0, 0.0), (0.0, 0.0), (1e30, 1.0)])
def test_a_dead_channel_stays_in_range(dead):
    k_sq, q_sq = np.ones((1, 64)), np.ones((1, 64))
    k_sq[0, 5], q_sq[0, 5] = dead
    scale = balanced_scale(k_sq, q_sq)
    KVectors(scale=tuple(scale[0].tolist()))  # within the run time's range
    assert scale[0, np.arange(64) != 5] == pytest.approx(scale[0, 0]) and 0.85 < scale[0, 0] < 1.15


def test_the_vectors_are_those_of_all_samples():
    samples = samples_of(3, lambda s: replace(s, v=np.zeros_like(s.v)))  # all tokens count alike
    v = vectors_of(samples, True, False)
    assert np.reshape(v.mean, (2, 64)) == pytest.approx(
        np.concatenate([s.k for s in samples], axis=1).mean(axis=1), abs=1e-6
    )
    assert v.scale == () and vectors_of(samples, False, False) == KVectors()


def test_a_score_counts_by_what_its_error_does_to_the_output():
    rng = np.random.default_rng(0)
    s, v, step = rng.standard_normal((2, 3, 7)), rng.standard_normal((2, 7, 4)), 1e-6

    def output(s):
        a = np.exp(s)
        return a / a.sum(axis=-1, keepdims=True) @ v

    def moved_by(i, j):
        more = step * (np.arange(21).reshape(3, 7) == 7 * i + j)
        return np.square((output(s + more) - output(s)) / step).sum(axis=-1)[:, i]

    want = np.array([[moved_by(i, j) for j in range(7)] for i in range(3)])
    a = np.exp(s) / np.exp(s).sum(axis=-1, keepdims=True)
    assert_near(_moved(a, v, output(s)), np.moveaxis(want, 2, 0), rtol=1e-4)


def test_every_score_counts_alike_where_all_values_are_the_same():
    sample = make_sample(0, n_kv=64, n_q=16)
    moments = moments_of(replace(sample, v=np.zeros_like(sample.v)))
    assert_near(moments.mean, sample.k.mean(axis=1), rtol=1e-6, atol=1e-6)


def test_tokens_count_by_the_attention_they_get():
    sample = make_sample(0, n_kv=64, n_q=16)
    huge = sample.k.copy()
    huge[:, 5, 9] = 1000.0
    unseen = replace(sample, k=huge, mask=np.where(np.arange(64) == 5, -np.inf, sample.mask).astype(np.float32))
    scale, plain = (np.reshape(vectors_of([s], False, True).scale, (2, 64)) for s in (unseen, sample))
    assert scale[:, 9] == pytest.approx(plain[:, 9], rel=0.3)


def test_a_head_of_k_looks_at_its_own_heads_of_q():
    sample = make_sample(0, n_head=6, n_head_kv=2, scale=1e-6)  # all scores stay alike
    loud = sample.q.copy()
    loud[3:, :, 7] *= 100  # heads 3 to 5 share the second head of K
    scale = np.reshape(vectors_of([replace(sample, q=loud)], False, True).scale, (2, 64))
    before = np.reshape(vectors_of([sample], False, True).scale, (2, 64))
    assert scale[0] == pytest.approx(before[0])
    assert scale[1, 7] / before[1, 7] == pytest.approx(0.1, rel=0.2)


def test_the_scale_is_that_of_the_k_that_is_left():
    sample = with_offset(make_sample(0), np.where(np.arange(64) == 3, 50.0, 0.0))
    alone, centred = (np.reshape(vectors_of([sample], mean, True).scale, (2, 64)) for mean in (False, True))
    assert (alone[:, 3] > 5).all() and (centred[:, 3] < 2).all()


# ---- the places of a context


def turns_of(theta, starts):
    """(n_place, n_pair, 2) of RoPE with these frequencies."""
    angle = np.outer(starts, theta)
    return np.stack([np.cos(angle), np.sin(angle)], axis=-1).astype(np.float32)


THETA = 10000.0 ** (-np.arange(32) / 32)


@pytest.mark.parametrize("far_pairs", [False, True])
def test_text_at_another_place_has_the_same_attention(far_pairs):
    sample = make_sample(0, n_kv=64, n_rot=64, far_pairs=far_pairs, turns=turns_of(THETA, [0, 1000]))
    assert np.array_equal(sample.turned(0).k, sample.k) and not np.allclose(sample.turned(1).k, sample.k, atol=0.1)
    assert_near(scores(sample.turned(1)), scores(sample), atol=1e-5)


@pytest.mark.parametrize("far_pairs", [False, True])
def test_turns_are_measured_from_k_at_two_places(far_pairs):
    here = make_sample(0, n_kv=64, n_rot=64, far_pairs=far_pairs, turns=turns_of(THETA, [0, 777]))
    noise = np.random.default_rng(0).standard_normal(here.k.shape).astype(np.float32)
    there = replace(here.turned(1), k=here.turned(1).k + 0.01 * noise)
    assert _turns_of([here, there]) == pytest.approx(here.turns, abs=0.01)


@pytest.mark.parametrize("far_pairs", [False, True])
def test_moments_are_those_of_all_places_together(far_pairs):
    turns = turns_of(THETA, [0, 300, 1700, 5000])
    sample = with_offset(make_sample(0, n_kv=64, n_rot=64, far_pairs=far_pairs, turns=turns), offset_of(0))
    have = moments_of(sample)
    each = [replace(sample.turned(place), turns=None) for place in range(4)]
    for name in ("mean", "k", "q"):
        want = np.mean([getattr(moments_of(s), name) for s in each], axis=0)
        assert_near(getattr(have, name), want, rtol=5e-5, atol=5e-5)


def test_a_mean_that_turns_away_is_not_taken_off():
    """Channels that RoPE turns within the context keep their mean; those that it hardly moves lose it."""
    turns = turns_of(THETA, np.linspace(0, 8000, 64))
    sample = with_offset(make_sample(0, n_kv=256, n_rot=64, far_pairs=True, turns=turns), 5.0)
    mean = np.reshape(vectors_of([sample], True, False).mean, (2, 2, 32))
    length = np.hypot(mean[:, 0], mean[:, 1]) / np.hypot(5, 5)
    assert (length[:, 31] > 0.9).all() and (length[:, :12] < 0.35).all()


# ---- attention does not see it


def test_conditioning_alone_changes_no_score():
    sample = make_sample(0, n_kv=64)
    rng = np.random.default_rng(1)
    mean, scale = rng.standard_normal((2, 1, 64)), 4 ** rng.uniform(-1, 1, (2, 1, 64))
    k = ((sample.k - mean) / scale).astype(np.float32)
    q = (sample.q.reshape(2, 3, -1, 64) * scale[:, None]).reshape(sample.q.shape).astype(np.float32)
    assert_near(attention_scores(replace(sample, q=q, k=k), k), scores(sample), atol=1e-5)


def test_after_codec_puts_on_what_it_took_off():
    sample = with_offset(make_sample(0, n_kv=64), offset_of(0))
    v = vectors_of([sample], True, True)
    exact = after_codec(sample.k, "q4_0", 64, lambda name, rows: rows, v)
    assert_near(exact, sample.k, atol=1e-5)
    mean, scale = (np.reshape(x, (2, 1, 64)).astype(np.float32) for x in (v.mean, v.scale))
    want = after_codec((sample.k - mean) / scale, "q4_0", 64, round_trip) * scale + mean
    assert_near(after_codec(sample.k, "q4_0", 64, round_trip, v), want, atol=1e-6)
    assert after_codec(make_sample(0).k, "f16", 64, round_trip, vectors_of([make_sample(0)], True, True)) is not None


def test_f16_is_left_as_it_is():
    sample = make_sample(0)
    assert after_codec(sample.k, "f16", 64, round_trip, vectors_of([sample], True, True)) is sample.k


def test_the_error_table_measures_with_the_vectors(tmp_path):
    (sample,) = samples_of(1, lambda s: with_offset(s, offset_of(1)))
    capture = make_capture(tmp_path, {0: [sample]})
    types = {0: (("q4_0",), ("f16",))}
    plain = error_table(capture, types, round_trip).measure("output_nrmse")
    centred = error_table(capture, types, round_trip, [vectors_of([sample], True, False)]).measure("output_nrmse")
    assert centred < 0.6 * plain


# ---- what is chosen


def test_the_fewest_operations_win_a_draw():
    assert best_way({"none": 1.0, "mean": 1.0, "scale": 1.0, "both": 1.0}) == "none"
    assert best_way({"none": 1.0, "mean": 0.99, "scale": 0.985, "both": 0.985}) == "none"
    assert best_way({"none": 1.0, "mean": 0.5, "scale": 0.9, "both": 0.495}) == "mean"
    assert best_way({"none": 1.0, "mean": 0.5, "scale": 0.9, "both": 0.4}) == "both"
    assert best_way({"none": 1.0, "scale": 0.9}) == "scale"


SHAPE_K = np.where(np.arange(64) % 8 == 0, 8.0, 1.0)
MAKE = {
    "none": lambda s: s,
    "mean": lambda s: with_offset(s, offset_of(0)),
    "scale": lambda s: shaped(s, SHAPE_K, 1 / SHAPE_K),
    "both": lambda s: with_offset(shaped(s, SHAPE_K, 1 / SHAPE_K), offset_of(0)),
}


@pytest.mark.parametrize("way", MAKE)
def test_each_layer_gets_what_its_k_needs(tmp_path, way):
    capture = make_capture(tmp_path, {2: samples_of(2, MAKE[way])})
    found = condition(capture, error, {2: "q4_0"})
    assert len(found.k_vectors) == 3 and found.k_vectors[:2] == (KVectors(), KVectors())
    assert (bool(found.k_vectors[2].mean), bool(found.k_vectors[2].scale)) == (
        way in ("mean", "both"),
        way in ("scale", "both"),
    )
    assert set(found.errors[2]) == {"none", "mean", "scale", "both"}
    assert found.k_vectors[2] == vectors_of(
        [capture.sample(2, i) for i in range(2)], way in ("mean", "both"), way in ("scale", "both")
    )


@pytest.mark.parametrize(
    ("allowed", "tried"),
    [((True, False), {"none", "mean"}), ((False, True), {"none", "scale"}), ((False, False), None)],
)
def test_what_is_not_allowed_is_not_tried(tmp_path, allowed, tried):
    capture = make_capture(tmp_path, {0: samples_of(2, MAKE["both"])})
    found = condition(capture, error, {0: "q4_0"}, mean=allowed[0], scale=allowed[1])
    assert (set(found.errors[0]) if tried else found.errors) == (tried or {})
    assert (bool(found.k_vectors[0].mean), bool(found.k_vectors[0].scale)) == allowed


@pytest.mark.parametrize("fields", [{"logit_softcap": 20.0}, {"sinks": np.zeros(6, np.float32)}])
def test_the_mean_stays_where_attention_would_miss_it(tmp_path, fields):
    capture = make_capture(tmp_path, {0: samples_of(2, MAKE["mean"], **fields)})
    found = condition(capture, error, {0: "q4_0"})
    assert set(found.errors[0]) == {"none", "scale"} and found.k_vectors[0].mean == ()


def test_layers_without_a_coarse_type_or_with_v_in_k_are_left_alone(tmp_path):
    sample = make_sample(0, n_head_kv=1, n_head=2, head_dim_k=96, head_dim_v=64)
    mla = replace(sample, v=np.ascontiguousarray(sample.k[..., :64]))
    seen = []
    capture = make_capture(
        tmp_path, {0: [mla], 1: [with_offset(make_sample(1, n_head_kv=1, n_head=2, head_dim_k=96), 9)]}
    )
    found = condition(capture, error, {0: "q4_0"}, progress=seen.append)
    assert found.k_vectors == (KVectors(), KVectors()) and found.errors == {} and seen == [1, 1]


def test_a_sample_is_judged_by_the_others(tmp_path):
    """The means of two samples that have nothing in common help neither."""
    samples = [with_offset(s, offset_of(seed)) for seed, s in enumerate(samples_of(2))]
    found = condition(make_capture(tmp_path, {0: samples}), error, {0: "q4_0"})
    assert found.errors[0]["mean"] > found.errors[0]["none"] and not found.k_vectors[0].mean


def test_conditions_are_saved_and_loaded(tmp_path):
    found = condition(make_capture(tmp_path, {0: samples_of(2, MAKE["both"])}), error, {0: "q4_0"})
    found.save(tmp_path / "conditions.json")
    assert Conditions.load(tmp_path / "conditions.json") == found
