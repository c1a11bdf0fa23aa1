"""Which pairs of a layer are worth trying: those that no other beats in both bits and error."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kvtuner_gguf.calibrate.results import ErrorTable, Menus, non_dominated
from kvtuner_gguf.codecs import codec
from kvtuner_gguf.errors import CalibrationError
from kvtuner_gguf.geometry import Geometry
from kvtuner_gguf.pair import Pair


def pareto_pairs(pairs: Sequence[Pair], bits: Sequence[float], errors: Sequence[float]) -> list[int]:
    """Indices of the pairs on the Pareto front of (bits, error), both minimised, by ascending bits.

    errors  NaN where the layer cannot hold the pair
    Of pairs that are equal in both, the first stays. Raises CalibrationError if the three differ in length, or no pair
    has an error. Source: KVTuner (arXiv 2502.04420), section 5.3.
    """
    if not len(pairs) == len(bits) == len(errors):
        raise CalibrationError(
            f"prune: {len(pairs)} pairs, {len(bits)} bits, {len(errors)} errors, need as many of each. Measure again."
        )
    held = [i for i in range(len(pairs)) if not np.isnan(errors[i])]
    if not held:
        raise CalibrationError(f"prune: none of {len(pairs)} pairs has an error, need one. Allow this layer f16.")
    return [held[i] for i in non_dominated([bits[i] for i in held], [errors[i] for i in held])]


def pair_bits(pair: Pair, n_k: int = 1, n_v: int = 1) -> float:
    """Real bits per cached value of a layer, scales included, that caches n_k values of K and n_v of V."""
    bits_k, bits_v = codec(pair.type_k).bits_per_value, codec(pair.type_v).bits_per_value
    return (bits_k * n_k + bits_v * n_v) / (n_k + n_v)


def pareto_menus(errors: ErrorTable, measure: str = "output_error", geometry: Geometry | None = None) -> Menus:
    """The Pareto pairs of each layer.

    geometry  what K and V weigh against each other in a layer; without it, the same
    """
    table = errors.measure(measure)
    menus = []
    for il, row in zip(errors.il, table):
        values = (geometry.values_k[il], geometry.values_v[il]) if geometry else (1, 1)
        if not any(values):
            raise CalibrationError(f"layer {il}: has errors, but caches no values. Capture again with this model.")
        keep = pareto_pairs(errors.pairs, [pair_bits(pair, *values) for pair in errors.pairs], row)
        menus.append(tuple(errors.pairs[i] for i in keep))
    return Menus(errors.il, tuple(menus))
