"""Our types in plain numpy, from the words of kvt-types.h and kvt-blocks.h (native/ggml-base): what their bytes must
be."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

F32 = np.float32
MAGNITUDES = {
    2: np.array([3, 10], F32),
    3: np.array([14, 45, 79, 127], F32),
}  # the positive levels; the others mirror them


@dataclass(frozen=True)
class Ring:
    """Codes of 16*n values in the order of lanes: value i of the first group on the ring, value i of the next, ...

    bits    of the codes of each group    first, step  bits of the codes of a first group off the ring, and its grid
    low high  levels of each group by half a window of 8 bits
    kept    of a normal value's energy    sigma        levels of a standard deviation
    fine shift  of the search: values and levels times fine/64, costs >> shift
    finer   what a bit off the ring gives the first group on it, more or less; 0 = there is none
    """

    bits: tuple[int, ...]
    low: list[list[int]]
    high: list[list[int]]
    kept: tuple[float, ...]
    sigma: float = 32
    fine: tuple[int, ...] = (64, 64, 64, 64)
    shift: tuple[int, ...] = (0, 0, 0, 0)
    first: int = 0
    step: int = 0
    finer: int = 0

    @property
    def n(self) -> int:
        return len(self.bits)

    def after(self, p: int) -> int:
        return sum(self.bits[p + 1 :])


def _even(bits: int, low: list[int], high: list[int], kept: float) -> Ring:
    return Ring((bits,) * 4, [low] * 4, [high] * 4, (kept,) * 4)


G4 = (
    [-12, 14, -53, 52, -36, -28, 29, -44, -19, -63, 36, 63, 6, 22, -4, 43],
    [-54, 22, -12, -6, 10, -30, -34, 30, -2, 18, 20, 6, -24, 50, 32, -20],
)
G3 = (
    [43, -62, -7, -39, 2, 29, -24, 14, 7, -38, 62, 30, -22, 43, -5, 17],
    [54, 38, -6, -8, -38, -42, 12, 4, 24, -52, -26, 12, 0, -2, -16, -22],
)

RINGS = {
    "t2_64": _even(
        2,
        [41, -36, 13, -7, -12, 3, -36, 29, 23, -23, -12, 12, -27, -1, 33, 3],
        [-8, -10, -34, 0, -30, 12, 12, 12, 32, 38, -14, -28, 10, -46, 10, 44],
        0.922,
    ),
    "t3_64": _even(
        3,
        [-14, 19, 3, 42, 10, -29, 29, -6, -8, -31, -19, 4, 13, 43, 25, -53],
        [8, -34, 36, 50, -4, 32, -48, 10, 22, 20, -20, -20, -34, 2, -10, -8],
        0.978,
    ),
    "t4_64": _even(
        4,
        [-18, 45, -63, 27, -48, -25, 8, -5, 20, 34, -3, -34, 61, 3, -11, 14],
        [12, -10, -20, 28, 28, -32, -24, -42, 6, 0, 44, 2, 14, -6, 20, -16],
        0.994,
    ),
    "k2_64": Ring(
        (4, 2, 1, 1),
        [
            [-23, 32, -13, -64, 42, 24, -6, 8, 17, 15, 5, 63, -15, -2, -40, -31],
            [10, -46, -13, 44, 11, 41, -34, -9, 34, -11, 11, -42, -46, 11, -12, 44],
            [36, -24, 16, -23, 34, -44, -12, 48, -36, 34, 26, -26, -30, 39, -49, 4],
            [28, -26, -27, 19, 25, -9, 21, -42, -27, 31, -30, 29, -13, 23, -28, 32],
        ],
        [
            [-16, 26, -4, 38, 20, -22, -34, -14, -6, 0, 6, -6, -28, 36, 14, -16],
            [30, 40, 18, -32, 2, 16, 4, 22, -4, -46, -8, 20, -20, -10, -22, 0],
            [18, 20, 0, -26, 10, -4, 6, -6, 28, -6, -2, 48, -4, -28, -34, -28],
            [8, 6, -46, 2, 12, -36, 10, -10, -44, 46, 24, 0, 44, -16, -22, 24],
        ],
        (0.9933, 0.9220, 0.7392, 0.7516),
        34.8,
        (64, 34, 31, 31),
        (0, 2, 4, 4),
    ),
    "k3_64": Ring(
        (3, 2, 1),
        [
            [-59, 53, 8, -17, 34, -6, 17, -33, -8, 13, 32, 58, 30, 2, -42, -22],
            [17, -44, -4, 40, 46, 21, -32, -9, -5, -6, -45, 29, -42, -10, 9, 41],
            [30, -28, 15, -35, 28, -35, -35, 33, 25, -29, 28, -36, -24, 21, -41, 31],
        ],
        [
            [-38, -22, -8, 28, -18, 16, -32, 8, 24, -54, 14, -28, -6, 50, 2, -10],
            [20, 56, 20, -38, 14, -18, 2, 42, -4, -56, -34, 26, -28, 6, -8, -16],
            [-4, -20, 22, 14, -42, -2, 38, 26, -16, -54, 6, 54, 56, 20, -34, -2],
        ],
        (0.9766, 0.9228, 0.7567),
        39.1,
        (56, 29, 27),
        (0, 0, 2),
        6,
        4,
    ),
    "k4_64": Ring(
        (4, 3, 2),
        [
            G4[0],
            G3[0],
            [20, 50, -38, -4, 35, -48, 6, -23, 39, -51, 10, -12, -28, -9, 14, 38],
        ],
        [
            G4[1],
            G3[1],
            [14, -26, -18, 32, 40, -44, -32, 22, 18, -50, 2, 36, -20, -10, 52, 0],
        ],
        (0.9939, 0.9785, 0.9259),
        37.5,
        (60, 31, 32),
        (0, 0, 2),
        7,
        2,
    ),
    "k5_64": Ring(
        (4, 4, 3),
        [G4[0], G4[0], G3[0]],
        [G4[1], G4[1], G3[1]],
        (0.9939, 0.9939, 0.9785),
        36.0,
        (60, 52, 52),
        (0, 0, 2),
        8,
        1,
        2,
    ),
}


def fields(name: str) -> tuple[int, int]:
    """(bits of a code, values in a block) of "q3_64"."""
    bits, n = name[1:].split("_")
    return int(bits), int(n)


def scale_bytes(name: str) -> int:
    return 1 if name in RINGS else 2


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
        if name in RINGS:
            d, codes = (_groups if name[0] == "k" else _trellis)(blocks, RINGS[name])
            packed = _pack_ring(codes, RINGS[name])
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
    if name in RINGS:
        return (d * _levels(_unpack_ring(blocks, RINGS[name]), RINGS[name])).reshape(len(data), -1)
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


def _groups(x: np.ndarray, ring: Ring) -> tuple[np.ndarray, np.ndarray]:
    a = _clean(x)
    sigma = np.sqrt(_sum(a * a) / F32(64))
    top = a[:, :16].max(axis=1, keepdims=True) * (F32(1) / F32(127 if ring.first else 106))
    stored = _e5m3(np.maximum(sigma * (F32(1) / F32(ring.sigma)), top), 127)
    d = stored.astype(F32)
    factor = [F32(fine) / (F32(64) * F32(kept)) for fine, kept in zip(ring.fine, ring.kept)]
    with np.errstate(invalid="ignore"):
        inv = np.where(d > 0, np.minimum(F32(1) / d, F32(38) / factor[0] / sigma), F32(0))
    groups = np.hsplit(a, 4)[4 - ring.n :]
    on_ring = np.hstack([_searched(of_group, inv * f) for of_group, f in zip(groups, factor)])
    codes = _search(_in_time(np.where(x[:, -16 * ring.n :] < 0, -on_ring, on_ring), ring.n), ring)
    if ring.finer:
        signed = np.where(x < 0, -a, a)[:, -16 * ring.n :][:, :16] * inv
        codes[:, :16] |= (signed > _levels(codes, replace(ring, first=0, finer=0))[:, :16]).astype(
            np.int64
        ) << ring.bits[0]
    if ring.first:
        half, mid = 1 << (ring.first - 1), F32(0.5 if ring.step > 1 else 0)  # a step of one has a level of 0
        scaled = a[:, :16] * inv * (F32(1) / F32(ring.step))
        index = np.rint(np.minimum(scaled, F32(half - 1) + mid) - mid).astype(np.int64)
        first = np.where(x[:, :16] < 0, half - int(2 * mid) - index, half + index)
        codes = np.hstack([first, codes])
    return stored, codes


def _trellis(x: np.ndarray, ring: Ring) -> tuple[np.ndarray, np.ndarray]:
    a = _clean(x)
    energy = _sum(a * a)
    sigma = np.sqrt(energy / F32(64))
    kept = F32(ring.kept[0])
    expected = _e5m3(sigma * (F32(1) / F32(32) / kept), 127).astype(F32)
    with np.errstate(invalid="ignore"):
        most = np.where(sigma > F32(1e-30), F32(38) / sigma, F32(0))
        inv = np.where(expected > 0, np.minimum(F32(1) / (kept * expected), most), most)
    q = _searched(a, inv)
    codes = _search(_in_time(np.where(x < 0, -q, q), 4), ring)
    along = _sum(np.where(x < 0, -a, a) * _levels(codes, ring))
    with np.errstate(invalid="ignore"):
        d = np.where(along > 0, energy / along, expected)
    return _e5m3(d, 127), codes


def _searched(a: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return np.rint(np.minimum(a * scale, F32(106))).astype(np.int64)


def _in_time(x: np.ndarray, n: int) -> np.ndarray:
    """n groups of values in the order of the ring: 0, 16, 32, 48, 1, 17, ..."""
    return x.reshape(-1, n, 16).swapaxes(1, 2).reshape(-1, 16 * n)


def _from_time(x: np.ndarray, n: int) -> np.ndarray:
    return x.reshape(-1, 16, n).swapaxes(1, 2).reshape(-1, 16 * n)


def _search(x: np.ndarray, ring: Ring) -> np.ndarray:
    """(n_blocks, 16*n) integers in the order of the ring -> codes, group by group: the best way from a state around to
    itself, of that state which the best way over the end of the ring goes through there."""
    n, n_lane = ring.n, -(-24 // sum(ring.bits))

    def way(p: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Windows of (a state after this phase, the number of the one before), and their levels' halves as searched."""
        room = 8 - ring.bits[(p + 1) % n]
        window = np.arange(1 << room)[:, None] | np.arange(1 << (8 - room)) << room
        low = (np.array(ring.low[p]) * ring.fine[p] + 32) >> 6
        high = ((np.array(ring.high[p]) * ring.fine[p] + 64) >> 7) * 2
        return window, low[window[:, 0] & 15], high[window >> 4] // 2

    ways = [way(p) for p in range(n)]

    def run(cost: np.ndarray, times: list[int]) -> tuple[np.ndarray, list[np.ndarray]]:
        """A quarter of (x - low - high)^2 for each, as the encoder takes it."""
        choices = []
        for t in times:
            window, low, half = ways[t % n]
            shift = ring.shift[t % n]
            u = x[:, t, None] - low
            found = cost[:, window >> ring.bits[t % n]] + ((half * half - u[:, :, None] * half) >> shift)
            choices.append(found.argmin(axis=2))
            cost = found.min(axis=2) + (u * u >> (2 + shift))
        return cost, choices

    def back(state: np.ndarray, t: int, choice: np.ndarray) -> np.ndarray:
        return ways[t % n][0][state, np.take_along_axis(choice, state[:, None], axis=1)[:, 0]]

    state = np.arange(1 << (8 - ring.bits[0]))
    over = [*range(16 * n - n_lane * n, 16 * n), *range(n_lane * n)]
    cost, choices = run(np.zeros((len(x), len(state)), np.int64), over)
    now = cost.argmin(axis=1)
    for t in reversed(range(n_lane * n)):
        now = back(now, t, choices[n_lane * n + t]) >> ring.bits[t % n]
    _, choices = run(np.where(state == now[:, None], 0, 16000), list(range(16 * n)))
    codes = np.empty_like(x)
    for t in reversed(range(16 * n)):
        window = back(now, t, choices[t])
        codes[:, t] = window & ((1 << ring.bits[t % n]) - 1)
        now = window >> ring.bits[t % n]
    return _from_time(codes, n)


def _numbers(codes: np.ndarray, ring: Ring) -> np.ndarray:
    """(n_blocks, 16) bits of each lane's codes on the ring."""
    groups = np.hsplit(codes[:, -16 * ring.n :], ring.n)
    return sum((c & ((1 << b) - 1)) << ring.after(p) for p, (c, b) in enumerate(zip(groups, ring.bits)))


def _finer(codes: np.ndarray, ring: Ring) -> np.ndarray:
    """(n_blocks, 16) the bits that are not on the ring."""
    return codes[:, -16 * ring.n :][:, :16] >> ring.bits[0]


def _levels(codes: np.ndarray, ring: Ring) -> np.ndarray:
    own = _numbers(codes, ring)
    bits = np.roll(own, 1, axis=1) << sum(ring.bits) | own
    windows = [bits >> ring.after(p) & 255 for p in range(ring.n)]
    levels = [np.array(low)[w & 15] + np.array(high)[w >> 4] for w, low, high in zip(windows, ring.low, ring.high)]
    if ring.finer:
        levels[0] = levels[0] + np.where(_finer(codes, ring), ring.finer, -ring.finer)
    if ring.first:
        levels.insert(0, ring.step * codes[:, :16] + ring.step // 2 - (ring.step << (ring.first - 1)))
    return np.hstack(levels).astype(F32)


def _pack_ring(codes: np.ndarray, ring: Ring) -> np.ndarray:
    number, first = _numbers(codes, ring), codes[:, :16]
    width = sum(ring.bits)
    if ring.finer:
        number = number | _finer(codes, ring) << width
        width += 1
    if ring.first:
        number = number | first << width
        width += ring.first
    parts = [number & 255]
    if width >= 16:
        parts.append(number >> (width - 8))
    if width % 8:
        halves = number >> 8 & 15
        parts.append(halves[:, :8] | halves[:, 8:] << 4)
    return np.hstack(parts).astype(np.uint8)


def _unpack_ring(data: np.ndarray, ring: Ring) -> np.ndarray:
    width = sum(ring.bits)
    n_bit = width + ring.first + bool(ring.finer)
    low, high, halves = np.split(data.astype(np.int64), [16, n_bit // 8 * 16], axis=1)
    number = low
    if n_bit >= 16:
        number = number | high << (n_bit - 8)
    if n_bit % 8:
        number = number | np.hstack([halves & 15, halves >> 4]) << 8
    codes = [number >> ring.after(p) & ((1 << b) - 1) for p, b in enumerate(ring.bits)]
    if ring.finer:
        codes[0] |= (number >> width & 1) << ring.bits[0]
        width += 1
    if ring.first:
        codes.insert(0, number >> width)
    return np.hstack(codes)


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
