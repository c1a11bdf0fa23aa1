"""What a neighbour's method is: its parameters, what it costs in real bits, and what it makes of a layer's K and V.

Real bits count every code, scale, zero point, outlier with its index, exact window, and table, at a context.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from neighbour.cache import Code, Kept, LayerKeeper, settled
from neighbour.codes import Rope, rows

from kvtuner_gguf.calibrate.error import after_codec
from kvtuner_gguf.calibrate.samples import Capture, LayerSample
from kvtuner_gguf.codecs import codec
from kvtuner_gguf.native import round_trip
from kvtuner_gguf.pair import Pair

WHOLE, STEP = 512, 32  # tokens of a batch: where each token is kept by itself, and where windows or attention matter
PROMPT = 4  # what goes by the queries of a prompt takes so large a part of the context for one: a quarter
F16_BITS = 16
SLACK = 0.01  # bits that a choice may be above its goal: tables
NEAR = 0.75  # bits that a second choice may be below it


@dataclass(frozen=True)
class Shape:
    """What is to be cached, of each layer: heads as many and as large in all of them.

    n_ctx      tokens of a context that is run, at which windows are counted
    n_counted  tokens of the context at which tables are
    """

    n_head_kv: int
    head_dim: int
    n_ctx: int
    n_counted: int

    @property
    def n_row(self) -> int:
        """Values of a token's K, or V."""
        return self.n_head_kv * self.head_dim


@dataclass(frozen=True)
class Cost:
    """Real bits of one side.

    rate    of a value that is coded, scales included
    exact   tokens that are kept in f16, mean over queries
    tables  bits of a layer that no token adds to
    """

    rate: float
    exact: float = 0.0
    tables: float = 0.0

    def bits(self, shape: Shape) -> float:
        """Per cached value."""
        exact = min(self.exact / shape.n_ctx, 1.0)
        return F16_BITS * exact + self.rate * (1 - exact) + self.tables / shape.n_row / shape.n_counted


def exact_tokens(window: int, block: int, step: int) -> float:
    """Tokens that a query reads exact, its own among them, mean over queries that come in batches of step."""
    far = (window // block + 2) * block * step
    first = [far + i * step for i in range(block)]
    return float(np.mean([f + (step + 1) / 2 - settled(f, f + step, window, block) for f in first]))


@dataclass(frozen=True)
class Layer:
    """What the calibration text says of a layer."""

    il: int
    samples: tuple[LayerSample, ...]
    rope: Rope

    def k_rows(self) -> np.ndarray:
        """K before RoPE, without the first tokens: a row for each token, all heads."""
        return np.concatenate([rows(self.rope.undone(s.k, 0))[1:] for s in self.samples])

    def v_rows(self) -> np.ndarray:
        return np.concatenate([rows(s.v)[1:] for s in self.samples])

    def q(self) -> np.ndarray:
        """(n_head_kv, n, head_dim): all queries of the heads that share K."""
        return np.concatenate([s.q.reshape(len(s.k), -1, s.q.shape[-1]) for s in self.samples], axis=1)


@dataclass(frozen=True)
class Known:
    """What the calibration text says of a model, read from disk layer by layer."""

    capture: Capture
    rope_base: float

    def __iter__(self) -> Iterator[Layer]:
        for il in self.capture.il:
            samples = tuple(self.capture.sample(il, i) for i in range(self.capture.n_sample))
            yield Layer(il, samples, Rope(samples[0].rope_pairs, self.rope_base))


class Method(ABC):
    """A way to keep K and V, with its parameters."""

    step: int = WHOLE

    @property
    def kind(self) -> int:
        """Which choices differ in windows and scales alone: those of the same kind. Here codes of as many bits."""
        return getattr(self, "n_bits", 0)

    @abstractmethod
    def costs(self, shape: Shape) -> tuple[Cost, Cost]:
        """Of K, of V."""

    @abstractmethod
    def keeper(self, layer: Layer, shape: Shape) -> LayerKeeper: ...

    def keepers(self, known: Known, shape: Shape) -> dict[int, LayerKeeper]:
        return {layer.il: self.keeper(layer, shape) for layer in known}

    def bits(self, shape: Shape) -> tuple[float, float]:
        """Real bits of K, of V."""
        k, v = self.costs(shape)
        return k.bits(shape), v.bits(shape)

    def corrected(self, bits: tuple[float, float]) -> Method | None:
        """Where bits are not known before a run: the method again, after one with so many; None = as it is."""
        return None


def within(choices: Sequence[Method], shape: Shape, goal: float) -> list[Method]:
    """The choice nearest to so many bits, but not above, and after it that of another kind that is next, if it is near;
    the least one if all are above."""
    bits = {choice: sum(choice.bits(shape)) / 2 for choice in choices}
    of_kind: dict[int, Method] = {}
    for choice in sorted((c for c in choices if bits[c] <= goal + SLACK), key=lambda c: -bits[c]):
        of_kind.setdefault(choice.kind, choice)
    first, *others = of_kind.values() or [min(choices, key=bits.__getitem__)]
    return [first, *(c for c in others[:1] if bits[c] > goal - NEAR)]


@dataclass(frozen=True)
class Emulated(Method):
    """A pair of cache types, without conditioning, through this harness: what shows that the harness is right."""

    pair: Pair
    step: int = WHOLE

    def __str__(self) -> str:
        return f"{self.pair} through the harness, {self.step} tokens at once"

    def costs(self, shape: Shape) -> tuple[Cost, Cost]:
        return Cost(codec(self.pair.type_k).bits_per_value), Cost(codec(self.pair.type_v).bits_per_value)

    def keeper(self, layer: Layer, shape: Shape) -> LayerKeeper:
        sample = layer.samples[0]
        return LayerKeeper(Kept(typed(self.pair.type_k, sample.rot_k)), Kept(typed(self.pair.type_v, sample.rot_v)))


def typed(type_name: str, n_rot: int) -> Code:
    """A cache type, rotated as the run time does it."""
    return lambda x, _: after_codec(x, type_name, n_rot, round_trip)
