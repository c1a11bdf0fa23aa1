"""What a calibration is asked for, and what comes out of it."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from kvtuner_gguf.calibrate.corpus import file_sha256
from kvtuner_gguf.calibrate.goals import Goal, WithinBits, WithinKld
from kvtuner_gguf.calibrate.results import Sensitivity
from kvtuner_gguf.codecs import CODECS, codec
from kvtuner_gguf.errors import CalibrationError
from kvtuner_gguf.geometry import Geometry
from kvtuner_gguf.identity import weights_sample
from kvtuner_gguf.pair import Pair
from kvtuner_gguf.plan import Plan
from kvtuner_gguf.quality import Beside, Comparison

DEFAULT_TYPES = tuple(c.name for c in CODECS.values() if c.in_menu)
PAPER_TYPES = ("q8_0", "q4_0", "q2_64", "q2_32")  # KVTuner's 8, 4 and 2 bits
DEFAULT_GOAL = WithinBits(6.0)
PAPER_TRIALS = 100
METHODS = ("fitted", "paper")


def _text_of(path: Path | None) -> str | None:
    return None if path is None else file_sha256(path)


# what of an option's value tells the runs of one calibration from those of another, so that records are not taken for
# others; None = they mean the same whatever it is
_VALUE: Any = {"identity": lambda value: value}
_WEIGHTS: Any = {"identity": weights_sample}
_TEXT: Any = {"identity": _text_of}
_NOTHING: Any = {"identity": None}


@dataclass(frozen=True)
class Options:
    """One calibration. Raises CalibrationError, CodecError for a value that is none.

    model         the GGUF; of a split one the first shard
    goal          what the plan is to reach
    method        'fitted' is ours, 'paper' is KVTuner's
    n_ctx         context at which bytes are counted, in tokens
    text          a file or a pipe to measure on, .txt or .jsonl; None = the model writes its own
    n_chunk       pieces of text, which all stages scale with
    seed          of the text and of the search
    n_trials      real runs of the search; None = two per layer and about 20 more, or PAPER_TRIALS
    n_threads     None = the processors that this process may use
    n_gpu_layers  layers of the model that are on the GPU
    workers       who do the runs: "tcp://host:8786", a scheduler of dask.distributed, or a number of processes here;
                  None = this process
    fresh         forget what was measured before, instead of going on with it
    types         cache types to choose from; () = the default ones
    k_mean        whether K may be cached without its mean, where that helps; None = as the method has it
    k_scale       whether K may be scaled per channel, likewise
    k_basis       whether K may be in a basis, which types of groups need, likewise
    """

    model: Path = field(metadata=_WEIGHTS)
    goal: Goal = field(default=DEFAULT_GOAL, metadata=_NOTHING)
    method: str = field(default="fitted", metadata=_NOTHING)
    n_ctx: int = field(default=8192, metadata=_NOTHING)
    text: Path | None = field(default=None, metadata=_TEXT)
    n_chunk: int = field(default=4, metadata=_VALUE)
    seed: int = field(default=0, metadata=_VALUE)
    n_trials: int | None = field(default=None, metadata=_NOTHING)
    n_threads: int | None = field(default=None, metadata=_NOTHING)
    n_gpu_layers: int = field(default=0, metadata=_VALUE)
    workers: str | None = field(default=None, metadata=_NOTHING)
    fresh: bool = field(default=False, metadata=_NOTHING)
    types: tuple[str, ...] = field(default=(), metadata=_NOTHING)
    k_mean: bool | None = field(default=None, metadata=_NOTHING)
    k_scale: bool | None = field(default=None, metadata=_NOTHING)
    k_basis: bool | None = field(default=None, metadata=_NOTHING)

    def __post_init__(self) -> None:
        object.__setattr__(self, "model", Path(self.model))
        object.__setattr__(self, "text", None if self.text is None else Path(self.text))
        if self.method not in METHODS:
            raise CalibrationError(f"method '{self.method}' is not known. Use one of: {', '.join(METHODS)}.")
        if self.method == "paper" and isinstance(self.goal, WithinKld):
            raise CalibrationError("method 'paper' searches within bits or bytes, not for a KLD. Set another goal.")
        for name in self.types:
            codec(name)

    @property
    def conditioning(self) -> tuple[bool, bool, bool]:
        """Whether K's mean may be taken off, K scaled, and put in a basis: the paper knows none of it."""
        asked = (self.k_mean, self.k_scale, self.k_basis)
        mean, scale, basis = (self.method != "paper" if this is None else this for this in asked)
        return mean, scale, basis

    @property
    def candidate_types(self) -> tuple[str, ...]:
        """The cache types to choose from."""
        return self.types or (PAPER_TYPES if self.method == "paper" else DEFAULT_TYPES)

    @property
    def measured_types(self) -> tuple[str, ...]:
        """Those, and f16, which errors and runs start from."""
        return tuple(dict.fromkeys(("f16", *self.candidate_types)))

    def identity(self) -> list[Any]:
        """What tells the runs of this calibration from those of others. Raises CalibrationError if the text cannot be
        read, PlanError if the model cannot."""
        named = [(f.name, f.metadata["identity"]) for f in fields(self) if f.metadata["identity"]]
        return [(name, of(getattr(self, name))) for name, of in named]


@dataclass(frozen=True)
class Outcome:
    """What a calibration found.

    plan        to be written
    searched    the plan found, which is not `plan` if it lost
    beside      the plan found beside the best uniform pair of its bytes on held-out text; None if there is none
    comparison  the held-out table
    geometry    what the model caches at the context
    """

    plan: Plan
    searched: tuple[Pair, ...]
    beside: Beside | None
    comparison: Comparison
    geometry: Geometry

    @property
    def verdict(self) -> str:
        """'won', 'tie' or 'lost': the plan against that pair. What lost is not written."""
        return self.beside.verdict if self.beside else "won"


@dataclass(frozen=True)
class Point:
    """One plan of the front: real bits per value, bytes at the context, predicted mean KLD."""

    bits_per_value: float
    n_bytes: int
    kld: float


@dataclass(frozen=True)
class Solved:
    """plan: of the goal, not proved; kld: what it is predicted to have; front: by ascending bytes; sensitivities: by
    layer, side and bits."""

    plan: Plan
    kld: float
    front: tuple[Point, ...]
    geometry: Geometry
    sensitivities: tuple[Sensitivity, ...] = ()
