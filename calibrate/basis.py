"""Moments -> a basis of a layer's K, in which its channels are sorted by what they matter, for types of groups.

Such a type gives the first quarter of a head's channels more bits than the last. What a channel matters is its energy
in K times that in Q. Two bases, both of K as mean and scale leave it:

pairs  the RoPE pairs in the order of that product, each channel balanced: it holds wherever in the context a token
       stands, as RoPE changes no pair's energy
klt    the eigenvectors of Cq^(1/2) Ck Cq^(1/2), which put most of the product into few directions

In each quarter an orthonormal matrix spreads outliers, as the rotation does elsewhere, and K gets unit variance.
Source: transform coding; Karhunen-Loeve transform under the metric of Q.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from kvtuner_gguf.calibrate.moments import ChannelPairs, Moments, balanced_scale, energy
from kvtuner_gguf.kvectors import K_BASIS_SCALE_RANGE, KVectors

N_GROUP = 4  # quarters of a head
BLOCK, PER_GROUP = 64, 16  # values of a block, and of each quarter in it
RIDGE = 1e-3  # of Q's mean energy, added to each direction: few queries have nothing in some
LEAST_ENERGY = 1e-6  # of the largest direction's, for one that is next to nothing
LEAST_VARIANCE = 1e-8  # of the largest quarter's, likewise
MOST_CONDITION = 1e6  # of a matrix that its inverse, in float32, can undo


def has_blocks(head_dim: int) -> bool:
    """Whether types of groups hold heads of this size."""
    return head_dim % BLOCK == 0


def with_basis(way: str, moments: Moments, vectors: KVectors) -> KVectors:
    """A layer's mean and scale with a basis of this way; without one if its matrix would be next to singular."""
    shape = moments.mean.shape
    mean, scale = (np.reshape(x, shape) if x else None for x in (vectors.mean, vectors.scale))
    k, q = moments.conditioned(mean, scale)
    rows, row_scale = _as_kept(BASES[way](k, q, moments.pairs), k)
    found = replace(
        vectors,
        basis=rows.tobytes(),
        basis_scale=tuple(row_scale.astype(np.float32).reshape(-1).tolist()),
    )
    return found if (np.linalg.cond(matrices(found)) < MOST_CONDITION).all() else vectors


def matrices(vectors: KVectors) -> np.ndarray:
    """(n_head_kv, head_dim, head_dim) float64: what K without its mean is multiplied by, as columns."""
    shape = (-1, vectors.head_dim, vectors.head_dim)
    rows = np.frombuffer(vectors.basis, np.int8).reshape(shape) * np.reshape(vectors.basis_scale, shape[:2])[..., None]
    return rows / np.reshape(vectors.scale, shape[:2])[:, None, :] if vectors.scale else rows


def sorted_pairs(k: np.ndarray, q: np.ndarray, pairs: ChannelPairs) -> np.ndarray:
    """(n, head_dim, head_dim) rows in descending order of what they matter. k, q: second moments, likewise."""
    k_sq, q_sq = energy(k, pairs), energy(q, pairs)
    scale = balanced_scale(k_sq, q_sq)  # 1 where the layer has a scale
    orders = [_order(matter, pairs) for matter in k_sq * q_sq]
    return np.stack([(np.eye(k.shape[1]) / s)[order] for s, order in zip(scale, orders)])


def _order(matter: np.ndarray, pairs: ChannelPairs) -> list[int]:
    """Channels by descending matter (head_dim,); RoPE pairs, whose channels matter alike, stay in one quarter."""
    units = [[int(i), int(j)] for i, j in zip(*pairs)]
    alone = {*range(len(matter))} - {i for unit in units for i in unit}
    units = sorted([*units, *([i] for i in sorted(alone))], key=lambda unit: -matter[unit[0]])
    order: list[int] = []
    while units:
        room = len(matter) // N_GROUP - len(order) % (len(matter) // N_GROUP)
        order += units.pop(next(i for i, unit in enumerate(units) if len(unit) <= room))
    return order


def klt(k: np.ndarray, q: np.ndarray, _: ChannelPairs) -> np.ndarray:
    """As sorted_pairs: the eigenvectors of K's second moment in the metric of Q's, both sides balanced."""
    k, q = _of_unit_energy(k), _of_unit_energy(q)
    values, axes = np.linalg.eigh(q + RIDGE * np.eye(q.shape[1]))
    root = (axes * np.sqrt(values)[:, None, :]) @ axes.swapaxes(1, 2)
    matter, axes = np.linalg.eigh(root @ k @ root)
    matter, axes = matter[:, ::-1], axes[:, :, ::-1]  # descending
    matter = np.maximum(matter, LEAST_ENERGY * matter[:, :1])
    return matter[..., None] ** -0.25 * (axes.swapaxes(1, 2) @ root)


def _of_unit_energy(second: np.ndarray) -> np.ndarray:
    """Second moments divided by their mean diagonal; the unit matrix for a head that is all zero."""
    mean = np.trace(second, axis1=1, axis2=2)[:, None, None] / second.shape[1]
    return np.where(mean > 0, second / np.where(mean > 0, mean, 1), np.eye(second.shape[1]))


BASES: dict[str, Callable[[np.ndarray, np.ndarray, ChannelPairs], np.ndarray]] = {"pairs": sorted_pairs, "klt": klt}


def _as_kept(rows: np.ndarray, k: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int8 (n, head_dim, head_dim), and the scale of each row: the sorted rows spread in each quarter, in the order of
    a row of the cache, so that each quarter of what they make of K, of second moment k, has unit variance."""
    n, head_dim, _ = rows.shape
    quarter = head_dim // N_GROUP
    spread = mixing(quarter) @ rows.reshape(n, N_GROUP, quarter, head_dim)
    scale = np.abs(spread).max(axis=-1, keepdims=True) / 127
    whole = np.rint(spread / scale)
    kept = whole * scale
    variance = np.einsum("ngid,nde,ngie->ng", kept, k, kept, optimize=True) / quarter
    variance = np.maximum(variance, LEAST_VARIANCE * variance.max(axis=1, keepdims=True))
    scale = np.clip(scale / np.sqrt(np.where(variance > 0, variance, 1))[..., None, None], *K_BASIS_SCALE_RANGE)
    order = np.arange(head_dim).reshape(N_GROUP, -1, PER_GROUP).swapaxes(0, 1).reshape(-1)
    return whole.reshape(n, head_dim, head_dim)[:, order].astype(np.int8), scale.reshape(n, head_dim)[:, order]


def mixing(n: int) -> np.ndarray:
    """(n, n) orthonormal matrix that spreads each of n values over all: Hadamard's, times a cosine transform of what is
    no power of two in n."""
    power = n & -n
    odd, i = n // power, np.arange(n // power)
    cosine = np.sqrt(2 / odd) * np.cos(np.pi * np.outer(i, 2 * i + 1) / (2 * odd))
    cosine[0] = np.sqrt(1 / odd)
    return np.kron(hadamard(power).astype(np.float64), cosine)


def hadamard(n: int) -> np.ndarray:
    """(n, n) orthonormal Walsh-Hadamard matrix, its own inverse; n is a power of two.

    Source: llama.cpp@0c1e570:src/llama-kv-cache.cpp:ggml_gen_hadamard.
    """
    h = np.ones((1, 1), dtype=np.float32)
    while len(h) < n:
        h = np.block([[h, h], [h, -h]])
    return h / np.float32(np.sqrt(n))
