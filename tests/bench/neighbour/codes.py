"""The arithmetic that the neighbours' methods share: codes between a least and a largest value, levels that are fitted,
outliers, and RoPE undone."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from kvtuner_gguf.calibrate.samples import turned

N_BIN = 4096  # of the histogram that levels are fitted to
N_LLOYD = 50  # rounds, at most


def as_f16(x: np.ndarray) -> np.ndarray:
    """As float16 keeps it."""
    return x.astype(np.float16).astype(np.float32)


def min_max(x: np.ndarray, n_bits: int, rng: np.random.Generator | None = None) -> np.ndarray:
    """x as codes of n_bits between least and largest of the last axis, which are kept as an f16 minimum and step.

    rng  rounds up by chance, as often as the remainder says; None = to the nearest code
    """
    low = as_f16(x.min(axis=-1, keepdims=True))
    step = as_f16((x.max(axis=-1, keepdims=True) - low) / (2**n_bits - 1))
    at = (x - low) / np.where(step > 0, step, 1)
    codes = np.rint(at) if rng is None else np.floor(at + rng.random(x.shape, np.float32))
    return np.clip(codes, 0, 2**n_bits - 1) * step + low


def nearest(x: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """The level, of ascending ones, that is nearest to each value."""
    return levels[np.searchsorted((levels[1:] + levels[:-1]) / 2, x)]


def fitted_levels(x: np.ndarray, weights: np.ndarray, n_bits: int) -> np.ndarray:
    """2^n_bits ascending levels with the least weighted squared error for values in -1..1: Lloyd's k-means, started
    from even ones. (n,) twice -> float32"""
    at = np.clip(((x + 1) / 2 * N_BIN).astype(np.int64), 0, N_BIN - 1)
    mass = np.bincount(at, weights, N_BIN)
    moment = np.bincount(at, weights * x, N_BIN)
    centres = (np.arange(N_BIN) + 0.5) * 2 / N_BIN - 1
    levels = (np.arange(2**n_bits) + 0.5) * 2 / 2**n_bits - 1
    for _ in range(N_LLOYD):
        of = np.searchsorted((levels[1:] + levels[:-1]) / 2, centres)
        total = np.bincount(of, mass, len(levels))
        moved = np.where(total > 0, np.bincount(of, moment, len(levels)) / np.where(total > 0, total, 1), levels)
        if np.abs(moved - levels).max() < 1e-5:
            break
        levels = moved
    return levels.astype(np.float32)


def furthest(x: np.ndarray, n: int) -> np.ndarray:
    """Where the n values of each row are that are furthest from 0: a mask. (n_rows, n_values)"""
    mask = np.zeros(x.shape, bool)
    if n:
        np.put_along_axis(mask, np.argpartition(-np.abs(x), n - 1, axis=-1)[..., :n], True, axis=-1)
    return mask


def rows(x: np.ndarray) -> np.ndarray:
    """(n_head_kv, n_tokens, head_dim) -> a row for each token, all heads."""
    return x.transpose(1, 0, 2).reshape(x.shape[1], -1)


def heads(x: np.ndarray, n_head_kv: int) -> np.ndarray:
    """What `rows` was made of."""
    return np.ascontiguousarray(x.reshape(len(x), n_head_kv, -1).transpose(1, 0, 2))


def index_bits(n: int) -> int:
    """Of an index of n values, in whole bytes."""
    return 8 * math.ceil(math.log2(n) / 8)


@dataclass(frozen=True)
class Rope:
    """RoPE of plain frequencies: pair i of n_rot/2 is turned by pos * base^(-2 i / n_rot).

    pairs  the channels of a head that are turned, as LayerSample.rope_pairs has them
    """

    pairs: tuple[np.ndarray, np.ndarray]
    base: float

    def turned(self, x: np.ndarray, first: int) -> np.ndarray:
        """(n_head_kv, n_tokens, head_dim) before RoPE -> after it, tokens at first and on."""
        return self._by(x, np.arange(first, first + x.shape[1]))

    def undone(self, x: np.ndarray, first: int) -> np.ndarray:
        """What `turned` was made of."""
        return self._by(x, -np.arange(first, first + x.shape[1]))

    def _by(self, x: np.ndarray, places: np.ndarray) -> np.ndarray:
        n_pair = len(self.pairs[0])
        angle = places * self.base ** (-np.arange(n_pair)[:, None] / n_pair)
        return turned(x, self.pairs, np.stack([np.cos(angle), np.sin(angle)], axis=-1).astype(np.float32))
