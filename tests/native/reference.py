"""Our types in plain numpy, from the words of kvt-types.h and kvt-blocks.h (native/ggml-base): what their bytes must
be."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

F32 = np.float32
MAGNITUDES = {
    2: np.array([3, 10], F32),
    3: np.array([14, 45, 79, 127], F32),
}  # the positive levels; the others mirror them


def fields(name: str) -> tuple[int, int]:
    """(bits of a code, values in a block) of "q3_64"."""
    bits, n = name[1:].split("_")
    return int(bits), int(n)


def quantize(name: str, x: np.ndarray) -> np.ndarray:
    """(n_rows, n_per_row) float32 -> (n_rows, row_bytes) uint8."""
    bits, n = fields(name)
    blocks = np.asarray(x, F32).reshape(-1, n)
    with np.errstate(divide="ignore", over="ignore"):
        d, codes = (_uniform if bits == 6 else _symmetric)(blocks, bits)
    return np.hstack([d.view(np.uint8).reshape(-1, 2), _pack(codes, bits)]).reshape(len(x), -1)


def dequantize(name: str, data: np.ndarray) -> np.ndarray:
    """(n_rows, row_bytes) uint8 -> (n_rows, n_per_row) float32."""
    bits, n = fields(name)
    blocks = data.reshape(-1, 2 + n * bits // 8)
    d = np.ascontiguousarray(blocks[:, :2]).view(np.float16).astype(F32)
    codes = _unpack(blocks[:, 2:], bits)
    levels = np.concatenate([-MAGNITUDES[bits][::-1], MAGNITUDES[bits]]) if bits < 6 else np.arange(-32, 32, dtype=F32)
    return (d * levels[codes]).reshape(len(data), -1)


def _sum(values: np.ndarray) -> np.ndarray:
    """(n_blocks, n) -> (n_blocks, 1) float32 in the order of native/ggml-base/kvt-blocks.h: halves onto halves."""
    while values.shape[1] > 1:
        half = values.shape[1] // 2
        values = values[:, :half] + values[:, half:]
    return values


def _clean(x: np.ndarray) -> np.ndarray:
    """|x| within f16's range, NaN as 0."""
    return np.where(np.isnan(x), F32(0), np.minimum(np.abs(x), F32(65504)))


def _symmetric(x: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    a, levels = _clean(x), MAGNITUDES[bits]

    def nearest(d: np.ndarray) -> np.ndarray:
        """Index of each value's level."""
        return sum((a > d * (F32(0.5) * (lo + hi))).astype(np.int64) for lo, hi in pairwise(levels))

    def refit(d: np.ndarray, n_round: int) -> tuple[np.ndarray, np.ndarray]:
        for _ in range(n_round):
            m = levels[nearest(d)]
            am, mm = _sum(a * m), _sum(m * m)
            d, gain = am / mm, am * (am / mm)
        return d, gain

    if bits == 2:
        rms = np.sqrt(_sum(a * a) / F32(x.shape[1]))
        d, _ = refit(rms * (F32(1.51) / F32(10)), 3)
    else:
        top = a.max(axis=1, keepdims=True)
        (lo, gain_lo), (hi, gain_hi) = (refit(top * (F32(f) / F32(127)), 2) for f in (0.75, 0.95))
        d = np.where(gain_hi > gain_lo, hi, lo)
    d = d.astype(np.float16)
    index = nearest(d.astype(F32))
    return d, np.where(x < 0, len(levels) - 1 - index, len(levels) + index)


def _uniform(x: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    x = np.where(x < 0, -_clean(x), _clean(x))
    top = np.abs(x).max(axis=1, keepdims=True)
    end = np.where((x == top).any(axis=1, keepdims=True), top, -top)

    def rounded(d: np.ndarray) -> np.ndarray:
        scale = np.where(np.abs(d) > F32(1e-30), F32(1) / d, F32(0))
        return np.rint(np.clip(x * scale, -32, 31))

    def refit(d: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        q = rounded(d)
        xq, qq = _sum(x * q), _sum(q * q)
        with np.errstate(invalid="ignore"):
            ratio = np.where(qq > 0, xq / qq, F32(0))
        return ratio, xq * ratio

    (lo, gain_lo), (hi, gain_hi) = refit(end / F32(-32)), refit(end / F32(-31))
    d = np.where(gain_hi > gain_lo, hi, lo).astype(np.float16)
    return d, rounded(d.astype(F32)).astype(np.int64) + 32


def _pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """(n_blocks, n) codes -> their bytes after the scale."""
    codes = codes.astype(np.uint8)
    n = codes.shape[1]
    if bits == 6:
        low = codes & 15
        return np.hstack([low[:, : n // 2] | low[:, n // 2 :] << 4, _pack(codes >> 4, 2)])
    quarters = (codes & 3).reshape(-1, 4, n // 4)
    two = quarters[:, 0] | quarters[:, 1] << 2 | quarters[:, 2] << 4 | quarters[:, 3] << 6
    return two if bits == 2 else np.hstack([two, np.packbits(codes >> 2, axis=1, bitorder="little")])


def _unpack(data: np.ndarray, bits: int) -> np.ndarray:
    n = data.shape[1] * 8 // bits
    if bits == 6:
        low = np.hstack([data[:, : n // 2] & 15, data[:, : n // 2] >> 4])
        return low | _unpack(data[:, n // 2 :], 2) << 4
    two = np.hstack([data[:, : n // 4] >> 2 * j & 3 for j in range(4)])
    return two if bits == 2 else two | np.unpackbits(data[:, n // 4 :], axis=1, bitorder="little") << 2
