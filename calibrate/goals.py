"""What a plan is to reach: a cache of at most so many bytes, or a KLD of at most so much. All that differs between the
two stands here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kvtuner_gguf.calibrate.kld_model import KldModel
from kvtuner_gguf.calibrate.progress import Advance
from kvtuner_gguf.calibrate.results import Evaluate, Trial, Trials
from kvtuner_gguf.calibrate.solve import fewest_bytes, kld_search, refine, solve
from kvtuner_gguf.errors import CalibrationError
from kvtuner_gguf.geometry import Geometry
from kvtuner_gguf.pair import Pair

MOST_BITS = 1e6  # far above any type


@dataclass(frozen=True)
class WithinBytes:
    """The least KLD of all plans of at most n_bytes, K's vectors among them."""

    n_bytes: int
    on_copy = True  # KLDs are compared with each other only, so that they may be measured on a copy of the model

    def __post_init__(self) -> None:
        _check("memory", self.n_bytes)

    def at(self, geometry: Geometry) -> WithinBytes:
        """The goal for a cache of this geometry."""
        return self

    @property
    def max_bytes(self) -> int | None:
        """Bytes that a plan may have; None = as many as it takes."""
        return self.n_bytes

    def left(self, n_bytes: int) -> int | None:
        """Bytes that are left to the pairs when n_bytes are spent on K's vectors; None = as many as it takes."""
        return self.n_bytes - n_bytes

    def check(self, geometry: Geometry, cheapest: int) -> None:
        """Raises CalibrationError if a plan of `cheapest` bytes is beyond the goal."""
        if self.n_bytes < cheapest:
            raise CalibrationError(
                f"goal of {self.n_bytes} bytes at {geometry.n_ctx} tokens ({geometry.bits_of(self.n_bytes):.2f} bits): "
                f"the cheapest plan needs {cheapest} ({geometry.bits_of(cheapest):.2f} bits). Allow more, or a "
                "smaller -c."
            )

    def allows(self, n_bytes: int) -> bool:
        """Whether a plan may have so many bytes."""
        return n_bytes <= self.n_bytes

    def choose(self, trials: Trials, spent: int) -> Trial:
        """The best trial within the goal, `spent` bytes being paid for K's vectors. Raises CalibrationError if none
        is."""
        within = [t for t in trials.trials if self.allows(t.n_bytes + spent)]
        if not within:
            fewest = min(t.n_bytes for t in trials.trials) + spent
            raise CalibrationError(
                f"goal of {self.n_bytes} bytes: the smallest plan tried has {fewest}. Allow more, or more --trials."
            )
        return min(within, key=lambda t: (t.kld, t.n_bytes))

    def solve(self, kld_model: KldModel, x: np.ndarray, floor: float, spent: int) -> tuple[Pair, ...]:
        """The plan of the goal by a fitted model: its x, and its floor. Raises CalibrationError if there is none."""
        return solve(kld_model, kld_model.prices(x), self.n_bytes - spent)

    def refine(
        self,
        kld_model: KldModel,
        known: Sequence[Trial],
        evaluate: Evaluate,
        geometry: Geometry,
        *,
        spent: int,
        n_trials: int,
        seed: int,
        progress: Advance,
    ) -> Trial:
        """The best plan after n_trials more runs around the goal."""
        budget = self.n_bytes - spent
        return refine(kld_model, known, evaluate, geometry, budget, n_trials=n_trials, seed=seed, progress=progress)[1]


@dataclass(frozen=True)
class WithinBits:
    """The least KLD of all plans of at most so many real bits per cached value, scales and K's vectors included."""

    bits: float
    on_copy = True

    def __post_init__(self) -> None:
        _check("bits", self.bits)

    def at(self, geometry: Geometry) -> WithinBytes:
        """The goal for a cache of this geometry."""
        return WithinBytes(max(1, int(min(self.bits, MOST_BITS) * geometry.n_values / 8 + 1e-6)))


@dataclass(frozen=True)
class WithinKld:
    """The fewest bytes of all plans whose mean KLD is at most max_kld, in nats."""

    max_kld: float
    on_copy = False  # a KLD that is asked for is one of the model itself, with its own noise floor

    def __post_init__(self) -> None:
        _check("max-kld", self.max_kld)

    def at(self, geometry: Geometry) -> WithinKld:
        """The goal for a cache of this geometry."""
        return self

    @property
    def max_bytes(self) -> int | None:
        """None: as many as it takes."""
        return None

    def left(self, n_bytes: int) -> int | None:
        """None: as many as it takes."""
        return None

    def check(self, geometry: Geometry, cheapest: int) -> None:
        """Any plan may be within the goal until it is measured."""

    def allows(self, n_bytes: int) -> bool:
        """Whether a plan may have so many bytes."""
        return True

    def choose(self, trials: Trials, spent: int) -> Trial:
        """The smallest trial within the goal. Raises CalibrationError if none is."""
        within = [t for t in trials.trials if t.kld <= self.max_kld]
        if not within:
            best = min(t.kld for t in trials.trials)
            raise CalibrationError(
                f"goal of a KLD of {self.max_kld:g}: the best plan tried has {best:.6f}. Allow a larger --max-kld."
            )
        return min(within, key=lambda t: (t.n_bytes, t.kld))

    def solve(self, kld_model: KldModel, x: np.ndarray, floor: float, spent: int) -> tuple[Pair, ...]:
        """The plan of the goal by a fitted model: its x, and its floor. Raises CalibrationError if there is none."""
        pairs = fewest_bytes(kld_model, kld_model.prices(x), self.max_kld - floor)
        if pairs is None:
            raise CalibrationError(
                f"goal of a KLD of {self.max_kld:g}: the rounding of any quantized cache alone costs {floor:.6f}. "
                "Allow a larger --max-kld."
            )
        return pairs

    def refine(
        self,
        kld_model: KldModel,
        known: Sequence[Trial],
        evaluate: Evaluate,
        geometry: Geometry,
        *,
        spent: int,
        n_trials: int,
        seed: int,
        progress: Advance,
    ) -> Trial:
        """The best plan after n_trials more runs around the goal. Raises CalibrationError if none is within it."""
        tried = kld_search(kld_model, known, evaluate, geometry, self.max_kld, n_trials=n_trials, progress=progress)
        return self.choose(tried, spent)


Goal = WithinBits | WithinBytes | WithinKld  # as it is asked for
Target = WithinBytes | WithinKld  # at a context


def _check(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise CalibrationError(f"goal: got {name} of {value}, need a number above 0.")
