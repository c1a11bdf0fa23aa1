"""What a cache was measured to cost: one figure set, one row of a table, a table."""

from __future__ import annotations

from dataclasses import dataclass

from .errors import PlanError
from .values import checked

# the numbers of a Quality, and how a file keeps them
QUALITY_FIELDS = (("kld_mean", "f32"), ("kld_p999", "f32"), ("same_top", "f32"), ("n_positions", "u32"))


@dataclass(frozen=True)
class Quality:
    """How far the output is from that of an f16 cache, on held-out text.

    kld_mean kld_p999  mean and 99.9 % quantile of the KL divergence, in nats, kept as f32 (as the file keeps them)
    same_top           share of the positions whose most likely token is the same, 0 to 1
    n_positions        positions measured; 0 = not recorded
    Raises PlanError for a value that is no finite number, or out of its range.
    """

    kld_mean: float
    kld_p999: float
    same_top: float
    n_positions: int = 0

    def __post_init__(self) -> None:
        for key, kind in QUALITY_FIELDS:
            object.__setattr__(self, key, checked(key, kind, getattr(self, key)))
        if not 0 <= self.same_top <= 1:
            raise PlanError(f"same_top: got {self.same_top}, need a share from 0 to 1. Measure again.")


@dataclass(frozen=True)
class Row:
    """One cache configuration: real bits per value, bytes at the context, quality on held-out text."""

    name: str
    bits_per_value: float
    n_bytes: int
    quality: Quality


@dataclass(frozen=True)
class Comparison:
    """Configurations measured on the same text.

    n_positions scored positions   chunk_ctx tokens of a chunk   n_ctx context at which n_bytes are counted
    notes  what was wrong with a plan that was measured all the same
    """

    text: str
    n_positions: int
    chunk_ctx: int
    n_ctx: int
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()
