"""A model -> whether the usual uniform pairs are safe, visible or broken on it, measured until that is clear, and
kept."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from kvtuner_gguf.calibrate.evaluate import Passage, Subject, opened
from kvtuner_gguf.calibrate.progress import Progress
from kvtuner_gguf.calibrate.records import load_json, save_json
from kvtuner_gguf.calibrate.store import keyed_dir
from kvtuner_gguf.errors import CalibrationError
from kvtuner_gguf.gguf_file import read_plan
from kvtuner_gguf.identity import weights_sample
from kvtuner_gguf.in_force import plan_beside
from kvtuner_gguf.kept import write_about
from kvtuner_gguf.pair import USUAL, Pair
from kvtuner_gguf.plan import Plan
from kvtuner_gguf.quality import BROKEN, Comparison, Grade, Quality, Row
from kvtuner_gguf.runtime import Session

PLAN = "the plan"
TEXT = Passage(stream=1024, n_chunk=4, written=256)  # short sequences, so that many are written at once
GLANCE = Passage(stream=512, n_chunk=1, written=128)  # which shows what is broken beyond doubt
_BEYOND_DOUBT = 4  # standard errors, as few blocks tell little of their own spread
RECORDS = 2  # counted up when grades come to mean something else
_GRADES = "grades"


def verdict(
    model: Path,
    progress: Progress,
    *,
    pairs: Sequence[Pair] = (),
    n_ctx: int = 8192,
    text: Path | None = None,
    seed: int = 0,
    n_threads: int | None = None,
    n_gpu_layers: int = 0,
) -> Comparison:
    """Pairs, as `evaluate` measures them, each on as many chunks as make its grade clear: those that a glance shows to
    be broken on a few hundred tokens. Their grades are kept, for known_grades.

    pairs  () = the plan in the file or beside it, if there is one, and the usual pairs
    Raises CalibrationError, NativeError and PlanError as `evaluate`, and for a faulty plan in the file, or a pair that
    the model cannot take.
    """
    plan = None if pairs else read_plan(model) or plan_beside(model)
    taken, refused = _taken(model, pairs or USUAL)
    if pairs and refused:
        raise CalibrationError(f"{refused[0]}. Ask for others.")
    named: dict[str, Plan | Pair] = {} if plan is None else {PLAN: plan}
    named |= {str(pair): pair for pair in taken}
    with opened(
        model, named, progress, TEXT, n_ctx=n_ctx, text=text, seed=seed, n_threads=n_threads, n_gpu_layers=n_gpu_layers
    ) as subject:
        glance = _glance(subject, [str(pair) for pair in taken])
        broken = {row.name: row for row in glance.rows if _is_broken(row)} if glance else {}
        left = [name for name in named if name not in broken]
        found = subject.measured(TEXT, left, enough=_is_clear) if left or not glance else glance
    rows = {row.name: row for row in found.rows} | broken
    floor = found.rows[0]
    _keep(model, {name: Grade.of(row.quality).word for name, row in rows.items() if name not in (floor.name, PLAN)})
    return replace(found, rows=(floor, *(rows[name] for name in named)), notes=(*found.notes, *refused))


def _taken(model: Path, pairs: Sequence[Pair]) -> tuple[list[Pair], list[str]]:
    """The pairs that every layer can take, and a note for each of the others."""
    with Session(model, no_alloc=True) as shape:
        types = shape.supported(sorted({name for pair in pairs for name in (pair.type_k, pair.type_v)}))
    taken = [p for p in dict.fromkeys(pairs) if all(p.type_k in k and p.type_v in v for k, v in types.values())]
    return taken, [f"{pair}: not every layer of this model can take it" for pair in pairs if pair not in taken]


def _glance(subject: Subject, names: Sequence[str]) -> Comparison | None:
    """The pairs of the fewest bits, down to the first that a few hundred tokens do not show to be broken."""
    if not names:
        return None
    geometry, plans = subject.geometry, subject.plans

    def goes_on(row: Row) -> bool:
        if is_broken := _is_broken(row):
            others = 100 * (1 - row.quality.same_top)
            subject.progress.say(f"{row.name}: broken ({others:.0f} of 100 likeliest tokens are others)")
        return is_broken

    by_bits = sorted(names, key=lambda name: geometry.bits_per_value(plans[name].pairs))
    return subject.measured(GLANCE, by_bits, goes_on=goes_on)


def _is_broken(row: Row) -> bool:
    return row.quality.kld_mean - _BEYOND_DOUBT * row.quality.kld_se > BROKEN


def known_grades(model: Path) -> dict[str, str]:
    """The word of each pair that the last verdict on these weights graded, by the pair's name; {} if there was none."""
    with suppress(CalibrationError):
        return load_json(_place(model) / _GRADES, _GRADES, lambda data: dict(data["words"]))
    return {}


def _keep(model: Path, words: dict[str, str]) -> None:
    place = _place(model)
    write_about(place, model)
    save_json(place / _GRADES, _GRADES, {"words": known_grades(model) | words})


def _place(model: Path) -> Path:
    return keyed_dir("verdict", RECORDS, weights_sample(model))


def _is_clear(quality: Quality) -> bool:
    return Grade.of(quality).is_clear
