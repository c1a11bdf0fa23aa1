"""Samples -> the moments of a layer's K and Q that conditioning goes by, averaged over the places of the context."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from kvtuner_gguf.calibrate.samples import LayerSample, turned
from kvtuner_gguf.kvectors import K_SCALE_RANGE

MOST_SPREAD = 1e3  # of a scale, to either side of 1: a channel that is next to nothing gets no more

ChannelPairs = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True, eq=False)
class Moments:
    """First and second moments of K and Q in one sample, averaged over the places of the context.

    mean   (n_head_kv, head_dim) of K
    k q    (n_head_kv, head_dim, head_dim) second moments of K, and of the Q of all heads that share it
    pairs  channels that RoPE turns
    An error e of the score of query i at token j moves the output by e * a_ij * (v_j - o_i): tokens and queries are
    weighed by the sum of a_ij^2 * |v_j - o_i|^2.
    """

    mean: np.ndarray
    k: np.ndarray
    q: np.ndarray
    pairs: ChannelPairs

    @classmethod
    def of(cls, sample: LayerSample, a: np.ndarray, o: np.ndarray) -> Moments:
        """a: (n_head, n_q, n_kv) the sample's scores, o: (n_head, n_q, head_dim_v) what attention gives."""
        k, q = sample.k.astype(np.float64), sample.q.astype(np.float64)
        n_head_kv, n_kv, head_dim = k.shape
        q = q.reshape(n_head_kv, -1, head_dim)  # heads that share K are neighbours
        moved = _moved(a.reshape(n_head_kv, -1, n_kv), sample.v, o.reshape(n_head_kv, -1, o.shape[-1]))
        of_tokens, of_queries = (_weights(moved.sum(axis=axis, dtype=np.float64)) for axis in (1, 2))
        turns = (
            np.stack([np.ones(sample.n_rot // 2), np.zeros(sample.n_rot // 2)], axis=-1)[None]
            if sample.turns is None
            else sample.turns
        )
        places = partial(_over_places, pairs=sample.rope_pairs, turns=turns.astype(np.float64))
        (mean, k_of), (_, q_of) = places(k, of_tokens), places(q, of_queries)
        return cls(mean, k_of, q_of, sample.rope_pairs)

    @classmethod
    def averaged(cls, moments: Sequence[Moments]) -> Moments:
        """Of all samples together."""

        def mean(name: str) -> np.ndarray:
            return np.mean([getattr(m, name) for m in moments], axis=0)

        return cls(mean("mean"), mean("k"), mean("q"), moments[0].pairs)

    def conditioned(self, mean: np.ndarray | None, scale: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """The second moments of (K - mean) / scale and of Q * scale. mean, scale (n_head_kv, head_dim), None = none"""
        k, q = self.k, self.q
        if mean is not None:
            cross = self.mean[:, :, None] * mean[:, None, :]
            k = k - cross - cross.swapaxes(1, 2) + mean[:, :, None] * mean[:, None, :]
        if scale is not None:
            by = scale[:, :, None] * scale[:, None, :]
            k, q = k / by, q * by
        return k, q


def _moved(a: np.ndarray, v: np.ndarray, o: np.ndarray) -> np.ndarray:
    """(n_head_kv, n_row, n_kv) by how much an error of each score moves the output, squared.

    a (n_head_kv, n_row, n_kv) scores, v (n_head_kv, n_kv, head_dim_v), o (n_head_kv, n_row, head_dim_v) = a @ v
    """
    apart = np.square(v).sum(axis=-1)[:, None, :] - 2 * (o @ v.swapaxes(1, 2)) + np.square(o).sum(axis=-1)[:, :, None]
    return np.square(a) * np.maximum(apart, 0)


def _weights(x: np.ndarray) -> np.ndarray:
    """Of a sum of 1 along the last axis, and none quite zero; all alike where nothing moves the output."""
    x = x + 1e-9 * x.sum(axis=-1, keepdims=True) + np.finfo(np.float64).tiny
    return x / x.sum(axis=-1, keepdims=True)


def _over_places(
    x: np.ndarray, weight: np.ndarray, *, pairs: ChannelPairs, turns: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Weighted mean (n, head_dim) and second moment (n, head_dim, head_dim), averaged over places.

    x (n, n_token, head_dim), weight (n, n_token)
    """
    mean = np.einsum("nt,ntd->nd", weight, x)
    second = (x * weight[..., None]).swapaxes(1, 2) @ x
    means, seconds = np.zeros_like(mean), np.zeros_like(second)
    for turn in turns:
        means += turned(mean, pairs, turn) / len(turns)
        seconds += turned(turned(second, pairs, turn).swapaxes(1, 2), pairs, turn) / len(turns)
    return means, seconds


def energy(second: np.ndarray, pairs: ChannelPairs) -> np.ndarray:
    """(n_head_kv, head_dim) mean squares from second moments, each that of its RoPE pair."""
    return tied(np.maximum(np.diagonal(second, axis1=1, axis2=2), 0), *pairs)


def tied(mean_sq: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """(n_head_kv, head_dim) mean squares, each that of its RoPE pair: positions turn one into the other."""
    out = mean_sq.copy()
    out[:, first] = out[:, second] = (mean_sq[:, first] + mean_sq[:, second]) / 2
    return out


def balanced_scale(k_sq: np.ndarray, q_sq: np.ndarray) -> np.ndarray:
    """(n_head_kv, head_dim) mean squares of K and Q -> sqrt(rms_k/rms_q), of geometric mean 1 in each head."""
    tiny = np.finfo(np.float32).tiny
    log_s = (np.log(np.maximum(k_sq, tiny)) - np.log(np.maximum(q_sq, tiny))) / 4
    log_s -= np.median(log_s, axis=1, keepdims=True)  # a dead channel is far off, and must not move the others
    log_s = np.clip(log_s, -np.log(MOST_SPREAD), np.log(MOST_SPREAD))
    log_s -= log_s.mean(axis=1, keepdims=True)
    return np.clip(np.exp(log_s), *K_SCALE_RANGE)
