"""Capture -> Conditions: a mean and a balanced scale of each layer's K, kept where they were measured to lower its error.

The mean: softmax does not see what shifts all scores of a query alike, so K may be cached without its mean over tokens, and
codes then cover what is left. The scale: the noise of a rotated codec is the same in all channels and grows with K's energy,
sum of k^2/s^2; Q*s turns it into an error of the scores of sum of q^2*s^2. The product is least at s = sqrt(rms_k/rms_q).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from ..plan import K_SCALE_RANGE, KVectors
from .results import Capture, Conditions, LayerSample

LEAST_GAIN = 0.02  # of the error, for one more operation in every token's graph
MOST_SPREAD = 1e3  # of a scale, to either side of 1: a channel that is next to nothing gets no more

# name -> (mean, scale), from the fewest operations on
WAYS = {"none": (False, False), "mean": (True, False), "scale": (False, True), "both": (True, True)}


def condition(
    capture: Capture,
    error: Callable[[LayerSample, str, KVectors], float],
    type_k: Mapping[int, str],
    *,
    mean: bool = True,
    scale: bool = True,
    progress: Callable[[int], None] = lambda n: None,
) -> Conditions:
    """How each captured layer's K is to be conditioned.

    error       of a sample's attention with K in a type, conditioned by vectors
    type_k      il -> the type to measure with: the coarsest that the layer may get; layers that are not in it are left alone
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
                errors[il] = _errors(samples, allowed, lambda sample, v: error(sample, type_k[il], v))
                k_vectors[il] = vectors_of(samples, *WAYS[best_way(errors[il])])
        progress(1)
    return Conditions(tuple(k_vectors), errors)


def mean_matters(sample: LayerSample) -> bool:
    """True where the attention is no plain softmax, so that the mean of K changes the output: the run time leaves it in."""
    return bool(sample.logit_softcap) or sample.sinks is not None


def best_way(errors: Mapping[str, float]) -> str:
    """The way of the fewest operations whose error is within LEAST_GAIN of the least."""
    least = min(errors.values())
    return next(name for name in WAYS if name in errors and errors[name] <= least * (1 + LEAST_GAIN))


def _errors(
    samples: Sequence[LayerSample], ways: Mapping[str, tuple[bool, bool]], error: Callable[[LayerSample, KVectors], float]
) -> dict[str, float]:
    """Error of each way, mean over samples."""
    found = {}
    for name, way in ways.items():
        each = []
        for i, sample in enumerate(samples):
            others = [s for j, s in enumerate(samples) if j != i] or [sample]
            each.append(error(sample, vectors_of(others, *way)))
        found[name] = float(np.mean(each))
    return found


def vectors_of(samples: Sequence[LayerSample], mean: bool, scale: bool) -> KVectors:
    """Mean and balanced scale of a layer's K in these samples; what is not asked for is empty.

    The scale is that of the K that is left once the mean is off, if it is; the same within each pair that RoPE turns; of
    geometric mean 1 in each head.
    """
    k = np.concatenate([s.k for s in samples], axis=1).astype(np.float64)  # (n_head_kv, n, head_dim)
    q = np.concatenate([s.q for s in samples], axis=1).astype(np.float64)  # (n_head, n, head_dim)
    centre = k.mean(axis=1, keepdims=True) if mean else np.zeros((len(k), 1, k.shape[-1]))
    of_head = {"mean": centre[:, 0] if mean else None, "scale": None}
    if scale:
        k_sq = np.square(k - centre).mean(axis=1)
        q_sq = np.square(q).reshape(len(k), -1, q.shape[-1]).mean(axis=1)  # heads that share K are neighbours
        of_head["scale"] = balanced_scale(*(tied(x, samples[0].n_rot, samples[0].far_pairs) for x in (k_sq, q_sq)))
    return KVectors(**{name: () if x is None else tuple(x.astype(np.float32).reshape(-1).tolist()) for name, x in of_head.items()})


def tied(energy: np.ndarray, n_rot: int, far_pairs: bool) -> np.ndarray:
    """(n_head_kv, head_dim) mean squares, each that of its RoPE pair: positions turn one into the other."""
    first = np.arange(n_rot // 2) if far_pairs else np.arange(0, n_rot, 2)
    second = first + (n_rot // 2 if far_pairs else 1)
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
