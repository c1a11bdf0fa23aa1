"""How far a layer's attention moves when its K and V go through a cache type and back.

Source: KVTuner (arXiv 2502.04420), section 3.2 and appendix B. Every layer gets exact input, so no error adds up from
layer to layer. Where the paper writes |x - x_hat| / |x| we take the ratio of L1 norms of a head: its tables fit that. A
mean of the ratios of single values would be ruled by those next to 0, and several times larger than what it prints.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from kvtuner_gguf.calibrate.basis import hadamard, matrices
from kvtuner_gguf.calibrate.layers import of_layers
from kvtuner_gguf.calibrate.results import ErrorTable
from kvtuner_gguf.calibrate.samples import Capture, LayerSample
from kvtuner_gguf.codecs import codec
from kvtuner_gguf.kvectors import AS_IT_IS, KVectors
from kvtuner_gguf.pair import Pair

TypesOfLayer = tuple[Sequence[str], Sequence[str]]  # of K, of V
RoundTrip = Callable[[str, np.ndarray], np.ndarray]


def key_error(k: np.ndarray, k_hat: np.ndarray) -> float:
    """Relative L1 error of K, mean over KV heads. (n_head_kv, n_kv, head_dim) twice -> float >= 0, no unit.

    The paper's e_k. 0 means identical; a head that is all zeros counts as 0 if it stays so.
    """
    return _relative_l1(k, k_hat)


def value_error(v: np.ndarray, v_hat: np.ndarray) -> float:
    """Relative L1 error of V, mean over KV heads. (n_head_kv, n_kv, head_dim) twice -> float >= 0, no unit.

    The paper's e_v, else as key_error.
    """
    return _relative_l1(v, v_hat)


def score_error(a: np.ndarray, a_hat: np.ndarray) -> float:
    """Absolute error of the attention scores after softmax, mean over elements. Any shape, twice -> float in 0..1.

    The paper's e_a, over queries that see every cell. Where a mask hides cells, give only those that are seen: hidden
    ones are exact zeros and would dilute the mean.
    """
    return float(np.abs(a - a_hat).mean(dtype=np.float64))


def output_error(o: np.ndarray, o_hat: np.ndarray) -> float:
    """Relative L1 error of the attention output, mean over heads. (n_head, n_q, head_dim_v) twice -> float >= 0.

    The paper's e_o, by which it prunes and clusters, else as key_error.
    """
    return _relative_l1(o, o_hat)


def output_nrmse(o: np.ndarray, o_hat: np.ndarray) -> float:
    """Relative Frobenius error of the attention output, all heads at once. Shapes as in output_error -> float >= 0.

    The root of the nmse: a large error weighs more than in output_error, and so does a head with a large output.
    """
    error = np.square(o - o_hat).sum(dtype=np.float64)
    return float(np.sqrt(error / _not_zero(np.square(o).sum(dtype=np.float64))))


Measure = Callable[[np.ndarray, np.ndarray], float]

# name -> (what is compared before and after: key, value, score or output; the measure)
MEASURES: dict[str, tuple[str, Measure]] = {
    "key_error": ("key", key_error),
    "value_error": ("value", value_error),
    "score_error": ("score", score_error),
    "output_error": ("output", output_error),
    "output_nrmse": ("output", output_nrmse),
}


def attention(sample: LayerSample, k: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scores and output of a sample's queries over other K and V than its own.

    k v  shaped as the sample's, float32
    -> a (n_head, n_q, n_kv) after softmax, o (n_head, n_q, head_dim_v), float32
    Source: llama.cpp@0c1e570:ggml/src/ggml-cpu/ops.cpp:ggml_compute_forward_flash_attn_ext.
    """
    a = attention_scores(sample, k)
    return a, attention_output(a, v)


def attention_scores(sample: LayerSample, k: np.ndarray) -> np.ndarray:
    """(n_head, n_q, n_kv) scores after softmax, the first half of attention. All zero for a query that sees nothing."""
    n_head, n_q, head_dim = sample.q.shape
    n_head_kv, n_kv, _ = k.shape
    q = (sample.q * np.float32(sample.scale)).reshape(n_head_kv, -1, head_dim)  # heads that share K are neighbours
    s = (q @ k.transpose(0, 2, 1)).reshape(n_head, n_q, n_kv)
    if sample.logit_softcap:
        cap = np.float32(sample.logit_softcap)
        s = cap * np.tanh(s / cap)
    if sample.max_bias:
        s += alibi_slopes(n_head, sample.max_bias)[:, None, None] * sample.mask
    else:
        s += sample.mask
    return _softmax(s, sample.sinks)


def attention_output(a: np.ndarray, v: np.ndarray) -> np.ndarray:
    """(n_head, n_q, head_dim_v) from scores (n_head, n_q, n_kv), the second half of attention."""
    n_head, n_q, n_kv = a.shape
    return (a.reshape(v.shape[0], -1, n_kv) @ v).reshape(n_head, n_q, v.shape[-1])


def alibi_slopes(n_head: int, max_bias: float) -> np.ndarray:
    """(n_head,) factor of the mask's distances in each head. Source: as attention."""
    n_head_log2 = 1 << (n_head.bit_length() - 1)
    m0 = 2.0 ** (-max_bias / n_head_log2)
    m1 = 2.0 ** (-max_bias / 2 / n_head_log2)
    slopes = [m0 ** (h + 1) if h < n_head_log2 else m1 ** (2 * (h - n_head_log2) + 1) for h in range(n_head)]
    return np.array(slopes, dtype=np.float32)


def rotate(x: np.ndarray, n: int) -> np.ndarray:
    """x with each n values along the last axis rotated by hadamard(n); twice gives x again. n = 0 leaves it alone."""
    if not n:
        return x
    return (x.reshape(*x.shape[:-1], -1, n) @ hadamard(n)).reshape(x.shape)


def after_codec(
    x: np.ndarray, type_name: str, n_rot: int, round_trip: RoundTrip, vectors: KVectors = AS_IT_IS
) -> np.ndarray:
    """K or V as attention reads it from a cache of this type; x itself if the type changes nothing.

    x        (n_head_kv, n_kv, head_dim) float32
    n_rot    rotation that the run time puts around a quantized type
    vectors  mean, scale and basis that it takes K to before, and that are undone here, where the run time has them on
             Q; a basis under types of groups alone, in place of the rotation
    """
    vectors = vectors.under(type_name)
    if codec(type_name).block_size == 1:
        n_rot = 0
    elif vectors.mean:
        mean = np.array(vectors.mean, np.float32).reshape(len(x), 1, -1)
        return after_codec(x - mean, type_name, n_rot, round_trip, replace(vectors, mean=())) + mean
    elif vectors.basis:
        matrix = matrices(vectors)
        x_hat = after_codec((x @ matrix.swapaxes(1, 2)).astype(np.float32), type_name, 0, round_trip)
        return np.linalg.solve(matrix, x_hat.swapaxes(1, 2)).swapaxes(1, 2).astype(np.float32)
    elif vectors.scale:
        scale = np.array(vectors.scale, np.float32).reshape(len(x), 1, -1)
        return after_codec(x / scale, type_name, n_rot, round_trip) * scale
    n_head_kv, n_kv, head_dim = x.shape
    rows = rotate(x, n_rot).transpose(1, 0, 2).reshape(n_kv, -1)  # a row of the cache is one token, all heads
    rows_hat = round_trip(type_name, rows).reshape(n_kv, n_head_kv, head_dim)
    x_hat = rotate(np.ascontiguousarray(rows_hat.transpose(1, 0, 2), dtype=np.float32), n_rot)
    return x if np.array_equal(x, x_hat) else x_hat


def error_table(
    capture: Capture,
    types: Mapping[int, TypesOfLayer],
    round_trip: RoundTrip,
    k_vectors: Sequence[KVectors] = (),
    *,
    first: int = 0,
    n_threads: int = 1,
    progress: Callable[[int], None] = lambda n: None,
) -> ErrorTable:
    """The errors of every pair that each captured layer may have, mean over samples: MEASURES, and

    stream_error  output_nrmse times the root of attention's share: relative error of the residual stream, which tells
                  what a layer does to the model better than output_nrmse does

    types       il -> (types of K, types of V) allowed in that layer; all combinations are measured, but equal ones
                only where V lies in K's rows
    round_trip  (type name, float32 rows (n_kv, n_head_kv*head_dim)) -> the rows after quantize and dequantize
    k_vectors   how each layer of the model conditions a quantized K; () = none does
    first       sample to begin with
    n_threads   layers at once, at most
    progress    gets layers done
    """

    def of_layer(il: int) -> dict[Pair, dict[str, float]]:
        vectors = k_vectors[il] if k_vectors else AS_IT_IS
        measured = (capture.sample(il, i).measured() for i in range(first, capture.n_sample))
        samples = [sample_errors(sample, *types[il], round_trip, vectors) for sample in measured]
        return {pair: _mean([errors[pair] for errors in samples]) for pair in samples[0]}

    layers = []
    for layer in of_layers(of_layer, capture.il, n_threads):
        layers.append(layer)
        progress(1)
    pairs = tuple(dict.fromkeys(pair for layer in layers for pair in layer))
    nan = dict.fromkeys(MEASURES, np.nan)
    tables = {name: np.array([[layer.get(p, nan)[name] for p in pairs] for layer in layers]) for name in MEASURES}
    tables["stream_error"] = tables["output_nrmse"] * np.sqrt(capture.share)[:, None]
    return ErrorTable(pairs, capture.il, tables)


def sample_errors(
    sample: LayerSample,
    types_k: Sequence[str],
    types_v: Sequence[str],
    round_trip: RoundTrip,
    vectors: KVectors = AS_IT_IS,
) -> dict[Pair, dict[str, float]]:
    """Every measure of every pair of these types in one sample.

    What a K type does to K and to the scores is computed once, and so is what a V type does to V.
    """
    visible = sample.mask > -np.inf
    a, o = attention(sample, sample.k, sample.v)
    a_visible = a[:, visible]
    v_in_k = sample.v_in_k
    values = {} if v_in_k else {t: after_codec(sample.v, t, sample.rot_v, round_trip) for t in types_v}
    of_values = {t: _measures("value", sample.v, v_hat) for t, v_hat in values.items()}
    errors = {}
    for type_k in types_k:
        k_hat = after_codec(sample.k, type_k, sample.rot_k, round_trip, vectors)
        a_hat = a if k_hat is sample.k else attention_scores(sample, k_hat)
        of_key = _measures("key", sample.k, k_hat) | _measures("score", a_visible, a_hat[:, visible])
        if v_in_k:
            values = _values_in_keys(sample, k_hat, type_k) if type_k in types_v else {}
            of_values = {t: _measures("value", sample.v, v_hat) for t, v_hat in values.items()}
        for type_v, v_hat in values.items():
            o_hat = o if a_hat is a and v_hat is sample.v else attention_output(a_hat, v_hat)
            errors[Pair(type_k, type_v)] = of_key | of_values[type_v] | _measures("output", o, o_hat)
    return errors


def k_error(sample: LayerSample, *, round_trip: RoundTrip) -> Callable[[LayerSample, str, KVectors], float]:
    """A function of the same text at any place, a type of K, and vectors: output_nrmse there with K in this type,
    conditioned by them, and V as it is. What it is compared with is computed once, as no place changes attention."""
    _, o = attention(sample, sample.k, sample.v)

    def error(here: LayerSample, type_k: str, vectors: KVectors) -> float:
        k_hat = after_codec(here.k, type_k, here.rot_k, round_trip, vectors)
        return output_nrmse(o, attention(here, k_hat, here.v)[1])

    return error


def _values_in_keys(sample: LayerSample, k_hat: np.ndarray, type_k: str) -> dict[str, np.ndarray]:
    """V where it is the front of K's rows: whatever the type of K made of it."""
    return {type_k: sample.v if k_hat is sample.k else k_hat[..., : sample.head_dim_v]}


def _measures(of: str, x: np.ndarray, x_hat: np.ndarray) -> dict[str, float]:
    return {name: measure(x, x_hat) for name, (what, measure) in MEASURES.items() if what == of}


def _mean(errors: list[dict[str, float]]) -> dict[str, float]:
    return {name: float(np.mean([e[name] for e in errors])) for name in MEASURES}


def _relative_l1(x: np.ndarray, x_hat: np.ndarray) -> float:
    """sum |x - x_hat| / sum |x| of each head, mean over heads."""
    error = np.abs(x - x_hat).sum(axis=(1, 2), dtype=np.float64)
    return float((error / _not_zero(np.abs(x).sum(axis=(1, 2), dtype=np.float64))).mean())


def _not_zero(norm: np.ndarray) -> np.ndarray:
    return np.maximum(norm, np.finfo(np.float32).tiny)


def _softmax(s: np.ndarray, sinks: np.ndarray | None) -> np.ndarray:
    """Softmax along the last axis, in place; a sink takes its share and is dropped."""
    top = np.maximum(s.max(axis=-1, keepdims=True), np.finfo(np.float32).min)  # finite where a query sees nothing
    if sinks is not None:
        top = np.maximum(top, sinks[:, None, None])
    s -= top
    np.exp(s, out=s)
    total = s.sum(axis=-1, keepdims=True)
    if sinks is not None:
        total += np.exp(sinks[:, None, None] - top)
    s /= np.maximum(total, np.finfo(np.float32).tiny)
    return s
