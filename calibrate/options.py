"""What a calibration is asked for, and what comes out of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from kvtuner_gguf.errors import CalibrationError
from kvtuner_gguf.geometry import Geometry
from kvtuner_gguf.pair import Pair
from kvtuner_gguf.plan import Plan
from kvtuner_gguf.quality import Comparison

DEFAULT_TYPES = ("f16", "q8_0", "q6_32", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl", "q3_64", "q3_32", "q2_64", "q2_32")
PAPER_TYPES = ("q8_0", "q4_0", "q2_64", "q2_32")  # KVTuner's 8, 4 and 2 bits
IN_PLACE_OF = {"q3_32": "q3_64", "q2_32": "q2_64"}  # by default only where a head is no multiple of the wider block
DEFAULT_BITS = 6.0
MOST_BITS = 1e6  # far above any type
PAPER_TRIALS = 100


@dataclass(frozen=True)
class Goal:
    """What the user wants, in one unit: bits per value, bytes at the context, or a mean KLD. One of the three."""

    bits: float | None = None
    memory_bytes: int | None = None
    max_kld: float | None = None

    def __post_init__(self) -> None:
        given = [v for v in (self.bits, self.memory_bytes, self.max_kld) if v is not None]
        if len(given) != 1 or not 0 < given[0] < math.inf:
            raise CalibrationError(f"goal: got {self}, need one of bits, memory and max-kld, a number above 0.")

    def max_bytes(self, geometry: Geometry) -> int | None:
        """The byte budget at the geometry's context; None if the goal is a KLD."""
        if self.memory_bytes is not None:
            return self.memory_bytes
        return int(min(self.bits, MOST_BITS) * geometry.n_values / 8 + 1e-6) if self.bits is not None else None


@dataclass(frozen=True)
class Options:
    """One calibration. n_ctx: context at which bytes are counted; n_chunk: pieces of text, which all stages scale
    with."""

    model: Path
    goal: Goal
    method: str = "fitted"
    n_ctx: int = 8192
    text: Path | None = None
    n_chunk: int = 4
    seed: int = 0
    n_trials: int | None = None
    n_threads: int | None = None
    n_gpu_layers: int = 0
    resume: bool = False
    types: tuple[str, ...] = ()
    k_mean: bool | None = None
    k_scale: bool | None = None

    @property
    def conditioning(self) -> tuple[bool, bool]:
        """Whether K's mean may be taken off, and K scaled: the paper knows neither."""
        default = self.method != "paper"
        return tuple(default if x is None else x for x in (self.k_mean, self.k_scale))

    @property
    def candidate_types(self) -> tuple[str, ...]:
        return self.types or (PAPER_TYPES if self.method == "paper" else DEFAULT_TYPES)


@dataclass(frozen=True)
class Outcome:
    """plan: to be written; comparison: the held-out table; searched: the plan found, which is not `plan` if it lost."""

    plan: Plan
    searched: tuple[Pair, ...]
    won: bool
    comparison: Comparison
    geometry: Geometry


@dataclass(frozen=True)
class Point:
    """One plan of the front: real bits per value, bytes at the context, predicted mean KLD."""

    bits_per_value: float
    n_bytes: int
    kld: float


@dataclass(frozen=True)
class Solved:
    """plan: of the goal, not proved; kld: what it is predicted to have; front: by ascending bytes."""

    plan: Plan
    kld: float
    front: tuple[Point, ...]
    geometry: Geometry
