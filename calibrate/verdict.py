"""A model -> whether the usual uniform pairs are safe, visible or broken on it, measured until that is clear, and
kept."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from kvtuner_gguf.calibrate.evaluate import evaluate
from kvtuner_gguf.calibrate.progress import Progress
from kvtuner_gguf.calibrate.records import load_json, save_json
from kvtuner_gguf.calibrate.store import keyed_dir
from kvtuner_gguf.errors import CalibrationError
from kvtuner_gguf.gguf_file import read_plan
from kvtuner_gguf.identity import weights_sample
from kvtuner_gguf.kept import write_about
from kvtuner_gguf.pair import USUAL, Pair
from kvtuner_gguf.plan import Plan
from kvtuner_gguf.quality import Comparison, Grade, Quality
from kvtuner_gguf.runtime import Session

PLAN = "the plan in the file"
STREAM, N_CHUNK = 1024, 4
RECORDS = 1  # counted up when grades come to mean something else
_GRADES = "grades"
WRITTEN = 256  # tokens of a sequence that the model writes: short, so that many are written at once


def verdict(
    model: Path,
    progress: Progress,
    *,
    n_ctx: int = 8192,
    text: Path | None = None,
    seed: int = 0,
    n_threads: int | None = None,
    n_gpu_layers: int = 0,
) -> Comparison:
    """The plan in the file, if it holds one, and the usual pairs, as `evaluate` measures them, each on as many chunks
    as make its grade clear. The pairs' grades are kept, for known_grades.

    Raises CalibrationError, NativeError and PlanError as `evaluate`, and for a faulty plan in the file.
    """
    plan = read_plan(model)
    named: dict[str, Plan | Pair] = {} if plan is None else {PLAN: plan}
    notes = []
    with Session(model, no_alloc=True) as shape:
        types = shape.supported(sorted({name for pair in USUAL for name in (pair.type_k, pair.type_v)}))
    for pair in USUAL:
        if all(pair.type_k in k and pair.type_v in v for k, v in types.values()):
            named[str(pair)] = pair
        else:
            notes.append(f"{pair}: not every layer of this model can take it")
    found = evaluate(
        model,
        named,
        progress,
        stream=STREAM,
        written=WRITTEN,
        n_ctx=n_ctx,
        text=text,
        n_chunk=N_CHUNK,
        seed=seed,
        n_threads=n_threads,
        n_gpu_layers=n_gpu_layers,
        enough=_is_clear,
    )
    _keep(model, {row.name: Grade.of(row.quality).word for row in found.rows[1:] if row.name != PLAN})
    return replace(found, notes=(*found.notes, *notes))


def known_grades(model: Path) -> dict[str, str]:
    """The word of each pair that the last verdict on these weights graded, by the pair's name; {} if there was none."""
    with suppress(CalibrationError):
        return load_json(_place(model) / _GRADES, _GRADES, lambda data: dict(data["words"]))
    return {}


def _keep(model: Path, words: dict[str, str]) -> None:
    place = _place(model)
    write_about(place, model)
    save_json(place / _GRADES, _GRADES, {"words": words})


def _place(model: Path) -> Path:
    return keyed_dir("verdict", RECORDS, weights_sample(model))


def _is_clear(quality: Quality) -> bool:
    return Grade.of(quality).is_clear
