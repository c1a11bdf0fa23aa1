"""What the commands do, for a program: fit, calibrate, solve, evaluate, evaluate_tasks, verdict, read_plan, write_plan,
Server.

    from kvtuner_gguf.api import Options, WithinBits, calibrate, write_plan

    outcome = calibrate(Options("model.gguf", WithinBits(4.5)))
    write_plan("model.gguf", outcome.plan, "tuned.gguf")

All raise KvtunerError, whose text says what was got, what is needed, and what to do. `kvtuner_gguf.Llama` runs a plan.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

from . import fit as fitting
from . import gguf_file, output
from .calibrate.goals import Goal, WithinBits, WithinBytes, WithinKld
from .calibrate.options import Options, Outcome, Point, Solved
from .calibrate.progress import Progress, Silent
from .calibrate.results import Sensitivity
from .errors import CalibrationError
from .fit import Fit, FitRow
from .pair import Pair
from .plan import Plan
from .quality import Comparison, Quality, Row
from .serve import Server
from .tasks.score import TaskComparison

__all__ = [
    "Comparison",
    "Fit",
    "FitRow",
    "Goal",
    "Options",
    "Outcome",
    "Pair",
    "Plan",
    "Point",
    "Progress",
    "Quality",
    "Row",
    "Sensitivity",
    "Server",
    "Solved",
    "TaskComparison",
    "WithinBits",
    "WithinBytes",
    "WithinKld",
    "calibrate",
    "check_tasks",
    "evaluate",
    "evaluate_tasks",
    "fit",
    "known_grades",
    "read_plan",
    "solve",
    "verdict",
    "write_plan",
]

StrPath = str | os.PathLike[str]


def fit(
    model: StrPath,
    plan: Plan | StrPath | None = None,
    *,
    n_ctx: int = 8192,
    memory: int | None = None,
    n_gpu_layers: int = 0,
) -> Fit:
    """What a model takes of memory at n_ctx tokens with f16, each usual pair and the plan, and the largest context that
    fits. Loads no weights.

    plan    instead of the one in the file
    memory  bytes that weights, cache and buffers may take together; None = what the machine has free
    Raises NativeError for a model or a context that cannot be had, PlanError for a plan that is not the model's.
    """
    return fitting.fit(Path(model), plan, n_ctx=n_ctx, memory=memory, n_gpu_layers=n_gpu_layers)


def calibrate(options: Options, progress: Progress | None = None) -> Outcome:
    """Measure a model, find a plan for the goal, and prove it on held-out text.

    Takes minutes to hours. Nothing is written but records in the cache folder, which the next one of the same options
    goes on with, whatever its goal; options.fresh forgets them.

    progress  None: nothing is shown
    Raises CalibrationError if the goal cannot be met, the text is too short, there is no room, the same is being
    calibrated already, or a package of kvtuner-gguf[calibrate] is missing; NativeError for a model that cannot be run.
    """
    check_packages()
    from .calibrate import pipeline

    return pipeline.calibrate(options, progress or Silent())


def solve(options: Options, progress: Progress | None = None) -> Solved:
    """A plan for another goal, and the front of all, by what `calibrate` measured with the same options. Seconds, no
    run; the KLDs are predicted.

    Raises CalibrationError if nothing was measured, or the goal cannot be met.
    """
    check_packages()
    from .calibrate import pipeline

    return pipeline.solve_saved(options, progress or Silent())


def evaluate(
    model: StrPath,
    plans: Mapping[str, Plan | Pair],
    progress: Progress | None = None,
    *,
    n_ctx: int = 8192,
    text: StrPath | None = None,
    n_chunk: int = 4,
    seed: int = 0,
    n_threads: int | None = None,
    n_gpu_layers: int = 0,
) -> Comparison:
    """The KLD of each plan, or uniform pair, against an f16 cache, beside the f16 noise floor.

    plans    the rows, by name
    n_ctx    context at which bytes are counted
    text     a file or a pipe to measure on, .txt or .jsonl; None = the model writes its own
    n_chunk  pieces of text, of 1024 tokens or as many as the model can read
    Raises CalibrationError if a plan does not fit the model, or the text cannot be read or is too short.
    """
    check_packages()
    from .calibrate import evaluate as stage
    from .calibrate.pipeline import STREAM

    return stage.evaluate(
        Path(model),
        plans,
        progress or Silent(),
        stage.Passage(STREAM, n_chunk),
        n_ctx=n_ctx,
        text=text if text is None else Path(text),
        seed=seed,
        n_threads=n_threads,
        n_gpu_layers=n_gpu_layers,
    )


def verdict(
    model: StrPath,
    progress: Progress | None = None,
    *,
    pairs: Sequence[Pair] = (),
    n_ctx: int = 8192,
    text: StrPath | None = None,
    seed: int = 0,
    n_threads: int | None = None,
    n_gpu_layers: int = 0,
) -> Comparison:
    """Uniform pairs, each measured until it is clear whether it is safe, visible or broken (`quality.Grade`), on at
    most four chunks of 1024 tokens.

    pairs  () = the plan in the file or beside it, if there is one, and the usual pairs; those are left out, with a
           note, that not every layer can take
    Else as `evaluate`.
    """
    check_packages()
    from .calibrate import verdict as stage

    return stage.verdict(
        Path(model),
        progress or Silent(),
        pairs=pairs,
        n_ctx=n_ctx,
        text=text if text is None else Path(text),
        seed=seed,
        n_threads=n_threads,
        n_gpu_layers=n_gpu_layers,
    )


def known_grades(model: StrPath) -> dict[str, str]:
    """What the last `verdict` on these weights called each pair, by the pair's name: 'safe', 'visible' or
    'broken'; {} if there was none."""
    from .calibrate import verdict as stage

    return stage.known_grades(Path(model))


def evaluate_tasks(
    model: StrPath,
    plans: Mapping[str, Plan | Pair],
    tasks: StrPath,
    progress: Progress | None = None,
    *,
    n_ctx: int = 8192,
    seed: int = 0,
    n_threads: int | None = None,
    n_gpu_layers: int = 0,
    fresh: bool = False,
) -> TaskComparison:
    """The greedy answers of each plan, or uniform pair, to tasks, beside those of an f16 cache: accuracy, and what
    flipped.

    plans  the rows, by name
    tasks  a file of prompts with expected answers (docs/tasks.md), or "short" or "long:N" for a set of ours, the second
           with N tokens in each prompt
    n_ctx  context at which bytes are counted
    seed   of a set of ours
    fresh  forget what was answered before, instead of going on with it
    Raises TaskError for tasks that cannot be read or are too long, CalibrationError if a plan does not fit the model.
    """
    check_packages()
    from .tasks import evaluate as stage

    return stage.evaluate_tasks(
        Path(model),
        plans,
        str(tasks),
        progress or Silent(),
        n_ctx=n_ctx,
        seed=seed,
        n_threads=n_threads,
        n_gpu_layers=n_gpu_layers,
        fresh=fresh,
    )


def check_tasks(model: StrPath, tasks: StrPath, *, seed: int = 0) -> None:
    """Raises what evaluate_tasks would raise for these tasks, before work is spent."""
    check_packages()
    from .tasks import evaluate as stage

    stage.check_tasks(Path(model), str(tasks), seed)


def read_plan(path: StrPath) -> Plan | None:
    """The plan in a GGUF, or in a sidecar (.json); None if the GGUF has none. Raises PlanError for a fault in it."""
    path = Path(path)
    return Plan.load(path) if path.suffix.lower() == ".json" else gguf_file.read_plan(path)


def write_plan(model: StrPath, plan: Plan | None, path: StrPath | None = None, *, force: bool = False) -> Path:
    """Write a plan where it can be found, and return where it stands: a copy of the model, a sidecar if path ends in
    .json, or, without a path, the model itself, in place. plan None: the model without one.

    force  replace the file at path, whatever it holds; without it only a sidecar by a sidecar, and the same model
    Raises PlanError if it must not or cannot be written there; what stands there stays.
    """
    return output.output(Path(model), None if path is None else Path(path), force=force).write(plan)


def check_packages() -> None:
    """Raises CalibrationError if a package that a calibration needs is missing: running a plan needs fewer."""
    needed = ("gguf", "jsonschema", "optuna", "scipy", "sklearn", "threadpoolctl")
    missing = [name for name in needed if find_spec(name) is None]
    if missing:
        raise CalibrationError(
            f"calibration needs the package {missing[0]}. Install with: pip install 'kvtuner-gguf[calibrate]'"
        )
