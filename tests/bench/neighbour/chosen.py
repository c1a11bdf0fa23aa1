"""Methods that go by what queries ask for: QAQ, ThinK, eviction. Written from their papers' formulas."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from neighbour.cache import Code, Kept, LayerKeeper
from neighbour.codes import as_f16, furthest, heads, index_bits, rows
from neighbour.method import F16_BITS, PROMPT, STEP, Cost, Known, Layer, Method, Shape, exact_tokens, typed

from kvtuner_gguf.calibrate.error import after_codec, attention_scores
from kvtuner_gguf.calibrate.samples import LayerSample
from kvtuner_gguf.codecs import CODECS, codec
from kvtuner_gguf.native import round_trip
from kvtuner_gguf.pair import Pair


@dataclass(frozen=True)
class Qaq(Method):
    """QAQ (arXiv 2403.04643): as many bits for each token as an error bound asks for.

    sigma_V = sigma_X / (sqrt(T) S) with S the largest of the token's last 5 attention scores, sigma_K^2 = ln(T^3/(T-1)
    sigma_S^2 + 1) / |q|^2 with the upper 10 % quantile of |q|^2 (q as it meets K: scaled), and B = ceil(log2(range / (2
    sqrt(3) sigma))), midpoints of 2^B even steps. A range for each token and layer, outliers (1 %) exact and out of the
    range, V brought to other bits from an exact copy elsewhere at every step, as the paper has it, whose copy is not
    counted. The newest tokens, whose S is not known, have most bits.
    The bounds sigma_X and sigma_S are those that on the calibration text give the bits asked for. On the text that is
    run they give others; it is run again with bounds for so many fewer or more, and the table has what was kept. The
    logarithm keeps K from falling below some bits, however large the bound.
    """

    goal: float
    asked_k: float
    asked_v: float
    step = STEP
    most, window, near = 8, 5, 0.1

    def __str__(self) -> str:
        return "QAQ, bounds for these bits"

    def n_slots(self, shape: Shape) -> int:
        return max(1, round(0.01 * shape.n_row))

    def overhead(self, shape: Shape) -> float:
        """Minimum, step, B, and outliers of a token, per value."""
        return (2 * F16_BITS + 4 + self.n_slots(shape) * (F16_BITS + index_bits(shape.n_row))) / shape.n_row

    def costs(self, shape: Shape) -> tuple[Cost, Cost]:
        return Cost(max(self.goal, self.overhead(shape))), Cost(max(self.goal, self.overhead(shape)))

    def corrected(self, bits: tuple[float, float]) -> Method | None:
        k, v = (asked + self.goal - found for asked, found in zip((self.asked_k, self.asked_v), bits))
        close = all(-self.near <= found - self.goal <= 0 for found in bits)
        return None if close else replace(self, asked_k=k - self.near / 2, asked_v=v - self.near / 2)

    def keeper(self, layer: Layer, shape: Shape) -> LayerKeeper:
        raise TypeError("QAQ's bounds are those of all layers together: ask for keepers.")

    def keepers(self, known: Known, shape: Shape) -> dict[int, LayerKeeper]:
        ranges_k, ranges_v, of_k, of_v = {}, {}, {}, {}
        for layer in known:
            scale = layer.samples[0].scale
            q_norm = float(np.quantile(np.square(layer.q() * scale).sum(axis=-1), 0.9))
            of_k[layer.il] = lambda sigma, q_norm=q_norm: key_sigma(sigma, shape.n_ctx, q_norm)
            ranges_k[layer.il] = np.concatenate([self.ranges(rows(s.k), shape) for s in layer.samples])
            ranges_v[layer.il] = np.concatenate([self.ranges(rows(s.v), shape) for s in layer.samples])
            parts = [attention_scores(s, s.k)[:, -self.window :].max(axis=(0, 1)) for s in layer.samples]
            scores = np.concatenate(parts)
            of_v[layer.il] = lambda sigma, scores=scores: value_sigma(sigma, shape.n_ctx, scores)
        more = self.overhead(shape)
        sigma_k = bound_for(lambda sigma: self._mean_bits(ranges_k, of_k, sigma), self.asked_k - more)
        sigma_v = bound_for(lambda sigma: self._mean_bits(ranges_v, of_v, sigma), self.asked_v - more)
        return {il: QaqKeeper(self, shape, scale, of_k[il](sigma_k), sigma_v) for il in of_k}

    def _mean_bits(self, ranges: dict[int, np.ndarray], of: dict[int, Callable], sigma: float) -> float:
        return float(np.mean([self.n_bits(ranges[il], of[il](sigma)).mean() for il in ranges]))

    def n_bits(self, span: np.ndarray, sigma: np.ndarray | float) -> np.ndarray:
        """B of each token by its range."""
        with np.errstate(divide="ignore"):
            bits = np.ceil(np.log2(span / (2 * math.sqrt(3) * sigma)))
        return np.clip(bits, 0, self.most)

    def _split(self, x: np.ndarray, shape: Shape) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Which values of each row are outliers; least and largest of the others."""
        out = furthest(x - x.mean(axis=1, keepdims=True), self.n_slots(shape))
        low, high = np.where(out, np.inf, x).min(axis=1), np.where(out, -np.inf, x).max(axis=1)
        return out, low[:, None], high[:, None]

    def ranges(self, x: np.ndarray, shape: Shape) -> np.ndarray:
        _, low, high = self._split(x, shape)
        return (high - low)[:, 0]

    def code(self, x: np.ndarray, n_bits: np.ndarray, shape: Shape) -> np.ndarray:
        """Rows at so many bits each."""
        out, low, high = self._split(x, shape)
        n_levels = 2.0 ** n_bits[:, None]
        low, step = as_f16(low), as_f16((high - low) / n_levels)
        codes = np.clip(np.floor((x - low) / np.where(step > 0, step, 1)), 0, n_levels - 1)
        return np.where(out, as_f16(x), low + (codes + 0.5) * step).astype(np.float32)

    @staticmethod
    def choices(shape: Shape, goal: float) -> list[Method]:
        return [Qaq(goal, goal, goal)]


def key_sigma(sigma: float, n_tokens: int, q_norm: float) -> float:
    return math.sqrt(math.log(n_tokens**3 / (n_tokens - 1) * sigma**2 + 1) / q_norm)


def value_sigma(sigma: float, n_tokens: int, scores: np.ndarray) -> np.ndarray:
    return sigma / (math.sqrt(n_tokens) * np.maximum(scores, 1e-12))


def bound_for(mean_bits: Callable[[float], float], asked: float) -> float:
    """The least bound that asks for no more bits than these; fewer bits the larger it is."""
    low, high = 1e-12, 1e6
    for _ in range(40):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if mean_bits(middle) > asked else (low, middle)
    return high


class QaqKeeper(LayerKeeper):
    """K coded once by its bound; V anew wherever the attention it got asks for other bits."""

    wants_queries = True

    def __init__(self, method: Qaq, shape: Shape, scale: float, sigma_k: float, sigma_x: float) -> None:
        super().__init__(Kept(self._code_k), Kept(lambda x, _: x))
        self._method, self._shape, self._scale = method, shape, scale
        self._sigma_k, self._sigma_x = sigma_k, sigma_x
        self._bits_k, self._bits_v = np.zeros(shape.n_ctx), np.zeros(shape.n_ctx)
        self._scores = self._next = np.zeros(0)
        self._n = 0

    def _code_k(self, k: np.ndarray, first: int) -> np.ndarray:
        x = rows(k)
        bits = self._method.n_bits(self._method.ranges(x, self._shape), self._sigma_k)
        self._bits_k[first : first + len(x)], self._n = bits, first + len(x)
        return heads(self._method.code(x, bits, self._shape), len(k))

    def keys(self, cells: np.ndarray, first: int, last: int) -> None:
        super().keys(cells, first, last)
        k = cells[:last].transpose(1, 0, 2).astype(np.float32)
        self._next = last_scores(self.q, k, self._method.window, self._scale)

    def values(self, cells: np.ndarray, first: int, last: int) -> None:
        method, shape = self._method, self._shape
        self.v.take(cells, first, last)
        x = rows(self.v.exact[:, :last])
        bits = np.full(last, float(method.most))
        if first:
            sigma = value_sigma(self._sigma_x, shape.n_ctx, self._scores)
            bits[:first] = method.n_bits(method.ranges(x[:first], shape), sigma)
        changed = np.flatnonzero((bits != self._bits_v[:last]) | (np.arange(last) >= first))
        cells[changed] = method.code(x[changed], bits[changed], shape).reshape(len(changed), *cells.shape[1:])
        self._bits_v[:last], self._scores = bits, self._next

    def bits(self) -> tuple[float, float]:
        more = self._method.overhead(self._shape)
        return self._bits_k[: self._n].mean() + more, self._bits_v[: self._n].mean() + more


def last_scores(q: np.ndarray, k: np.ndarray, n: int, scale: float) -> np.ndarray:
    """The largest score, of all heads, that each token got from the last n queries. -> (n_kv,)"""
    n, n_kv = min(n, q.shape[1]), k.shape[1]
    mask = np.triu(np.full((n, n_kv), -np.inf, np.float32), n_kv - n + 1)
    sample = LayerSample(il=0, q=q[:, -n:], k=k, v=k, mask=mask, scale=scale)
    return attention_scores(sample, k).max(axis=(0, 1))


@dataclass(frozen=True)
class Think(Method):
    """ThinK (arXiv 2407.21018): of each KV head's K the channels with the least |q_j| |k_j| are dropped, by the last 32
    queries of the prompt (all heads that share K), its first quarter of the context, which stays exact until it ends.
    The newest 32 tokens keep all channels. Half the channels are kept, in a type of K, V whole in a type of V, both
    rotated as the run time does it.
    """

    pair: Pair
    recent = 32
    step = STEP

    def __str__(self) -> str:
        return f"ThinK, half of K's channels in {self.pair.type_k}, V in {self.pair.type_v}"

    def costs(self, shape: Shape) -> tuple[Cost, Cost]:
        exact = exact_tokens(self.recent, 1, self.step)
        return (
            Cost(codec(self.pair.type_k).bits_per_value / 2, exact, shape.n_row),
            Cost(codec(self.pair.type_v).bits_per_value),
        )

    def keeper(self, layer: Layer, shape: Shape) -> LayerKeeper:
        return ThinkKeeper(self.pair, layer.samples[0].rot_v, self.recent, shape.n_ctx // PROMPT)

    @staticmethod
    def choices(shape: Shape, goal: float) -> list[Method]:
        kept = shape.head_dim // 2
        of_k = [c.name for c in CODECS.values() if not c.groups and c.block_size > 1 and kept % c.block_size == 0]
        of_v = [c.name for c in CODECS.values() if not c.groups and shape.head_dim % c.block_size == 0]
        fitting = [t for t in of_v if codec(t).bits_per_value <= goal] or of_v[-1:]
        type_v = max(fitting, key=lambda t: codec(t).bits_per_value)
        return [Think(Pair(type_k, type_v)) for type_k in of_k]


class ThinkKeeper(LayerKeeper):
    """Chooses the channels once the prompt has ended."""

    wants_queries = True

    def __init__(self, pair: Pair, rot_v: int, recent: int, prompt: int) -> None:
        super().__init__(Kept(self._code_k, window=recent, start=prompt), Kept(typed(pair.type_v, rot_v)))
        self._type_k, self._recent = pair.type_k, recent
        self._last_q, self._channels = np.empty(0), np.empty(0, int)

    def queries(self, q: np.ndarray) -> None:
        self._last_q = self.q  # of the batch before, which ends the prompt
        super().queries(q)

    def _code_k(self, k: np.ndarray, first: int) -> np.ndarray:
        if not first:
            self._channels = kept_channels(self._last_q[:, -self._recent :], self.k.exact[:, : self.k.start])
        parts = np.take_along_axis(k, self._channels[:, None, :], axis=2)
        k_hat = np.zeros_like(k)
        part_hat = after_codec(parts, self._type_k, 32, round_trip)
        np.put_along_axis(k_hat, self._channels[:, None, :], part_hat, axis=2)
        return k_hat


def kept_channels(q: np.ndarray, k: np.ndarray) -> np.ndarray:
    """The half of each KV head's channels with the largest |q_j| |k_j|, ascending: (n_head_kv, head_dim / 2)."""
    n_head_kv, _, head_dim = k.shape
    q_norm = np.square(q.reshape(n_head_kv, -1, head_dim)).sum(axis=1)
    score = q_norm * np.square(k).sum(axis=1)
    return np.sort(np.argsort(-score, axis=1)[:, : head_dim // 2], axis=1)


@dataclass(frozen=True)
class Evict(Method):
    """Fewer tokens at more bits ("More Tokens, Lower Precision", arXiv 2412.12706), evicted as H2O does it (arXiv
    2306.14048): each KV head keeps a part of the tokens, half of them the newest, half those that have got most
    attention so far, summed over queries and over the heads that share K. The sum is kept in f16.

    From the end of the prompt on, the first quarter of the context, which is whole until then; the part is one of the
    tokens so far, so that bytes are equal wherever it is scored.
    """

    type_name: str
    share: float
    step = STEP

    def __str__(self) -> str:
        return f"{1 / self.share:.1f}x fewer tokens (H2O) in {self.type_name}"

    def costs(self, shape: Shape) -> tuple[Cost, Cost]:
        cost = Cost(self.share * (codec(self.type_name).bits_per_value + F16_BITS / (2 * shape.head_dim)))
        return cost, cost

    def keeper(self, layer: Layer, shape: Shape) -> LayerKeeper:
        sample = layer.samples[0]
        codes = typed(self.type_name, sample.rot_k), typed(self.type_name, sample.rot_v)
        return EvictKeeper(*codes, self.share, shape)

    @staticmethod
    def choices(type_name: str, shape: Shape, goal: float) -> list[Method]:
        whole = Evict(type_name, 1.0)
        return [replace(whole, share=min(1.0, goal / (sum(whole.bits(shape)) / 2)))]


class EvictKeeper(LayerKeeper):
    """Computes attention itself, over what each head has kept, and overwrites what llama.cpp computed over all.

    share  of the tokens so far that each head has kept when a batch is read, its tokens among them
    """

    wants_queries = wants_output = True

    def __init__(self, code_k: Code, code_v: Code, share: float, shape: Shape) -> None:
        super().__init__(Kept(code_k), Kept(code_v))
        self._share, self._shape = share, shape
        self._k = self._v = np.empty(0)
        self._first = self._last = 0
        self._got = np.zeros((0, 0))
        self._old: list[np.ndarray] = []

    def keys(self, cells: np.ndarray, first: int, last: int) -> None:
        super().keys(cells, first, last)
        self._k, self._first, self._last = cells, first, last

    def values(self, cells: np.ndarray, first: int, last: int) -> None:
        super().values(cells, first, last)
        self._v = cells

    def output(self, out: np.ndarray, scale: float) -> None:
        n_head_kv, new = self._shape.n_head_kv, np.arange(self._first, self._last)
        if not self._first:
            self._got = np.zeros((n_head_kv, self._shape.n_ctx))
            self._old = [new[:0]] * n_head_kv
        n_new = len(new)
        n_next = self._last + n_new  # tokens when the next batch is read
        n_kept = int(self._share * n_next) - n_new if n_next > self._shape.n_ctx // PROMPT else self._last
        for h in range(n_head_kv):
            seen = np.concatenate([self._old[h], new])
            k, v = (cells[seen, h].astype(np.float32) for cells in (self._k, self._v))
            q = self.q.reshape(n_head_kv, -1, n_new, k.shape[1])[h]  # (heads that share K, n_new, head_dim)
            mask = np.triu(np.full((n_new, len(seen)), -np.inf, np.float32), len(seen) - n_new + 1)
            sample = LayerSample(il=0, q=q, k=k[None], v=v[None], mask=mask, scale=scale)
            scores = attention_scores(sample, sample.k)
            out.reshape(n_new, n_head_kv, -1, v.shape[1])[:, h] = (scores @ v).swapaxes(0, 1)
            self._got[h, seen] += scores.sum(axis=(0, 1))
            self._old[h] = heavy_and_recent(seen, self._got[h, seen], max(n_kept, n_new))


def heavy_and_recent(seen: np.ndarray, got: np.ndarray, n_kept: int) -> np.ndarray:
    """Of tokens in ascending order the n_kept/2 newest, and as many of the others as may, by the attention they got."""
    if len(seen) <= n_kept:
        return seen
    n_old = len(seen) - n_kept // 2
    heavy = np.sort(np.argsort(-got[:n_old], kind="stable")[: n_kept - n_kept // 2])
    return np.concatenate([seen[heavy], seen[n_old:]])
