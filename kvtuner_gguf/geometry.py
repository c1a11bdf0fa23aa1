"""What a model caches, and what a plan makes of it in bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .codecs import codec
from .errors import PlanError
from .kvectors import KVectors, vector_bytes, where_quantized
from .pair import Pair


@dataclass(frozen=True)
class Geometry:
    """How many values a model caches: what a plan's bytes are computed from.

    values_k values_v  cached values of each layer at n_ctx (cells times row); 0 where a layer has no KV of its own
    n_ctx              tokens of context at which they are counted
    k_vectors          of each layer: what a plan's types bring into force of them is counted; () = none
    """

    values_k: tuple[int, ...]
    values_v: tuple[int, ...]
    n_ctx: int
    k_vectors: tuple[KVectors, ...] = ()

    @property
    def n_layer(self) -> int:
        return len(self.values_k)

    @property
    def n_values(self) -> int:
        """Cached values of all layers, K and V."""
        return sum(self.values_k) + sum(self.values_v)

    def bits_of(self, n_bytes: int) -> float:
        """Bits per value of a cache of so many bytes; 0 for a model that caches nothing."""
        return 8 * n_bytes / self.n_values if self.n_values else 0.0

    def bytes(self, pairs: tuple[Pair, ...], k_vectors: Sequence[KVectors] | None = None) -> int:
        """Bytes of the cache with these pairs, and of what is in force under them of the vectors; None = the
        geometry's. Raises PlanError if there is not one pair per layer."""
        if len(pairs) != self.n_layer:
            raise PlanError(f"plan has {len(pairs)} layers, the model has {self.n_layer}. Calibrate this model again.")
        total = vector_bytes(where_quantized(self.k_vectors if k_vectors is None else k_vectors, pairs))
        for pair, n_k, n_v in zip(pairs, self.values_k, self.values_v):
            total += codec(pair.type_k or "f16").row_bytes(n_k) if n_k else 0
            total += codec(pair.type_v or "f16").row_bytes(n_v) if n_v else 0
        return total

    def layer(self, il: int) -> Geometry:
        """Of this layer alone."""
        return Geometry((self.values_k[il],), (self.values_v[il],), self.n_ctx, self.k_vectors[il : il + 1])

    def bits_per_value(self, pairs: tuple[Pair, ...], k_vectors: Sequence[KVectors] | None = None) -> float:
        """Real bits per cached value, scales and vectors included, averaged over all cached values."""
        return self.bits_of(self.bytes(pairs, k_vectors))
