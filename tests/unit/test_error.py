"""The four errors, and the attention they are taken from, against a slow second implementation."""

import math
from dataclasses import replace

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from samples import make_sample

from kvtuner_gguf.calibrate.basis import hadamard
from kvtuner_gguf.calibrate.error import (
    MEASURES,
    after_codec,
    attention,
    error_table,
    key_error,
    output_error,
    output_nrmse,
    rotate,
    sample_errors,
    score_error,
    value_error,
)
from kvtuner_gguf.calibrate.samples import Capture, save_sample
from kvtuner_gguf.pair import Pair

TYPES = ("f16", "q8_0", "q5_0", "q4_0")


def round_trip(type_name, x):
    if type_name in ("f16", "f32"):
        return x.astype(type_name.replace("f", "float")).astype(np.float32)
    qtype = GGMLQuantizationType[type_name.upper()]
    return dequantize(quantize(x, qtype), qtype)


def make_capture(path, samples):
    """samples: {il: [LayerSample, ...]}"""
    for il, of_layer in samples.items():
        for i, sample in enumerate(of_layer):
            save_sample(path, i, replace(sample, il=il))
    return Capture(path, max(samples) + 1, tuple(samples), len(of_layer))


def naive_attention(s):
    """Scores and output in float64, one cell at a time."""
    n_head, n_q, _ = s.q.shape
    n_head_kv, n_kv, head_dim_v = s.v.shape
    a, o = np.zeros((n_head, n_q, n_kv)), np.zeros((n_head, n_q, head_dim_v))
    power = 2 ** math.floor(math.log2(n_head))
    for h in range(n_head):
        g = h // (n_head // n_head_kv)
        slope = 2 ** (-s.max_bias * (h + 1) / power)
        if h >= power:
            slope = 2 ** (-s.max_bias / 2 * (2 * (h - power) + 1) / power)
        for t in range(n_q):
            weights = []
            for c in range(n_kv):
                logit = s.scale * float(np.dot(s.q[h, t].astype(np.float64), s.k[g, c].astype(np.float64)))
                if s.logit_softcap:
                    logit = s.logit_softcap * math.tanh(logit / s.logit_softcap)
                weights.append(math.exp(logit + (slope if s.max_bias else 1.0) * float(s.mask[t, c])))
            total = sum(weights) + (math.exp(float(s.sinks[h])) if s.sinks is not None else 0.0)
            for c in range(n_kv):
                a[h, t, c] = weights[c] / total
                o[h, t] += a[h, t, c] * s.v[g, c]
    return a, o


def alibi_mask(n_q, n_kv):
    distance = np.arange(n_kv)[None, :] - np.arange(n_kv - n_q, n_kv)[:, None]
    return np.where(distance <= 0, distance, -np.inf).astype(np.float32)


SINKS = np.linspace(-2, 3, 6).astype(np.float32)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"mask": np.zeros((5, 9), np.float32), "n_head_kv": 6},
        {"n_head_kv": 1},
        {"logit_softcap": 2.0, "scale": 0.5},
        {"max_bias": 8.0, "mask": alibi_mask(5, 9)},
        {"sinks": SINKS},
        {"sinks": SINKS, "logit_softcap": 3.0, "max_bias": 4.0, "mask": alibi_mask(5, 9)},
        {"n_head_kv": 1, "head_dim_k": 96, "head_dim_v": 64},
        {"scale": 30.0},
    ],
    ids=["mask", "no mask", "one KV head", "softcap", "alibi", "sinks", "all", "mla", "peaked"],
)
def test_attention_is_what_a_slow_one_computes(fields):
    sample = make_sample(**fields)
    a, o = attention(sample, sample.k, sample.v)
    naive_a, naive_o = naive_attention(sample)
    assert a.dtype == o.dtype == np.float32
    atol = 2**-22 * max(1.0, np.abs(sample.scale * sample.q).max() * 64)  # of a logit: some float32 roundings
    np.testing.assert_allclose(a, naive_a, atol=atol)
    np.testing.assert_allclose(o, naive_o, atol=atol * 9)


def test_attention_of_a_query_that_sees_nothing_is_zero():
    sample = make_sample()
    sample.mask[1] = -np.inf
    a, o = attention(sample, sample.k, sample.v)
    assert not a[:, 1].any() and not o[:, 1].any()
    np.testing.assert_allclose(a[:, [0, 2, 3, 4]].sum(axis=-1), 1, rtol=1e-6)


def test_hadamard_is_ggmls():
    signs = [[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]
    np.testing.assert_array_equal(hadamard(4), np.array(signs) / 2)
    h = hadamard(128)
    np.testing.assert_allclose(h @ h, np.eye(128), atol=1e-6)
    np.testing.assert_array_equal(h, h.T)


def test_rotate_works_block_by_block_and_undoes_itself():
    x = make_sample(head_dim_k=128).k
    np.testing.assert_allclose(rotate(x, 64)[..., 64:], x[..., 64:] @ hadamard(64), atol=1e-5)  # 64 * 2^-24 * 3
    np.testing.assert_allclose(rotate(rotate(x, 64), 64), x, atol=1e-5)
    assert rotate(x, 0) is x


def test_codec_sees_one_token_a_row_rotated():
    sample, seen = make_sample(), []

    def spy(type_name, rows):
        seen.append(rows)
        return round_trip(type_name, rows)

    k_hat = after_codec(sample.k, "q4_0", 64, spy)
    row = np.concatenate([rotate(sample.k[0, 3], 64), rotate(sample.k[1, 3], 64)])
    assert seen[0].shape == (9, 2 * 64) and seen[0].dtype == np.float32
    np.testing.assert_allclose(seen[0][3], row, atol=1e-6)
    np.testing.assert_allclose(rotate(k_hat, 64)[1, 3], round_trip("q4_0", row[None])[0, 64:], atol=1e-5)


def test_codec_without_blocks_is_not_rotated():
    k = make_sample().k
    assert after_codec(k, "f16", 64, round_trip) is k


def test_rotation_spreads_an_outlier():
    k = make_sample(n_kv=64).k
    k[..., 5] *= 30
    plain, rotated = (key_error(k, after_codec(k, "q4_0", n_rot, round_trip)) for n_rot in (0, 64))
    assert rotated < 0.8 * plain


def test_measures_worked_by_hand():
    x = np.array([[[1.0, -3.0]], [[0.0, 0.5]]], np.float32)  # two heads, one token, two values
    x_hat = np.array([[[2.0, -3.0]], [[0.25, 0.0]]], np.float32)
    assert key_error(x, x_hat) == value_error(x, x_hat) == output_error(x, x_hat) == (1 / 4 + 0.75 / 0.5) / 2
    assert score_error(x, x_hat) == (1 + 0 + 0.25 + 0.5) / 4
    assert output_nrmse(x, x_hat) == pytest.approx(math.sqrt(1.3125 / 10.25), rel=1e-12)


@pytest.mark.parametrize("name", MEASURES)
def test_measure_of_zeros_is_zero(name):
    zeros = np.zeros((2, 3, 4), np.float32)
    assert MEASURES[name][1](zeros, zeros) == 0


def test_stream_error_weighs_a_layer_by_its_share_of_the_stream(tmp_path):
    capture = make_capture(tmp_path, {0: [make_sample(0)], 1: [make_sample(1)]})
    capture = replace(capture, share=(0.25, 0.01))
    errors = error_table(capture, dict.fromkeys((0, 1), (("f16", "q4_0"), ("f16",))), round_trip)
    assert errors.measure("stream_error")[0] == pytest.approx(0.5 * errors.measure("output_nrmse")[0])
    assert errors.measure("stream_error")[1] == pytest.approx(0.1 * errors.measure("output_nrmse")[1])


def test_errors_lie_on_the_papers_scale():
    # KVTuner, Table 9: e_v of Llama-3.1-8B, per-token-asym. Values of a head are near normal, so normal ones come
    # within 25 % of it; a mean over elements would give 4 to 8 times as much.
    x = np.random.default_rng(0).standard_normal((1, 4000, 128)).astype(np.float32)
    low, high = x.min(axis=-1, keepdims=True), x.max(axis=-1, keepdims=True)
    for n_bits, published in ((8, 0.007865), (4, 0.126894), (2, 0.607898)):
        step = (high - low) / (2**n_bits - 1)
        x_hat = np.round((x - low) / step) * step + low
        assert value_error(x, x_hat) == pytest.approx(published, rel=0.25)


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    samples = {il: [make_sample(10 * il + i, n_kv=64, rot_k=64, rot_v=64) for i in range(2)] for il in (0, 3)}
    capture = make_capture(tmp_path_factory.mktemp("capture"), samples)
    return error_table(capture, dict.fromkeys(capture.il, (TYPES, TYPES)), round_trip)


def test_table_has_every_pair(table):
    assert table.il == (0, 3)
    assert table.pairs == tuple(Pair(k, v) for k in TYPES for v in TYPES)


def test_f16_has_no_error(table):
    for name in MEASURES:
        assert (table.measure(name)[:, table.pairs.index(Pair.parse("f16"))] == 0).all()


def test_value_error_ignores_the_type_of_k_and_score_error_that_of_v(table):
    for name, axis in (("value_error", 1), ("key_error", 2), ("score_error", 2)):
        grid = table.measure(name).reshape(2, len(TYPES), len(TYPES))  # il, type_k, type_v
        assert (np.ptp(grid, axis=axis) == 0).all()
        assert (np.diff(grid.mean(axis=axis)) > 0).all()  # TYPES go from the most to the least precise


def test_output_error_grows_with_either_type(table):
    for name in ("output_error", "output_nrmse"):
        grid = table.measure(name).mean(axis=0).reshape(len(TYPES), len(TYPES))
        assert (np.diff(grid, axis=0) > 0).all() and (np.diff(grid, axis=1) > 0).all()


def test_table_is_the_mean_over_samples(tmp_path):
    samples = [make_sample(i) for i in range(3)]
    table = error_table(make_capture(tmp_path, {0: samples}), {0: (("q8_0",), ("q4_0",))}, round_trip)
    pair = Pair("q8_0", "q4_0")
    each = [sample_errors(sample, ("q8_0",), ("q4_0",), round_trip)[pair] for sample in samples]
    for name in MEASURES:
        assert table.measure(name)[0, 0] == pytest.approx(np.mean([e[name] for e in each]), rel=1e-12)


def test_errors_are_those_of_the_attention_with_both_sides_lowered():
    sample = make_sample(n_kv=64, rot_k=64, rot_v=32)
    k_hat, v_hat = after_codec(sample.k, "q5_0", 64, round_trip), after_codec(sample.v, "q4_0", 32, round_trip)
    a, o = attention(sample, sample.k, sample.v)
    a_hat, o_hat = attention(sample, k_hat, v_hat)
    errors = sample_errors(sample, ("q5_0",), ("q4_0",), round_trip)[Pair("q5_0", "q4_0")]
    assert errors["output_error"] == output_error(o, o_hat)
    assert errors["key_error"] == key_error(sample.k, k_hat)
    n_seen = (sample.mask == 0).sum()
    assert errors["score_error"] == pytest.approx(np.abs(a - a_hat).sum() / (6 * n_seen), rel=1e-6)


def test_layers_may_differ_in_what_they_hold(tmp_path):
    # head_dim 80 fits no block of 32
    samples = {0: [make_sample()], 1: [make_sample(head_dim_k=80, head_dim_v=80)]}
    types = {0: (("f16", "q8_0"), ("f16",)), 1: (("f16",), ("f16",))}
    table = error_table(make_capture(tmp_path, samples), types, round_trip)
    assert table.pairs == (Pair("f16", "f16"), Pair("q8_0", "f16"))
    assert np.isnan(table.measure("output_error")).tolist() == [[False, False], [False, True]]


def test_values_in_keys_have_the_type_of_k(tmp_path):
    sample = make_sample(n_head_kv=1, head_dim_k=128, n_kv=64, rot_k=64)
    sample = replace(sample, v=sample.k[..., :64].copy())
    types = ("f16", "q8_0", "q4_0")
    table = error_table(make_capture(tmp_path, {0: [sample]}), {0: (types, types)}, round_trip)
    assert [str(pair) for pair in table.pairs] == ["f16/f16", "q8_0/q8_0", "q4_0/q4_0"]
    k_hat = after_codec(sample.k, "q4_0", 64, round_trip)
    assert table.measure("value_error")[0, 2] == value_error(sample.v, k_hat[..., :64])
    o, o_hat = (attention(sample, k, k[..., :64])[1] for k in (sample.k, k_hat))
    assert table.measure("output_error")[0, 2] == pytest.approx(output_error(o, o_hat), rel=1e-5)


def test_error_table_shows_progress_and_has_every_measure(tmp_path):
    seen = []
    capture = make_capture(tmp_path, {0: [make_sample(0), make_sample(1)], 2: [make_sample(2), make_sample(3)]})
    table = error_table(capture, dict.fromkeys((0, 2), (("f16",), ("f16",))), round_trip, progress=seen.append)
    assert seen == [1, 1]
    assert tuple(table.measures) == (*MEASURES, "stream_error")
