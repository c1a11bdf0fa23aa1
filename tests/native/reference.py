"""Our types in plain numpy, from the words of kvt-types.h and kvt-blocks.h (native/ggml-base): what their bytes must
be."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np

F32 = np.float32
MAGNITUDES = {
    2: np.array([3, 10], F32),
    3: np.array([14, 45, 79, 127], F32),
}  # the positive levels; the others mirror them


# of the types with four groups of 16 values: bits of a group -> positive levels, what they keep, weight
GROUPS = {"k2_64": (4, 2, 1, 1), "k3_64": (6, 3, 2, 1), "k4_64": (6, 4, 3, 3)}
GROUP_LEVELS = {
    1: (np.array([48], F32), F32(0.6366), F32(1)),
    2: (np.array([20, 66], F32), F32(0.8825), F32(1.75)),
    3: (np.array([10, 30, 54, 86], F32), F32(0.9655), F32(3.25)),
    4: (np.array([5, 15, 25, 36, 49, 62, 80, 105], F32), F32(0.9905), F32(6)),
    6: (np.arange(2, 127, 4, dtype=F32), F32(1), F32(18)),
}

KEPT = {2: F32(0.922), 3: F32(0.978), 4: F32(0.994)}  # of a normal value's energy, by bits of a trellis
# of the trellis types: levels by the low and the high half of a window of 8 bits
RINGS = {
    "t2_64": (
        [41, -36, 13, -7, -12, 3, -36, 29, 23, -23, -12, 12, -27, -1, 33, 3],
        [-8, -10, -34, 0, -30, 12, 12, 12, 32, 38, -14, -28, 10, -46, 10, 44],
    ),
    "t3_64": (
        [-14, 19, 3, 42, 10, -29, 29, -6, -8, -31, -19, 4, 13, 43, 25, -53],
        [8, -34, 36, 50, -4, 32, -48, 10, 22, 20, -20, -20, -34, 2, -10, -8],
    ),
    "t4_64": (
        [-18, 45, -63, 27, -48, -25, 8, -5, 20, 34, -3, -34, 61, 3, -11, 14],
        [12, -10, -20, 28, 28, -32, -24, -42, 6, 0, 44, 2, 14, -6, 20, -16],
    ),
}


def fields(name: str) -> tuple[int, int]:
    """(bits of a code, values in a block) of "q3_64"."""
    bits, n = name[1:].split("_")
    return int(bits), int(n)


def scale_bytes(name: str) -> int:
    return 1 if name in GROUPS or name in RINGS else 2


def stored(name: str, d: np.ndarray) -> np.ndarray:
    """(n,) or (n, 1) float16 scales -> (n, scale_bytes) uint8."""
    if scale_bytes(name) == 1:
        return (d.view(np.uint16) >> 7).astype(np.uint8).reshape(-1, 1)
    return d.view(np.uint8).reshape(-1, 2)


def _e5m3(d: np.ndarray, level: int) -> np.ndarray:
    """The nearest f16 with three bits of fraction; times level it is within f16's range."""
    d = np.minimum(d, F32(65504) / F32(level))
    return ((d.astype(np.float16).view(np.uint16) + np.uint16(64)) & np.uint16(0xFF80)).view(np.float16)


def quantize(name: str, x: np.ndarray) -> np.ndarray:
    """(n_rows, n_per_row) float32 -> (n_rows, row_bytes) uint8."""
    bits, n = fields(name)
    blocks = np.asarray(x, F32).reshape(-1, n)
    with np.errstate(divide="ignore", over="ignore"):
        if name in GROUPS:
            d, codes = _groups(blocks, GROUPS[name])
            packed = _pack_groups(codes, GROUPS[name])
        elif name in RINGS:
            d, codes = _trellis(blocks, bits, *RINGS[name])
            packed = _pack_ring(codes, bits)
        else:
            d, codes = (_uniform if bits == 6 else _symmetric)(blocks, bits)
            packed = _pack(codes, bits)
    return np.hstack([stored(name, d), packed]).reshape(len(x), -1)


def dequantize(name: str, data: np.ndarray) -> np.ndarray:
    """(n_rows, row_bytes) uint8 -> (n_rows, n_per_row) float32."""
    bits, n = fields(name)
    d, blocks = np.split(data.reshape(-1, scale_bytes(name) + n * bits // 8), [scale_bytes(name)], axis=1)
    d = d.astype(np.uint16) << 7 if scale_bytes(name) == 1 else np.ascontiguousarray(d)
    d = d.view(np.float16).astype(F32)
    if name in GROUPS:
        codes = _unpack_groups(blocks, GROUPS[name])
        levels = [_mirrored(GROUP_LEVELS[b][0])[c] for b, c in zip(GROUPS[name], np.hsplit(codes, 4))]
        return (d * np.hstack(levels)).reshape(len(data), -1)
    if name in RINGS:
        return (d * _ring_levels(_unpack_ring(blocks, bits), bits, *RINGS[name])).reshape(len(data), -1)
    codes = _unpack(blocks, bits)
    levels = _mirrored(MAGNITUDES[bits]) if bits < 6 else np.arange(-32, 32, dtype=F32)
    return (d * levels[codes]).reshape(len(data), -1)


def _mirrored(levels: np.ndarray) -> np.ndarray:
    return np.concatenate([-levels[::-1], levels])


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

    energy = _sum(a * a)
    if bits == 2:
        d, gain = refit(np.sqrt(energy / F32(x.shape[1])) * (F32(1.51) / F32(10)), 3)
    else:
        top = a.max(axis=1, keepdims=True)
        (lo, gain_lo), (hi, gain_hi) = (refit(top * (F32(f) / F32(127)), 2) for f in (0.75, 0.95))
        d, gain = np.where(gain_hi > gain_lo, (hi, gain_hi), (lo, gain_lo))
    index = nearest(d)
    with np.errstate(invalid="ignore"):
        longer = np.where(gain > 0, d * (energy / gain), d)
    return np.minimum(longer, F32(65504) / levels[-1]).astype(np.float16), _signed(x, index, len(levels))


def _signed(x: np.ndarray, index: np.ndarray, n_level: int) -> np.ndarray:
    """Codes: n_level below zero, then n_level above."""
    return np.where(x < 0, n_level - 1 - index, n_level + index)


def _groups(x: np.ndarray, bits: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    a = _clean(x)
    weight = np.repeat([GROUP_LEVELS[b][2] for b in bits], 16)

    def nearest(d: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(levels, their index) of each value, group by group."""
        index, levels = [], []
        for b, of_group in zip(bits, np.hsplit(a, 4)):
            table = GROUP_LEVELS[b][0] * GROUP_LEVELS[b][1]
            if b == 6:
                scale = np.where(d > F32(1e-30), F32(1) / (F32(4) * d), F32(0))
                i = np.rint(np.minimum(of_group * scale, F32(31.5)) - F32(0.5)).astype(np.int64)
            else:
                i = sum(((of_group > d * (F32(0.5) * (lo + hi))).astype(np.int64) for lo, hi in pairwise(table)), 0)
                i = np.broadcast_to(i, of_group.shape)
            index.append(i)
            levels.append(table[i])
        return np.hstack(levels), np.hstack(index)

    def refit(d: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        for _ in range(2):
            m = nearest(d)[0]
            am, mm = _sum(weight * (a * m)), _sum(weight * (m * m))
            d, gain = am / mm, am * (am / mm)
        return d, gain

    start = np.sqrt(_sum(a * a) / F32(64)) * (F32(1) / F32(38.5))
    d, gain = refit(start)
    for factor in (F32(0.9), F32(1.1)):
        other = refit(start * factor)
        d, gain = np.where(other[1] > gain, other, (d, gain))
    d = _e5m3(d, 126)
    index = np.hsplit(nearest(d.astype(F32))[1], 4)
    return d, np.hstack([_signed(v, i, 1 << (b - 1)) for v, i, b in zip(np.hsplit(x, 4), index, bits)])


def _trellis(x: np.ndarray, k: int, low: list[int], high: list[int]) -> tuple[np.ndarray, np.ndarray]:
    a = _clean(x)
    energy = _sum(a * a)
    sigma = np.sqrt(energy / F32(64))
    kept = KEPT[k]
    expected = _e5m3(sigma * (F32(1) / F32(32) / kept), 127).astype(F32)
    with np.errstate(invalid="ignore"):
        most = np.where(sigma > F32(1e-30), F32(34) / sigma, F32(0))
        inv = np.where(expected > 0, np.minimum(F32(1) / (kept * expected), most), most)
    q = np.rint(np.minimum(a * inv, F32(106))).astype(np.int64)
    codes = _search(_in_time(np.where(x < 0, -q, q)), k, np.array(low), np.array(high))
    along = _sum(np.where(x < 0, -a, a) * _ring_levels(_from_time(codes), k, low, high).astype(F32))
    with np.errstate(invalid="ignore"):
        d = np.where(along > 0, energy / along, expected)
    return _e5m3(d, 127), _from_time(codes)


def _in_time(x: np.ndarray) -> np.ndarray:
    """Values of a block in the order of the ring: 0, 16, 32, 48, 1, 17, ..."""
    return x.reshape(-1, 4, 16).swapaxes(1, 2).reshape(-1, 64)


def _from_time(x: np.ndarray) -> np.ndarray:
    return x.reshape(-1, 16, 4).swapaxes(1, 2).reshape(-1, 64)


def _search(x: np.ndarray, k: int, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """(n_blocks, 64) integers in the order of the ring -> codes: the best way from a state around to itself, of that
    state which the best way over the end of the ring goes through there."""
    n_state, n_over = 1 << (8 - k), 24 // k
    state = np.arange(n_state)
    window = state[:, None] | np.arange(1 << k)[None] << (8 - k)  # (state, its predecessor's number)
    before = window >> k
    # a quarter of (x - low - high)^2, as the encoder takes it
    half = high[window >> 4] // 2

    def run(cost: np.ndarray, times: list[int]) -> tuple[np.ndarray, list[np.ndarray]]:
        choices = []
        for t in times:
            u = x[:, t, None] - low[state & 15]
            ways = cost[:, before] + half * half - u[:, :, None] * half
            choices.append(ways.argmin(axis=2))
            cost = ways.min(axis=2) + (u * u >> 2)
        return cost, choices

    def back(n: np.ndarray, choice: np.ndarray) -> np.ndarray:
        return before[n, np.take_along_axis(choice, n[:, None], axis=1)[:, 0]]

    cost, choices = run(np.zeros((len(x), n_state), np.int64), [*range(64 - n_over, 64), *range(n_over)])
    n = cost.argmin(axis=1)
    for choice in reversed(choices[n_over:]):
        n = back(n, choice)
    _, choices = run(np.where(state == n[:, None], 0, 16000), list(range(64)))
    codes = np.empty_like(x)
    for t in reversed(range(64)):
        codes[:, t] = n & ((1 << k) - 1)
        n = back(n, choices[t])
    return codes


def _ring_levels(codes: np.ndarray, k: int, low: list[int], high: list[int]) -> np.ndarray:
    ring = _in_time(codes)
    window = sum(np.roll(ring, i, axis=1) << (k * i) for i in range(-(-8 // k))) & 255
    return _from_time(np.array(low)[window & 15] + np.array(high)[window >> 4]).astype(F32)


def _pack_ring(codes: np.ndarray, k: int) -> np.ndarray:
    number = sum(codes.reshape(-1, 4, 16)[:, p] << (k * (3 - p)) for p in range(4))
    high = number >> 8
    extra = {2: [], 3: [high[:, :8] | high[:, 8:] << 4], 4: [high]}[k]
    return np.hstack([number & 255, *extra]).astype(np.uint8)


def _unpack_ring(data: np.ndarray, k: int) -> np.ndarray:
    low, high = np.split(data.astype(np.int64), [16], axis=1)
    number = low | (np.hstack([high & 15, high >> 4]) if k == 3 else high if k == 4 else 0) << 8
    return np.hstack([number >> (k * (3 - p)) & ((1 << k) - 1) for p in range(4)])


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


def _places(bits: tuple[int, ...], i: int) -> list[list[tuple[int, int]]]:
    """Where the bits of the codes of value i of each group lie: (byte, bit), from the lowest bit."""
    low = [[(i, 2 * g), (i, 2 * g + 1)] for g in range(4)]
    if bits == GROUPS["k2_64"]:
        return [[*low[0], low[2][1], low[3][1]], low[1], low[2][:1], low[3][:1]]
    if bits == GROUPS["k3_64"]:
        high = [(16 + i % 8, 4 * (i // 8) + b) for b in range(4)]
        return [[*low[0], *high], [*low[1], low[3][1]], low[2], low[3][:1]]
    return [
        [*low[0], *((16 + i, b) for b in range(4))],
        [*low[1], (16 + i, 4), (16 + i, 5)],
        [*low[2], (16 + i, 6)],
        [*low[3], (16 + i, 7)],
    ]


def _each_bit(bits: tuple[int, ...]) -> Iterator[tuple[int, int, int, int]]:
    """(value, bit of its code, byte after the scale, bit of it) of every stored bit."""
    for i in range(16):
        for g, places in enumerate(_places(bits, i)):
            for bit, (byte, at) in enumerate(places):
                yield 16 * g + i, bit, byte, at


def _pack_groups(codes: np.ndarray, bits: tuple[int, ...]) -> np.ndarray:
    data = np.zeros((len(codes), 16 * sum(bits) // 8), np.uint8)
    for value, bit, byte, at in _each_bit(bits):
        data[:, byte] |= ((codes[:, value] >> bit & 1) << at).astype(np.uint8)
    return data


def _unpack_groups(data: np.ndarray, bits: tuple[int, ...]) -> np.ndarray:
    codes = np.zeros((len(data), 64), np.int64)
    for value, bit, byte, at in _each_bit(bits):
        codes[:, value] |= (data[:, byte].astype(np.int64) >> at & 1) << bit
    return codes
