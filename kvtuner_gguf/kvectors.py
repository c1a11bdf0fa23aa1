"""How K is conditioned before it is cached: the vectors of each layer, and how a plan stores those of all layers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, zip_longest
from typing import Any

from .codecs import codec
from .errors import PlanError
from .pair import Pair
from .values import blamed_on, checked

# what is beyond is no calibration's: K is measured in f16, and condition.py clips scales. The run time has the same
# bounds, and one more, of a scale within a head
K_MEAN_MAX = 65504.0
K_SCALE_RANGE = (1e-4, 1e4)


@dataclass(frozen=True)
class KVectors:
    """How one layer's K is conditioned: cached as (K - mean) / scale, after RoPE, and Q multiplied by scale. See
    native/llama/kvt-cond.h.

    mean scale  n_head_kv * head_dim values each, head after head, kept as f32; () = none
    Raises PlanError for lengths that differ, a value that is no finite number, a mean beyond K_MEAN_MAX, a scale out of
    K_SCALE_RANGE.
    """

    mean: tuple[float, ...] = ()
    scale: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for key in ("mean", "scale"):
            object.__setattr__(self, key, tuple(checked(f"k_{key}", "arr_f32", list(getattr(self, key)))))
        if self.mean and self.scale and len(self.mean) != len(self.scale):
            raise PlanError(
                f"k_mean: got {len(self.mean)} values, k_scale has {len(self.scale)}, need the same. Calibrate again."
            )
        if self.mean and max(map(abs, self.mean)) > K_MEAN_MAX:
            raise PlanError(
                f"k_mean: got {max(self.mean, key=abs):g}, need {-K_MEAN_MAX:g} to {K_MEAN_MAX:g}. Calibrate again."
            )
        low, high = K_SCALE_RANGE
        if self.scale and not (min(self.scale) >= low and max(self.scale) <= high):
            raise PlanError(
                f"k_scale: got {min(self.scale):g} to {max(self.scale):g}, need {low:g} to {high:g}. Calibrate again."
            )

    def __bool__(self) -> bool:
        return bool(self.mean or self.scale)


AS_IT_IS = KVectors()


def k_vectors_of(found: Mapping[str, Any]) -> tuple[KVectors, ...]:
    """The vectors of each layer from a plan's checked values: k_mean, k_mean_n_values, and so on. () if it has none.
    Raises PlanError."""
    sides: list[list[list[float]]] = []
    for key in ("k_mean", "k_scale"):
        values, n_values = found.get(key), found.get(f"{key}_n_values")
        if (values is None) != (n_values is None):
            raise PlanError(f"{key}: got it without its n_values or the other way round, need both. Calibrate again.")
        values, n_values = values or [], n_values or []
        if sum(n_values) != len(values):
            raise PlanError(
                f"{key}: got {len(values)} values, {key}.n_values adds up to {sum(n_values)}. Calibrate again."
            )
        ends = list(accumulate(n_values))
        sides.append([values[end - n : end] for n, end in zip(n_values, ends)])
    mean, scale = sides
    if mean and scale and len(mean) != len(scale):
        raise PlanError(
            f"k_scale.n_values: got {len(scale)} layers, k_mean.n_values has {len(mean)}, need the same. Calibrate "
            "again."
        )
    vectors = []
    for il, (m, s) in enumerate(zip_longest(mean, scale, fillvalue=())):
        with blamed_on(f"layer {il}"):
            vectors.append(KVectors(tuple(m), tuple(s)))
    return tuple(vectors)


def joined(parts: Iterable[tuple[float, ...]]) -> tuple[float, ...] | None:
    """One side of all layers, one after another, as a plan stores it; None if no layer has any."""
    return tuple(chain.from_iterable(parts)) or None


def vector_bytes(k_vectors: Iterable[KVectors]) -> int:
    """Bytes of the vectors as a plan stores them."""
    return 4 * sum(len(v.mean) + len(v.scale) for v in k_vectors)


def where_quantized(k_vectors: Sequence[KVectors], pairs: Sequence[Pair]) -> tuple[KVectors, ...]:
    """The vectors of the layers whose K is quantized; elsewhere they would cost time and change nothing."""
    return tuple(v if p.type_k and codec(p.type_k).block_size > 1 else KVectors() for v, p in zip(k_vectors, pairs))
