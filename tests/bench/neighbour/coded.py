"""Methods that code every token alike: KIVI, KVQuant, low rank, HACK, OSCAR. Written from their papers' formulas."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from neighbour.cache import Code, Kept, LayerKeeper
from neighbour.codes import as_f16, fitted_levels, furthest, heads, index_bits, min_max, nearest, rows
from neighbour.method import F16_BITS, STEP, Cost, Layer, Method, Shape, exact_tokens

from kvtuner_gguf.calibrate.basis import hadamard
from kvtuner_gguf.calibrate.error import after_codec, attention_scores
from kvtuner_gguf.codecs import CODECS, codec
from kvtuner_gguf.native import round_trip


@dataclass(frozen=True)
class Kivi(Method):
    """KIVI (arXiv 2402.02750): codes between minimum and maximum, K per channel over groups of tokens, V per token over
    groups of channels, with f16 scale and minimum.

    K's newest T mod R tokens are exact, and R are coded at once; V's newest R are exact.
    """

    n_bits: int
    group: int
    residual: int
    step = STEP

    def __str__(self) -> str:
        return f"KIVI, {self.n_bits} bits, G {self.group}, R {self.residual}"

    def v_group(self, shape: Shape) -> int:
        return min(self.group, shape.head_dim)

    def costs(self, shape: Shape) -> tuple[Cost, Cost]:
        return (
            Cost(self.n_bits + 2 * F16_BITS / self.group, exact_tokens(0, self.residual, self.step)),
            Cost(self.n_bits + 2 * F16_BITS / self.v_group(shape), exact_tokens(self.residual, 1, self.step)),
        )

    def keeper(self, layer: Layer, shape: Shape) -> LayerKeeper:
        return LayerKeeper(
            Kept(lambda x, _: over_tokens(x, self.n_bits, self.group), block=self.residual),
            Kept(lambda x, _: over_channels(x, self.n_bits, self.v_group(shape)), window=self.residual),
        )

    @staticmethod
    def choices(shape: Shape, goal: float) -> list[Method]:
        sizes = (32, 64, 128)
        return [Kivi(b, g, r) for b in (2, 3, 4) for g in sizes for r in sizes if r % g == 0]


def over_tokens(x: np.ndarray, n_bits: int, group: int, rng: np.random.Generator | None = None) -> np.ndarray:
    """(n_head_kv, n_tokens, head_dim), each channel's groups of tokens coded between minimum and maximum."""
    n_head_kv, n_tokens, head_dim = x.shape
    parts = x.reshape(n_head_kv, -1, group, head_dim).swapaxes(2, 3)
    return min_max(parts, n_bits, rng).swapaxes(2, 3).reshape(n_head_kv, n_tokens, head_dim)


def over_channels(x: np.ndarray, n_bits: int, group: int, rng: np.random.Generator | None = None) -> np.ndarray:
    """As over_tokens, each token's groups of channels."""
    return min_max(x.reshape(*x.shape[:2], -1, group), n_bits, rng).reshape(x.shape)


@dataclass(frozen=True)
class KvQuant(Method):
    """KVQuant (arXiv 2401.18079), sections 3.1 to 3.5 and appendix E: levels fitted to a calibration text by weighted
    k-means, K before RoPE and per channel, V per token, outliers sparse in f16, the first token exact.

    A channel's zero point and range are its 0.5 % and 99.5 % percentiles; levels are a layer's, one table for K and one
    for V, and minimize sum F r^2 (x - level)^2 with r the value's range. There is no backward pass here: for K the
    energy of Q in its RoPE pair stands for the Fisher information F, for V 1 does.
    Outliers have a fixed number of slots for each token and side, filled by those furthest from the zero point: that is
    the paper's cap of 1 % per token, which needs no pointer. A slot holds f16 and an index.

    slots_k slots_v  of a token; 1 % of 192 values is 2
    """

    n_bits: int
    slots_k: int
    slots_v: int

    def __str__(self) -> str:
        return f"KVQuant, {self.n_bits} bits, {self.slots_k} and {self.slots_v} outliers a token"

    def costs(self, shape: Shape) -> tuple[Cost, Cost]:
        slot, levels = F16_BITS + index_bits(shape.n_row), F16_BITS * 2**self.n_bits
        return (
            Cost(self.n_bits + self.slots_k * slot / shape.n_row, 1, levels + 2 * F16_BITS * shape.n_row),
            Cost(self.n_bits + (self.slots_v * slot + 2 * F16_BITS) / shape.n_row, 1, levels),
        )

    def keeper(self, layer: Layer, shape: Shape) -> LayerKeeper:
        return LayerKeeper(Kept(self._code_k(layer), sink=1), Kept(self._code_v(layer), sink=1))

    def _code_k(self, layer: Layer) -> Code:
        x = layer.k_rows()
        low, high = np.quantile(x, (0.005, 0.995), axis=0).astype(np.float32)
        zero, span = as_f16((low + high) / 2), as_f16(np.maximum((high - low) / 2, 1e-4))
        x = (x - zero) / span
        weights = np.broadcast_to(span**2 * self._q_energy(layer), x.shape)
        inside = np.abs(x) <= 1
        levels = as_f16(fitted_levels(x[inside], weights[inside], self.n_bits))

        def code(k: np.ndarray, first: int) -> np.ndarray:
            plain = rows(layer.rope.undone(k, first))
            x = (plain - zero) / span
            k_hat = np.where(furthest(x, self.slots_k), as_f16(plain), nearest(x, levels) * span + zero)
            return layer.rope.turned(heads(k_hat, len(k)), first)

        return code

    def _q_energy(self, layer: Layer) -> np.ndarray:
        """(n_row,) mean square of Q in each channel's RoPE pair, which no turn changes."""
        energy = np.square(layer.q()).mean(axis=1)
        first, second = layer.rope.pairs
        energy[:, first] = energy[:, second] = (energy[:, first] + energy[:, second]) / 2
        return energy.reshape(-1)

    def _code_v(self, layer: Layer) -> Code:
        x, inside, _, span = self._within_range(layer.v_rows())
        weights = np.broadcast_to(span**2, x.shape)
        levels = as_f16(fitted_levels(x[inside], weights[inside], self.n_bits))

        def code(v: np.ndarray, _: int) -> np.ndarray:
            plain = rows(v)
            x, inside, zero, span = self._within_range(plain)
            v_hat = nearest(x, levels) * as_f16(span) + as_f16(zero)
            return heads(np.where(inside, v_hat, as_f16(plain)), len(v))

        return code

    def _within_range(self, plain: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Rows brought to -1..1 by least and largest of what are no outliers; which are none; the middle of their
        range, and half of it."""
        inside = ~furthest(plain - np.median(plain, axis=1, keepdims=True), self.slots_v)
        low = np.where(inside, plain, np.inf).min(axis=1, keepdims=True)
        high = np.where(inside, plain, -np.inf).max(axis=1, keepdims=True)
        zero, span = (low + high) / 2, np.maximum((high - low) / 2, 1e-4)
        return (plain - zero) / span, inside, zero, span

    @staticmethod
    def choices(shape: Shape, goal: float) -> list[Method]:
        most = math.ceil(0.02 * shape.n_row)
        return [KvQuant(b, k, v) for b in (2, 3, 4) for k in range(most + 1) for v in range(k + 1)]


@dataclass(frozen=True)
class LowRank(Method):
    """LoRC (arXiv 2410.03111), and what Palu does: K before RoPE and V, all heads of a token together, by their
    coordinates in the directions in which they have most energy, which are kept in a type.

    The directions are the principal ones of the calibration text, the mean taken off, as many in every layer: LoRC's
    allocation by condition numbers is not known. Products of directions and weights replace the weights, so that they
    cost no byte of the cache. Coordinates are rotated in blocks of 32.
    """

    rank: int
    type_name: str

    @property
    def kind(self) -> int:
        return self.rank

    def __str__(self) -> str:
        return f"low rank (LoRC), {self.rank} directions in {self.type_name}"

    def costs(self, shape: Shape) -> tuple[Cost, Cost]:
        cost = Cost(self.rank / shape.n_row * codec(self.type_name).bits_per_value, 0, F16_BITS * shape.n_row)
        return cost, cost

    def keeper(self, layer: Layer, shape: Shape) -> LayerKeeper:
        code_k, code_v = self._code(layer.k_rows()), self._code(layer.v_rows())

        def unturned(k: np.ndarray, first: int) -> np.ndarray:
            return layer.rope.turned(code_k(layer.rope.undone(k, first), first), first)

        return LayerKeeper(Kept(unturned), Kept(code_v))

    def _code(self, x: np.ndarray) -> Code:
        mean = as_f16(x.mean(axis=0))
        axes = np.linalg.eigh(np.cov(x - mean, rowvar=False))[1][:, ::-1][:, : self.rank].astype(np.float32)

        def code(x: np.ndarray, _: int) -> np.ndarray:
            parts = (rows(x) - mean) @ axes
            return heads(after_codec(parts[None], self.type_name, 32, round_trip)[0] @ axes.T + mean, len(x))

        return code

    @staticmethod
    def choices(shape: Shape, goal: float) -> list[Method]:
        ranks = range((shape.n_row - 1) // 32 * 32, shape.n_row // 4, -32)
        return [LowRank(rank, c.name) for rank in ranks for c in CODECS.values() if c.block_size == 32]


@dataclass(frozen=True)
class Hack(Method):
    """HACK (arXiv 2502.03589): codes between minimum and maximum in partitions of the index that products sum over,
    rounded by chance: K per token over Pi channels, V per channel over Pi tokens, with f16 scale and minimum and the
    sum of the codes, by which products are taken on integers. V's tokens of an unfinished partition are exact.

    Its 8-bit Q and scores are not imitated: products here are exact, and so its quality is at least the paper's.
    """

    n_bits: int
    partition: int
    step = STEP

    def __str__(self) -> str:
        return f"HACK, {self.n_bits} bits, Pi {self.partition}"

    def costs(self, shape: Shape) -> tuple[Cost, Cost]:
        total = index_bits((2**self.n_bits - 1) * self.partition + 1)
        rate = self.n_bits + (2 * F16_BITS + total) / self.partition
        return Cost(rate), Cost(rate, exact_tokens(0, self.partition, self.step))

    def keeper(self, layer: Layer, shape: Shape) -> LayerKeeper:
        rng = np.random.default_rng(layer.il)
        return LayerKeeper(
            Kept(lambda x, _: over_channels(x, self.n_bits, self.partition, rng)),
            Kept(lambda x, _: over_tokens(x, self.n_bits, self.partition, rng), block=self.partition),
        )

    @staticmethod
    def choices(shape: Shape, goal: float) -> list[Method]:
        return [Hack(b, p) for b in (2, 3, 4) for p in (32, 64, 128) if shape.head_dim % p == 0]


@dataclass(frozen=True)
class Oscar(Method):
    """OSCAR (arXiv 2605.17757): K turned by the eigenvectors of its queries' second moment, V by those of its own,
    weighed by the scores it gets, both then by a Hadamard matrix; each head's row clipped to a quantile of its
    magnitudes (.96 of K, .92 of V at 2 bits; at more, which are not the paper's, it is not clipped) and coded between
    minimum and maximum. First and newest tokens are exact.

    The permutation after the Hadamard matrix is left out: with one group a head it changes nothing. A matrix for each
    KV head; K's, which stands after RoPE, is counted in f16, V's goes into the weights.
    """

    n_bits: int
    sink: int
    recent: int
    step = STEP
    clip_k, clip_v = 0.96, 0.92

    def __str__(self) -> str:
        return f"OSCAR, {self.n_bits} bits, {self.sink} first and {self.recent} newest exact"

    def costs(self, shape: Shape) -> tuple[Cost, Cost]:
        rate = self.n_bits + 2 * F16_BITS / shape.head_dim
        exact = self.sink + (exact_tokens(self.recent, 1, self.step) if self.recent else 0)
        return Cost(rate, exact, F16_BITS * shape.head_dim * shape.n_row), Cost(rate, exact)

    def keeper(self, layer: Layer, shape: Shape) -> LayerKeeper:
        got = [attention_scores(s, s.k).reshape(len(s.k), -1, s.k.shape[1]).sum(axis=1) for s in layer.samples]
        v = np.concatenate([s.v for s in layer.samples], axis=1)
        codes = (
            self._code(layer.q(), self.clip_k),
            self._code(v * np.sqrt(np.concatenate(got, axis=1))[..., None], self.clip_v),
        )
        return LayerKeeper(*(Kept(code, window=self.recent, sink=self.sink) for code in codes))

    def _code(self, x: np.ndarray, clip: float) -> Code:
        axes = np.linalg.eigh(x.swapaxes(1, 2) @ x)[1][..., ::-1] @ hadamard(x.shape[-1])
        axes = as_f16(axes)

        def code(x: np.ndarray, _: int) -> np.ndarray:
            y = x @ axes
            if self.n_bits == 2:
                most = np.sort(np.abs(y), axis=-1)[..., int(clip * y.shape[-1]), None]
                y = np.clip(y, -most, most)
            return min_max(y, self.n_bits) @ axes.swapaxes(1, 2)

        return code

    @staticmethod
    def choices(shape: Shape, goal: float) -> list[Method]:
        windows = ((0, 0), (4, 32), (16, 64), (32, 128), (64, 256), (512, 2048))
        return [Oscar(b, *w) for b in (2, 3, 4) for w in windows]
