"""What a cache was measured to cost: one figure set, one row of a table, a table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev

from .errors import PlanError
from .values import checked

# the numbers of a Quality, and how a file keeps them
QUALITY_FIELDS = (
    ("kld_mean", "f32"),
    ("kld_p999", "f32"),
    ("same_top", "f32"),
    ("n_positions", "u32"),
    ("kld_se", "f32"),
    ("same_top_se", "f32"),
)
REQUIRED = ("kld_mean", "kld_p999", "same_top")


@dataclass(frozen=True)
class Quality:
    """How far the output is from that of an f16 cache, on held-out text.

    kld_mean kld_p999  mean and 99.9 % quantile of the KL divergence, in nats, kept as f32 (as the file keeps them)
    same_top           share of the positions whose most likely token is the same, 0 to 1
    n_positions        positions measured; 0 = not recorded
    kld_se same_top_se standard errors of the two means, from how the blocks of the text differ; 0 = not recorded
    blocks             mean KLD of each block; kept in records, not in a file
    Raises PlanError for a value that is no finite number, or out of its range.
    """

    kld_mean: float
    kld_p999: float
    same_top: float
    n_positions: int = 0
    kld_se: float = 0.0
    same_top_se: float = 0.0
    blocks: tuple[float, ...] = field(default=(), compare=False, repr=False)

    def __post_init__(self) -> None:
        for key, kind in QUALITY_FIELDS:
            object.__setattr__(self, key, checked(key, kind, getattr(self, key)))
        if not 0 <= self.same_top <= 1:
            raise PlanError(f"same_top: got {self.same_top}, need a share from 0 to 1. Measure again.")
        for key in ("kld_se", "same_top_se"):
            if getattr(self, key) < 0:
                raise PlanError(f"{key}: got {getattr(self, key)}, need a standard error, 0 or above. Measure again.")
        object.__setattr__(self, "blocks", tuple(self.blocks))

    @property
    def figures(self) -> dict[str, float]:
        """The numbers that a file keeps, by name."""
        return {key: getattr(self, key) for key, _ in QUALITY_FIELDS}


@dataclass(frozen=True)
class Beside:
    """A plan's mean KLD beside a rival's on the same text.

    ratio     the plan's by the rival's; of a rival that has none, 1 if the plan has none either, else inf
    ratio_se  its standard error: block by block, so that a hard text, which is hard for both, does not count
    """

    ratio: float
    ratio_se: float

    @classmethod
    def of(cls, plan: Quality, rival: Quality) -> Beside:
        if not rival.kld_mean:
            return cls(math.inf if plan.kld_mean else 1.0, 0.0)
        ratio = plan.kld_mean / rival.kld_mean
        if len(plan.blocks) != len(rival.blocks) or len(plan.blocks) < 2:
            return cls(ratio, math.hypot(plan.kld_se, ratio * rival.kld_se) / rival.kld_mean)
        left = [a - ratio * b for a, b in zip(plan.blocks, rival.blocks)]
        return cls(ratio, standard_error(left) / rival.kld_mean)

    @property
    def verdict(self) -> str:
        """'won' or 'lost' where the ratio is more than two standard errors from 1, else 'tie'."""
        if self.ratio + 2 * self.ratio_se < 1:
            return "won"
        return "lost" if self.ratio - 2 * self.ratio_se > 1 else "tie"


def standard_error(blocks: Sequence[float]) -> float:
    """Of the mean of blocks of one size; 0 of a single one."""
    return stdev(blocks, fmean(blocks)) / math.sqrt(len(blocks)) if len(blocks) > 1 else 0.0


SAFE, BROKEN = 0.01, 0.1  # mean KLD, in nats; docs/tasks.md says why


@dataclass(frozen=True)
class Grade:
    """What a mean KLD comes to.

    word      'safe': below SAFE, 'broken': above BROKEN, or 'visible'
    is_clear  by two standard errors
    """

    word: str
    is_clear: bool

    @classmethod
    def of(cls, quality: Quality) -> Grade:
        kld, margin = quality.kld_mean, 2 * quality.kld_se
        word = "safe" if kld < SAFE else "broken" if kld > BROKEN else "visible"
        return cls(word, all(abs(kld - bound) > margin for bound in (SAFE, BROKEN)))


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
    notes    what was wrong with a plan that was measured all the same
    weights  type of the weights of the model's copy that was run; None = the model itself was
    own      rows of the model itself, on a part of the text, where a copy was run
    """

    text: str
    n_positions: int
    chunk_ctx: int
    n_ctx: int
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()
    weights: str | None = None
    own: tuple[Row, ...] = ()

    @property
    def safe(self) -> Row | None:
        """The row of the fewest bytes that is safe, apart from the first, which is the noise floor."""
        safe = [row for row in self.rows[1:] if Grade.of(row.quality).word == "safe"]
        return min(safe, key=lambda row: row.n_bytes, default=None)
