"""How K is conditioned before it is cached: the vectors of each layer, and how a plan stores those of all layers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
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
K_BASIS_SCALE_RANGE = (1e-6, 1e6)
# as a plan stores them, in the order of its checksum
SIDES = ("k_mean", "k_scale", "k_basis", "k_basis_scale")


@dataclass(frozen=True)
class KVectors:
    """How one layer's K is conditioned: cached as (K - mean) / scale, after RoPE, and Q multiplied by scale. See
    native/llama/kvt-cond.h.

    Under a type of groups (codecs.py) it is cached in a basis instead of rotated: as M (K - mean) with M =
    diag(basis_scale) A diag(1 / scale) for each KV head, and Q as the inverse transpose of M makes it. The rows of A
    are in the order in which a row of the cache holds them: for each block of 64, 16 of each quarter of the head.

    mean scale   n_head_kv * head_dim values each, head after head, kept as f32; () = none
    basis        the matrices A, int8, n_head_kv * head_dim * head_dim values, head after head, row after row; b"" =
                 none
    basis_scale  n_head_kv * head_dim values, kept as f32: one for each row of A
    Raises PlanError for lengths that do not fit together, a value that is no finite number, a mean beyond K_MEAN_MAX, a
    scale out of K_SCALE_RANGE or K_BASIS_SCALE_RANGE.
    """

    mean: tuple[float, ...] = ()
    scale: tuple[float, ...] = ()
    basis: bytes = b""
    basis_scale: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for key in ("mean", "scale", "basis_scale"):
            object.__setattr__(self, key, tuple(checked(f"k_{key}", "arr_f32", list(getattr(self, key)))))
        object.__setattr__(self, "basis", checked("k_basis", "arr_i8", self.basis))
        if self.mean and self.scale and len(self.mean) != len(self.scale):
            raise PlanError(
                f"k_mean: got {len(self.mean)} values, k_scale has {len(self.scale)}, need the same. Calibrate again."
            )
        if self.mean and max(map(abs, self.mean)) > K_MEAN_MAX:
            raise PlanError(
                f"k_mean: got {max(self.mean, key=abs):g}, need {-K_MEAN_MAX:g} to {K_MEAN_MAX:g}. Calibrate again."
            )
        for key, values, (low, high) in (
            ("k_scale", self.scale, K_SCALE_RANGE),
            ("k_basis_scale", self.basis_scale, K_BASIS_SCALE_RANGE),
        ):
            if values and not (min(values) >= low and max(values) <= high):
                raise PlanError(
                    f"{key}: got {min(values):g} to {max(values):g}, need {low:g} to {high:g}. Calibrate again."
                )
        self._check_basis()

    def _check_basis(self) -> None:
        n, n_rows = len(self.basis), len(self.basis_scale)
        if bool(n) != bool(n_rows):
            raise PlanError(
                f"k_basis: got {n} values, k_basis_scale has {n_rows}, need both or neither. Calibrate again."
            )
        if n and (n % n_rows or n_rows % self.head_dim):
            raise PlanError(
                f"k_basis: got {n} values, k_basis_scale has {n_rows}, need square matrices of as many rows. "
                "Calibrate again."
            )
        for key, values in (("k_mean", self.mean), ("k_scale", self.scale)):
            if n and values and len(values) != n_rows:
                raise PlanError(
                    f"{key}: got {len(values)} values, k_basis_scale has {n_rows}, need the same. Calibrate again."
                )

    def __bool__(self) -> bool:
        return bool(self.mean or self.scale or self.basis)

    @property
    def head_dim(self) -> int:
        """Channels of a head, by the basis; 0 without one."""
        return len(self.basis) // len(self.basis_scale) if self.basis_scale else 0

    @property
    def n_bytes(self) -> int:
        """Bytes as a plan stores them."""
        return 4 * (len(self.mean) + len(self.scale) + len(self.basis_scale)) + len(self.basis)

    @property
    def without_basis(self) -> KVectors:
        """Mean and scale alone."""
        return replace(self, basis=b"", basis_scale=()) if self.basis else self

    @property
    def basis_alone(self) -> KVectors:
        """What `without_basis` leaves out."""
        return replace(self, mean=(), scale=())

    def under(self, type_k: str) -> KVectors:
        """What is in force of them under a type of K ("" = f16): a basis where it has groups, and nothing where it is
        not quantized."""
        found = codec(type_k or "f16")
        if found.block_size == 1:
            return AS_IT_IS
        return self if found.groups else self.without_basis


AS_IT_IS = KVectors()


def k_vectors_of(found: Mapping[str, Any]) -> tuple[KVectors, ...]:
    """The vectors of each layer from a plan's checked values: k_mean, k_mean_n_values, and so on. () if it has none.
    Raises PlanError."""
    sides: dict[str, list[Any]] = {}
    for key in SIDES:
        values, n_values = found.get(key), found.get(f"{key}_n_values")
        if (values is None) != (n_values is None):
            raise PlanError(f"{key}: got it without its n_values or the other way round, need both. Calibrate again.")
        values, n_values = values or (), n_values or []
        if sum(n_values) != len(values):
            raise PlanError(
                f"{key}: got {len(values)} values, {key}.n_values adds up to {sum(n_values)}. Calibrate again."
            )
        ends = list(accumulate(n_values))
        sides[key] = [values[end - n : end] for n, end in zip(n_values, ends)]
    first, *others = [key for key in SIDES if sides[key]] or SIDES
    for key in others:
        if sides[key] and len(sides[key]) != len(sides[first]):
            raise PlanError(
                f"{key}.n_values: got {len(sides[key])} layers, {first}.n_values has {len(sides[first])}, need the "
                "same. Calibrate again."
            )
    vectors = []
    for il, (mean, scale, basis, basis_scale) in enumerate(zip_longest(*sides.values(), fillvalue=())):
        with blamed_on(f"layer {il}"):
            vectors.append(KVectors(tuple(mean), tuple(scale), basis or b"", tuple(basis_scale)))
    return tuple(vectors)


def joined(parts: Iterable[tuple[float, ...]]) -> tuple[float, ...] | None:
    """One side of all layers, one after another, as a plan stores it; None if no layer has any."""
    return tuple(chain.from_iterable(parts)) or None


def vector_bytes(k_vectors: Iterable[KVectors]) -> int:
    """Bytes of the vectors as a plan stores them."""
    return sum(v.n_bytes for v in k_vectors)


def where_quantized(k_vectors: Sequence[KVectors], pairs: Sequence[Pair]) -> tuple[KVectors, ...]:
    """What is in force of each layer's vectors under these pairs; the rest would cost time and change nothing."""
    return tuple(v.under(p.type_k) for v, p in zip(k_vectors, pairs))
