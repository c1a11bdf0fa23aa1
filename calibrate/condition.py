"""Capture -> Conditions: a mean and a balanced scale of each layer's K, kept where they were measured to lower its
error.

The mean: softmax does not see what shifts all scores of a query alike, so K may be cached without its mean over tokens,
and codes then cover what is left. The scale: the noise of a rotated codec is the same in all channels and grows with
K's energy, sum of k^2/s^2; Q*s turns it into an error of the scores of sum of q^2*s^2. The product is least at s =
sqrt(rms_k/rms_q). Tokens count by the attention they get.

Both must hold wherever in the context a token stands, and RoPE turns K as it goes: a mean taken at the start of the
context is a wrong one, worse than none, some thousand tokens on. So moments are averaged over the places of the whole
context.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from kvtuner_gguf.calibrate.results import Conditions
from kvtuner_gguf.calibrate.samples import Capture, LayerSample
from kvtuner_gguf.kvectors import K_MEAN_MAX, K_SCALE_RANGE, KVectors

LEAST_GAIN = 0.02  # of the error, for one more operation in every token's graph
MOST_SPREAD = 1e3  # of a scale, to either side of 1: a channel that is next to nothing gets no more
N_JUDGED = 3  # places at which a sample is measured

# name -> (mean, scale), from the fewest operations on
WAYS = {"none": (False, False), "mean": (True, False), "scale": (False, True), "both": (True, True)}

Scores = Callable[[LayerSample], np.ndarray]
Error = Callable[[LayerSample, str], Callable[[KVectors], float]]


def condition(
    capture: Capture,
    error: Error,
    scores: Scores,
    type_k: Mapping[int, str],
    *,
    mean: bool = True,
    scale: bool = True,
    progress: Callable[[int], None] = lambda n: None,
) -> Conditions:
    """How each captured layer's K is to be conditioned.

    error       of a sample and a type of K: a function of vectors, the error of its attention under them
    scores      of a sample: (n_head, n_q, n_kv) after softmax
    type_k      il -> the type to measure with: the coarsest that the layer may get; layers that are not in it are left
                alone
    mean scale  whether to try them at all
    Each sample is measured with vectors of the others, if there are others, so that none looks better than it will be.
    """
    k_vectors, errors = [KVectors()] * capture.n_layer, {}
    ways = {name: way for name, way in WAYS.items() if way[0] <= mean and way[1] <= scale}
    for il in capture.il:
        if il in type_k and len(ways) > 1:
            samples = [capture.sample(il, i) for i in range(capture.n_sample)]
            allowed = {name: way for name, way in ways.items() if not (way[0] and mean_matters(samples[0]))}
            if not samples[0].v_in_k:
                moments = [Moments.of(sample, scores(sample)) for sample in samples]
                errors[il] = _errors(samples, moments, allowed, partial(_error_in, error, type_k[il]))
                k_vectors[il] = vectors_of(moments, *WAYS[best_way(errors[il])])
        progress(1)
    return Conditions(tuple(k_vectors), errors)


def _error_in(error: Error, type_k: str, sample: LayerSample) -> Callable[[KVectors], float]:
    return error(sample, type_k)


def mean_matters(sample: LayerSample) -> bool:
    """True where the attention is no plain softmax, so that the mean of K changes the output: the run time leaves it
    in."""
    return bool(sample.logit_softcap) or sample.sinks is not None


def best_way(errors: Mapping[str, float]) -> str:
    """The way of the fewest operations whose error is within LEAST_GAIN of the least."""
    least = min(errors.values())
    return next(name for name in WAYS if name in errors and errors[name] <= least * (1 + LEAST_GAIN))


def _errors(
    samples: Sequence[LayerSample],
    moments: Sequence[Moments],
    ways: Mapping[str, tuple[bool, bool]],
    error: Callable[[LayerSample], Callable[[KVectors], float]],
) -> dict[str, float]:
    """Error of each way, mean over samples and a few places of each."""
    each: dict[str, list[float]] = {name: [] for name in ways}
    for i, sample in enumerate(samples):
        others = [m for j, m in enumerate(moments) if j != i] or [moments[i]]
        vectors = {name: vectors_of(others, *way) for name, way in ways.items()}
        for place in _judged(sample, i):
            error_under = error(sample if place is None else sample.turned(place))
            for name in ways:
                each[name].append(error_under(vectors[name]))
    return {name: float(np.mean(errors)) for name, errors in each.items()}


def _judged(sample: LayerSample, i: int) -> Sequence[int | None]:
    """Places at which sample i is measured: others than the next sample's."""
    if sample.turns is None or not sample.n_rot:
        return [None]
    n = len(sample.turns)
    return sorted({(j * n // N_JUDGED + i) % n for j in range(N_JUDGED)})


@dataclass(frozen=True, eq=False)
class Moments:
    """First and second moments of K and Q in one sample, averaged over the places of the context.

    mean       (n_head_kv, head_dim) of K
    k_sq q_sq  (n_head_kv, head_dim) mean squares; of K, tokens weighed by attention; of the Q of all heads that share a
               K
    mean_w     (n_head_kv, head_dim) mean of K, weighed likewise: what k_sq is to be centred with
    pairs      channels that RoPE turns
    """

    mean: np.ndarray
    k_sq: np.ndarray
    q_sq: np.ndarray
    mean_w: np.ndarray
    pairs: tuple[np.ndarray, np.ndarray]

    @classmethod
    def of(cls, sample: LayerSample, a: np.ndarray) -> Moments:
        """a: (n_head, n_q, n_kv) the sample's scores."""
        k, q = sample.k.astype(np.float64), sample.q.astype(np.float64)
        n_head_kv, n_kv, head_dim = k.shape
        # an error of a score moves the output by a*(1 - a)
        w = (a * (1 - a)).reshape(n_head_kv, -1, n_kv).mean(axis=1, dtype=np.float64) + 1e-12
        w /= w.sum(axis=1, keepdims=True)
        q = q.reshape(n_head_kv, -1, head_dim)  # heads that share K are neighbours
        even = np.full(q.shape[:2], 1 / q.shape[1])
        turns = (
            np.stack([np.ones(sample.n_rot // 2), np.zeros(sample.n_rot // 2)], axis=-1)[None]
            if sample.turns is None
            else sample.turns
        )
        places = partial(_over_places, pairs=sample.rope_pairs, turns=turns.astype(np.float64))
        (mean, _), (mean_w, k_sq), (_, q_sq) = places(k, np.full(w.shape, 1 / n_kv)), places(k, w), places(q, even)
        return cls(mean, k_sq, q_sq, mean_w, sample.rope_pairs)


def _over_places(
    x: np.ndarray, weight: np.ndarray, *, pairs: tuple[np.ndarray, np.ndarray], turns: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Weighted mean and mean square of each channel, (n, head_dim) each, averaged over places. x (n, n_token,
    head_dim)."""
    mean = np.einsum("nt,ntd->nd", weight, x)
    square = np.einsum("nt,ntd->nd", weight, np.square(x))
    first, second = pairs
    cross = np.einsum("nt,ntd->nd", weight, x[..., first] * x[..., second])
    cos, sin = turns[..., 0], turns[..., 1]
    m1, m2, s1, s2 = mean[:, first].copy(), mean[:, second].copy(), square[:, first].copy(), square[:, second].copy()
    mean[:, first] = m1 * cos.mean(axis=0) - m2 * sin.mean(axis=0)
    mean[:, second] = m1 * sin.mean(axis=0) + m2 * cos.mean(axis=0)
    cos_sq, sin_sq, both = (cos**2).mean(axis=0), (sin**2).mean(axis=0), 2 * (cos * sin).mean(axis=0)
    square[:, first] = s1 * cos_sq + s2 * sin_sq - cross * both
    square[:, second] = s1 * sin_sq + s2 * cos_sq + cross * both
    return mean, square


def vectors_of(moments: Sequence[Moments], mean: bool, scale: bool) -> KVectors:
    """Mean and balanced scale of a layer's K; what is not asked for is empty.

    The scale is that of the K that is left once the mean is off, if it is; the same within each pair that RoPE turns;
    of geometric mean 1 in each head.
    """
    average = {
        name: np.mean([getattr(m, name) for m in moments], axis=0) for name in ("mean", "k_sq", "q_sq", "mean_w")
    }
    of_head: dict[str, np.ndarray | None] = {
        "mean": np.clip(average["mean"], -K_MEAN_MAX, K_MEAN_MAX) if mean else None,
        "scale": None,
    }
    if scale:
        k_sq = average["k_sq"]
        if mean:
            k_sq = np.maximum(k_sq - 2 * average["mean_w"] * average["mean"] + average["mean"] ** 2, 0)
        of_head["scale"] = balanced_scale(*(tied(x, *moments[0].pairs) for x in (k_sq, average["q_sq"])))
    return KVectors(
        **{name: () if x is None else tuple(x.astype(np.float32).reshape(-1).tolist()) for name, x in of_head.items()}
    )


def tied(energy: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """(n_head_kv, head_dim) mean squares, each that of its RoPE pair: positions turn one into the other."""
    out = energy.copy()
    out[:, first] = out[:, second] = (energy[:, first] + energy[:, second]) / 2
    return out


def balanced_scale(k_sq: np.ndarray, q_sq: np.ndarray) -> np.ndarray:
    """(n_head_kv, head_dim) mean squares of K and Q -> sqrt(rms_k/rms_q), of geometric mean 1 in each head."""
    tiny = np.finfo(np.float32).tiny
    log_s = (np.log(np.maximum(k_sq, tiny)) - np.log(np.maximum(q_sq, tiny))) / 4
    log_s -= np.median(log_s, axis=1, keepdims=True)  # a dead channel is far off, and must not move the others
    log_s = np.clip(log_s, -np.log(MOST_SPREAD), np.log(MOST_SPREAD))
    log_s -= log_s.mean(axis=1, keepdims=True)
    return np.clip(np.exp(log_s), *K_SCALE_RANGE)
