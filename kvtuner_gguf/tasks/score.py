"""Answers that were right or not -> accuracy, and what flipped against an f16 cache. No model here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Answered:
    """One task's outcome.

    text   what the model wrote
    right  whether it gives what was expected
    valid  whether it has JSON that its schema takes; None where no JSON was asked for
    """

    id: str
    area: str
    text: str
    right: bool
    valid: bool | None = None


@dataclass(frozen=True)
class Accuracy:
    """Share of right (or valid) answers, 0 to 1, with its standard error (binomial), of n tasks."""

    share: float
    se: float
    n: int

    @classmethod
    def of(cls, outcomes: Sequence[bool]) -> Accuracy:
        n = len(outcomes)
        share = sum(outcomes) / n
        return cls(share, math.sqrt(share * (1 - share) / n), n)


@dataclass(frozen=True)
class Flips:
    """What is other than on an f16 cache, task by task.

    lost     right there, wrong here
    gained   wrong there, right here
    changed  whose text is another one, right or wrong
    """

    lost: int
    gained: int
    changed: int

    @classmethod
    def of(cls, answers: Sequence[Answered], f16: Sequence[Answered]) -> Flips:
        pairs = list(zip(answers, f16, strict=True))
        return cls(
            sum(b.right and not a.right for a, b in pairs),
            sum(a.right and not b.right for a, b in pairs),
            sum(a.text != b.text for a, b in pairs),
        )

    @property
    def n(self) -> int:
        return self.lost + self.gained

    @property
    def p_value(self) -> float:
        """McNemar's exact test: how likely so uneven a split is where a flip goes either way alike."""
        from scipy.stats import binomtest

        return float(binomtest(self.lost, self.n, 0.5).pvalue) if self.n else 1.0


@dataclass(frozen=True)
class TaskRow:
    """One cache's answers to all tasks, in their order. bits_per_value n_bytes  as in quality.Row"""

    name: str
    bits_per_value: float
    n_bytes: int
    answers: tuple[Answered, ...]

    @property
    def accuracy(self) -> Accuracy:
        return Accuracy.of([a.right for a in self.answers])

    @property
    def valid(self) -> Accuracy | None:
        """Of the answers that were to be JSON; None if none was."""
        outcomes = [a.valid for a in self.answers if a.valid is not None]
        return Accuracy.of(outcomes) if outcomes else None

    def areas(self) -> dict[str, Accuracy]:
        """Of each area by itself."""
        names = dict.fromkeys(a.area for a in self.answers)
        return {name: Accuracy.of([a.right for a in self.answers if a.area == name]) for name in names}


@dataclass(frozen=True)
class TaskComparison:
    """Caches on the same tasks. The first row is the f16 cache, which flips are counted against, the second the same by
    another attention kernel: what rounding alone flips.

    tasks  what they are called   n_ctx  context at which n_bytes are counted
    notes  what was wrong with a plan that was measured all the same
    """

    tasks: str
    n_ctx: int
    rows: tuple[TaskRow, ...]
    notes: tuple[str, ...] = ()

    def flips(self, row: TaskRow) -> Flips:
        return Flips.of(row.answers, self.rows[0].answers)
