"""What a plan is to reach: a cache of at most so many bytes, or a KLD of at most so much. All that differs between the
two stands here."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from kvtuner_gguf.calibrate.kld_model import Fit, KldModel
from kvtuner_gguf.calibrate.progress import Advance, Progress
from kvtuner_gguf.calibrate.results import Evaluate, Trial, Trials
from kvtuner_gguf.calibrate.solve import fewest_bytes, kld_search, refine, solve
from kvtuner_gguf.errors import CalibrationError
from kvtuner_gguf.geometry import Geometry
from kvtuner_gguf.pair import Pairs

MOST_BITS = 1e6  # far above any type


@dataclass(frozen=True)
class Search:
    """What a search goes by, whatever its way.

    spent     bytes of K's means and scales
    n_trials  real runs in all; None = as many as its way needs
    ahead     told of plans whose KLD will be asked for, so that workers may run them; None = there are no workers
    """

    geometry: Geometry
    spent: int
    n_trials: int | None
    seed: int
    progress: Progress
    ahead: Callable[[Iterable[Pairs]], None] | None = None


class Target(ABC):
    """What is asked of a goal at a context, of either kind.

    spent     bytes of K's means and scales
    on_copy   whether it may be searched on a copy of the model
    """

    on_copy: ClassVar[bool]

    def at(self, geometry: Geometry) -> Target:
        """The goal for a cache of this geometry."""
        return self

    @property
    @abstractmethod
    def max_bytes(self) -> int | None:
        """Bytes that a plan may have; None = as many as it takes."""

    def left(self, spent: int) -> int | None:
        """Bytes that are left to the pairs; None = as many as it takes."""
        return None if self.max_bytes is None else self.max_bytes - spent

    def allows(self, n_bytes: int) -> bool:
        """Whether a plan may have so many bytes."""
        return self.max_bytes is None or n_bytes <= self.max_bytes

    @abstractmethod
    def check(self, geometry: Geometry, cheapest: int) -> None:
        """Raises CalibrationError if a plan of `cheapest` bytes is beyond the goal."""

    @abstractmethod
    def choose(self, trials: Trials, spent: int) -> Trial:
        """The best trial within the goal. Raises CalibrationError if none is."""

    @abstractmethod
    def solve(self, found: Fit, spent: int) -> Pairs:
        """The plan of the goal by what the runs told. Raises CalibrationError if there is none."""

    @abstractmethod
    def refine(
        self,
        kld_model: KldModel,
        known: Sequence[Trial],
        evaluate: Evaluate,
        search: Search,
        n_trials: int,
        advance: Advance,
    ) -> Trial:
        """The best plan after n_trials more runs around the goal. Raises CalibrationError if none is within it."""


@dataclass(frozen=True)
class WithinBytes(Target):
    """The least KLD of all plans of at most n_bytes, K's vectors among them."""

    n_bytes: int
    on_copy = True  # KLDs are compared with each other only

    def __post_init__(self) -> None:
        _check("memory", self.n_bytes)

    @property
    def max_bytes(self) -> int:
        return self.n_bytes

    def check(self, geometry: Geometry, cheapest: int) -> None:
        if not self.allows(cheapest):
            raise CalibrationError(
                f"goal of {self.n_bytes} bytes at {geometry.n_ctx} tokens ({geometry.bits_of(self.n_bytes):.2f} bits): "
                f"the cheapest plan needs {cheapest} ({geometry.bits_of(cheapest):.2f} bits). Allow more, or a "
                "smaller -c."
            )

    def choose(self, trials: Trials, spent: int) -> Trial:
        within = [t for t in trials.trials if self.allows(t.n_bytes + spent)]
        if not within:
            fewest = min(t.n_bytes for t in trials.trials) + spent
            raise CalibrationError(
                f"goal of {self.n_bytes} bytes: the smallest plan tried has {fewest}. Allow more, or more --trials."
            )
        return min(within, key=lambda t: (t.kld, t.n_bytes))

    def solve(self, found: Fit, spent: int) -> Pairs:
        return solve(found.kld_model, found.prices, self.n_bytes - spent)

    def refine(
        self,
        kld_model: KldModel,
        known: Sequence[Trial],
        evaluate: Evaluate,
        search: Search,
        n_trials: int,
        advance: Advance,
    ) -> Trial:
        sizes = search.geometry, self.n_bytes - search.spent
        return refine(kld_model, known, evaluate, *sizes, n_trials=n_trials, seed=search.seed, progress=advance)[1]


@dataclass(frozen=True)
class WithinBits:
    """The least KLD of all plans of at most so many real bits per cached value, scales and K's vectors included."""

    bits: float

    def __post_init__(self) -> None:
        _check("bits", self.bits)

    def at(self, geometry: Geometry) -> WithinBytes:
        """The goal for a cache of this geometry."""
        return WithinBytes(max(1, int(min(self.bits, MOST_BITS) * geometry.n_values / 8 + 1e-6)))


@dataclass(frozen=True)
class WithinKld(Target):
    """The fewest bytes of all plans whose mean KLD is at most max_kld, in nats."""

    max_kld: float
    on_copy = False  # a KLD that is asked for is one of the model itself, with its own noise floor

    def __post_init__(self) -> None:
        _check("max-kld", self.max_kld)

    @property
    def max_bytes(self) -> None:
        return None

    def check(self, geometry: Geometry, cheapest: int) -> None:
        """Any plan may be within the goal until it is measured."""

    def choose(self, trials: Trials, spent: int) -> Trial:
        within = [t for t in trials.trials if t.kld <= self.max_kld]
        if not within:
            best = min(t.kld for t in trials.trials)
            raise CalibrationError(
                f"goal of a KLD of {self.max_kld:g}: the best plan tried has {best:.6f}. Allow a larger --max-kld."
            )
        return min(within, key=lambda t: (t.n_bytes, t.kld))

    def solve(self, found: Fit, spent: int) -> Pairs:
        pairs = fewest_bytes(found.kld_model, found.prices, self.max_kld - found.floor)
        if pairs is None:
            raise CalibrationError(
                f"goal of a KLD of {self.max_kld:g}: the rounding of any quantized cache alone costs "
                f"{found.floor:.6f}. Allow a larger --max-kld."
            )
        return pairs

    def refine(
        self,
        kld_model: KldModel,
        known: Sequence[Trial],
        evaluate: Evaluate,
        search: Search,
        n_trials: int,
        advance: Advance,
    ) -> Trial:
        sizes = search.geometry, self.max_kld
        tried = kld_search(kld_model, known, evaluate, *sizes, n_trials=n_trials, progress=advance)
        return self.choose(tried, search.spent)


Goal = WithinBits | WithinBytes | WithinKld  # as it is asked for


def _check(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise CalibrationError(f"goal: got {name} of {value}, need a number above 0.")
