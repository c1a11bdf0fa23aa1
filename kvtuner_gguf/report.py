"""What was found, as text for a terminal and as plain values for JSON. No model here."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .geometry import Geometry
from .pair import Pair
from .plan import Plan
from .printable import printable
from .quality import Comparison, Grade, Quality, Row

if TYPE_CHECKING:
    from .calibrate.options import Outcome, Solved
    from .fit import Fit
    from .kept import Kept
    from .shown import Shown
    from .tasks.score import Accuracy, TaskComparison

MIB = 1024 * 1024


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns: the first to the left, the others to the right."""
    cells = [[printable(cell) for cell in row] for row in (head, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:]))]).rstrip()
        for row in cells
    ]
    return "\n".join([lines[0], "-" * (sum(widths) + 2 * len(widths) - 2), *lines[1:]])


def comparison_text(c: Comparison) -> str:
    """The KLD table."""
    notes = (f"note: {printable(note)}" for note in c.notes)
    return "\n".join((table(*comparison_table(c)), comparison_note(c), *notes))


def comparison_table(c: Comparison) -> tuple[Sequence[str], Sequence[Sequence[str]]]:
    """Its head, and its rows."""
    rows = [
        (row.name, f"{row.bits_per_value:.2f}", f"{row.n_bytes / MIB:.1f}", *figures(row.quality))
        for row in (*c.rows, *c.own)
    ]
    return ("cache", "bits", f"MiB at {c.n_ctx}", *FIGURES), rows


def comparison_note(c: Comparison) -> str:
    """What its figures are."""
    in_part = [r.name for r in c.rows if 0 < r.quality.n_positions < c.n_positions]
    fewer = f" (fewer of {', '.join(in_part)}, as that was clear sooner)" if in_part else ""
    own = f"; weights in {c.weights}, in the last rows the model's own, on a part of the text" if c.own else ""
    return (
        f"KLD against an f16 cache, in nats; text {printable(c.text)}, {c.n_positions} scored positions in "
        f"chunks of {c.chunk_ctx} tokens{fewer}{own}; +-: standard error."
    )


FIGURES = ("mean KLD", "99.9 % KLD", "same top token")


def figures(quality: Quality) -> tuple[str, str, str]:
    """What a table shows of a quality, under the heads FIGURES."""
    se = f" +-{100 * quality.same_top_se:.1f}" if quality.same_top_se else ""
    return _kld(quality), f"{quality.kld_p999:.3f}", f"{100 * quality.same_top:.1f}{se} %"


def _kld(quality: Quality) -> str:
    """A mean with its standard error, if it is known."""
    return f"{quality.kld_mean:.5f}" + (f" +-{quality.kld_se:.5f}" if quality.kld_se else "")


def front_text(points: Sequence[tuple[float, int, float]], n_ctx: int) -> str:
    """One line per plan of the front: (bits per value, bytes, predicted mean KLD)."""
    rows = [(f"{bits:.2f}", f"{n_bytes / MIB:.1f}", f"{kld:.5f}") for bits, n_bytes, kld in points]
    return table(("bits", f"MiB at {n_ctx}", "predicted mean KLD"), rows)


def comparison_json(c: Comparison) -> dict[str, Any]:
    def of(rows: Sequence[Row]) -> list[dict[str, Any]]:
        return [
            {"name": r.name, "bits_per_value": r.bits_per_value, "bytes": r.n_bytes, **r.quality.figures} for r in rows
        ]

    return {
        "text": c.text,
        "n_positions": c.n_positions,
        "chunk_ctx": c.chunk_ctx,
        "n_ctx": c.n_ctx,
        "weights": c.weights,
        "rows": of(c.rows),
        "own_weights": of(c.own),
        "notes": list(c.notes),
    }


def verdict_text(c: Comparison, model: Path) -> str:
    """One sentence for each row, and what to do."""
    floor, *rows = c.rows
    lines = [
        f"{row.name}, {row.bits_per_value:.1f} bits: {_graded(row.quality)}. {_tokens(row.quality)}" for row in rows
    ]
    lines.append(f"Rounding alone: {_tokens(floor.quality)}")
    lines += [f"note: {printable(note)}" for note in c.notes]
    if c.safe:
        lines.append(f"Fewest bits that are safe: {c.safe.name}, {c.safe.n_bytes / MIB:.1f} MiB at {c.n_ctx} tokens.")
    else:
        lines.append("None of them is safe.")
    return "\n".join(lines) + f"\nA plan of fewer bits: kvtuner-gguf calibrate {printable(model)} --bits 4.5"


def _graded(quality: Quality) -> str:
    grade = Grade.of(quality)
    return grade.word if grade.is_clear else f"{grade.word}, narrowly"


def _tokens(quality: Quality) -> str:
    return f"{100 * (1 - quality.same_top):.1f} of 100 likeliest tokens are others, mean KLD {_kld(quality)}."


def verdict_json(c: Comparison) -> dict[str, Any]:
    """The same for a program: as of `evaluate`, with a grade in each row."""
    found = comparison_json(c)
    for row, measured in zip(found["rows"], c.rows):
        grade = Grade.of(measured.quality)
        row |= {"grade": grade.word, "is_clear": grade.is_clear}
    return found | {"safe": c.safe and c.safe.name}


def tasks_text(c: TaskComparison) -> str:
    """The tables of tasks, and what they show."""
    return "\n\n".join([*(table(*part) for part in tasks_tables(c)), tasks_note(c)])


def tasks_tables(c: TaskComparison) -> list[tuple[Sequence[str], list[Sequence[str]]]]:
    """Heads and rows: all tasks together, and each area's share of right answers if there are several."""
    rows: list[Sequence[str]] = []
    areas: list[Sequence[str]] = []
    for row in c.rows:
        flips, accuracy = c.flips(row), row.accuracy
        beside = (
            ("", "", "")
            if row is c.rows[0]
            else (f"{flips.lost} + {flips.gained}", f"{flips.p_value:.2f}", f"{flips.changed}")
        )
        size = (f"{row.bits_per_value:.2f}", f"{row.n_bytes / MIB:.1f}")
        valid = [f"{100 * row.valid.share:.0f} %"] if row.valid else []
        rows.append((row.name, *size, _share(accuracy), *beside, *valid))
        areas.append((row.name, *(f"{100 * a.share:.0f} %" for a in row.areas().values())))
    of_areas = c.rows[0].areas()
    last = ("valid JSON",) if c.rows[0].valid else ()
    all_together: Sequence[str] = ("cache", "bits", f"MiB at {c.n_ctx}", "right", "flips", "p", "other text", *last)
    of_each = ("right", *(f"{name or 'others'} ({a.n})" for name, a in of_areas.items()))
    return [(all_together, rows), (of_each, areas)][: 1 + (len(of_areas) > 1)]


def tasks_note(c: TaskComparison) -> str:
    """What the tables are of, and what was left."""
    about = (
        f"{len(c.rows[0].answers)} tasks of {printable(c.tasks)}, greedy; +-: standard error. Flips against f16: right "
        "there and wrong here + the other way; p: McNemar's exact test of the two."
    )
    if valid := c.rows[0].valid:
        about += f" Valid JSON: of {valid.n} answers that were to be JSON, those that their schema takes, right or not."
    return "\n\n".join([about, *(f"note: {printable(note)}" for note in c.notes)])


def _share(accuracy: Accuracy) -> str:
    return f"{100 * accuracy.share:.1f} +-{100 * accuracy.se:.1f} %"


def tasks_json(c: TaskComparison) -> dict[str, Any]:
    """The same for a program, with all answers."""
    rows = []
    for row in c.rows:
        flips = c.flips(row)
        rows.append(
            {
                "name": row.name,
                "bits_per_value": row.bits_per_value,
                "bytes": row.n_bytes,
                **vars(row.accuracy),
                "lost": flips.lost,
                "gained": flips.gained,
                "p_value": flips.p_value,
                "changed": flips.changed,
                "valid": vars(row.valid) if row.valid else None,
                "areas": {name: vars(accuracy) for name, accuracy in row.areas().items()},
                "answers": [vars(answer) for answer in row.answers],
            }
        )
    return {"tasks": c.tasks, "n_ctx": c.n_ctx, "rows": rows, "notes": list(c.notes)}


def fit_text(found: Fit, grades: Mapping[str, str], model: Path) -> str:
    """What each cache takes, how much context fits, and what to do next.

    grades  of a verdict on the model, by the names of pairs
    """
    rows = [
        (
            row.name,
            f"{row.bits_per_value:.2f}",
            f"{row.memory.cache / found.n_ctx / 1024:.1f}",
            f"{row.memory.cache / MIB:.1f}",
            f"{row.memory.total / MIB:.1f}",
            f"{row.most_ctx}" if row.most_ctx else "none",
            grades.get(row.name, ""),
        )
        for row in found.rows
    ]
    head = ("cache", "bits", "KiB a token", f"MiB at {found.n_ctx}", "with the model", "context that fits", "verdict")
    of_f16 = found.rows[0].memory
    parts = [
        f"weights {of_f16.weights / MIB:.1f} MiB, buffers {of_f16.compute / MIB:.1f} MiB; "
        f"{found.available / MIB:.0f} MiB may be taken; trained for {found.n_ctx_train} tokens",
        table(head if grades else head[:-1], rows if grades else [row[:-1] for row in rows]),
        _left_text(found, printable(model)),
    ]
    if not grades:
        parts.append(f"Which of them this model bears: kvtuner-gguf verdict {printable(model)}")
    return "\n\n".join([*parts, *(f"note: {printable(note)}" for note in found.notes)])


def _left_text(found: Fit, model: str) -> str:
    at = f"At {found.n_ctx} tokens"
    if found.left <= 0:
        return f"{at} the weights and buffers alone do not fit."
    if found.left >= found.rows[0].memory.cache:
        return f"{at} all of them fit."
    left = found.left // MIB
    return (
        f"{at} {left} MiB are left for K and V, {found.left_bits:.2f} bits per value. A plan of that: "
        f"kvtuner-gguf calibrate {model} --memory {left}M -c {found.n_ctx}"
    )


def fit_json(found: Fit, grades: Mapping[str, str]) -> dict[str, Any]:
    """The same for a program, in bytes."""
    rows = [{**row, "verdict": grades.get(row["name"])} for row in asdict(found)["rows"]]
    return {**asdict(found), "rows": rows}


def layers_text(pairs: Sequence[Pair]) -> str:
    """One line per run of equal layers."""
    return table(LAYERS, layer_rows(pairs))


LAYERS = ("layers", "K", "V")


def layer_rows(pairs: Sequence[Pair]) -> list[tuple[str, str, str]]:
    """A row for each run of equal layers, under the heads LAYERS."""
    return [
        (f"{first}" if first == last else f"{first}-{last}", pair.type_k or "none of its own", pair.type_v)
        for first, last, pair in Plan(tuple(pairs)).runs()
    ]


def conditions_text(layers: Sequence[tuple[int, bool, bool, bool]]) -> str:
    """Which layers' K is conditioned, from (il, mean, scale, basis) each; "" if none's is."""
    sides = {name: [layer[0] for layer in layers if layer[i]] for i, name in enumerate(("mean", "scale", "basis"), 1)}
    return ", ".join(f"{name} in layers {_ranges(il)}" for name, il in sides.items() if il)


def _ranges(il: Sequence[int]) -> str:
    """0-3,7 for 0 1 2 3 7."""
    starts = [i for i in il if i - 1 not in il]
    ends = [i for i in il if i + 1 not in il]
    return ",".join(f"{a}" if a == b else f"{a}-{b}" for a, b in zip(starts, ends))


def memory_rows(
    pairs: Sequence[Pair], geometry: Geometry, vector_bytes: int = 0
) -> list[tuple[str, int, float, float]]:
    """(name, bytes, real bits per value, share of f16) of the plan with its vectors, of f16 and of q8_0."""
    rows = []
    f16 = geometry.bytes((Pair("f16", "f16"),) * geometry.n_layer)
    for name, these in (("plan", tuple(pairs)), *((t, (Pair(t, t),) * geometry.n_layer) for t in ("f16", "q8_0"))):
        n_bytes = geometry.bytes(these) + (vector_bytes if name == "plan" else 0)
        share = n_bytes / f16 if f16 else 0.0
        rows.append((name, n_bytes, 16 * share, share))
    return rows


def memory_text(pairs: Sequence[Pair], geometry: Geometry, vector_bytes: int = 0) -> str:
    """MiB of the cache at the geometry's context, beside f16 and q8_0."""
    rows = [
        (name, f"{bits:.2f}", f"{n / MIB:.1f}", f"{100 * share:.0f} %")
        for name, n, bits, share in memory_rows(pairs, geometry, vector_bytes)
    ]
    return table(("cache", "bits", f"MiB at {geometry.n_ctx}", "of f16"), rows)


def plan_json(plan: Plan) -> dict[str, Any]:
    """As in a sidecar."""
    return json.loads(plan.to_json())


def outcome_text(outcome: Outcome, written: Path) -> str:
    """What a calibration found, and where it was written."""
    plan = outcome.plan
    parts = (
        layers_text(plan.pairs)
        + _conditions_line([(il, bool(v.mean), bool(v.scale), bool(v.basis)) for il, v in enumerate(plan.k_vectors)]),
        memory_text(plan.pairs, outcome.geometry, plan.vector_bytes),
        comparison_text(outcome.comparison),
        f"{verdict_line(outcome)}\nWritten to {written}",
    )
    return "\n\n".join(parts)


def verdict_line(outcome: Outcome) -> str:
    beside = outcome.beside
    if beside is None:
        return "No uniform pair is within the goal."
    ends = {
        "won": "the plan won.",
        "tie": "no difference within two standard errors; the plan is kept.",
        "lost": f"the plan lost, and {outcome.plan.rival} was written instead.",
    }
    digits = 2 if beside.ratio >= 0.1 else 4
    return (
        f"{beside.ratio:.{digits}f} +-{beside.ratio_se:.{digits}f} of the KLD of the best uniform pair of as many "
        f"bytes or fewer: {ends[outcome.verdict]}"
    )


def outcome_json(outcome: Outcome, written: Path) -> dict[str, Any]:
    """The same for a program."""
    comparison = comparison_json(outcome.comparison)
    beside = outcome.beside and {
        "ratio": outcome.beside.ratio if math.isfinite(outcome.beside.ratio) else None,  # JSON has no infinity
        "ratio_se": outcome.beside.ratio_se,
    }
    return {
        "written": str(written),
        "verdict": outcome.verdict,
        "beside_best_uniform": beside,
        "plan": plan_json(outcome.plan),
        "comparison": comparison,
    }


def kept_text(items: Sequence[Kept]) -> str:
    """What is kept in the cache folder."""
    if not items:
        return "Nothing is kept."
    rows = [(k.kind, k.about or "?", f"{k.n_bytes / MIB:.1f}", _age(k.age_s), str(k.path)) for k in items]
    return table(("kind", "of", "MiB", "written", "where"), rows)


def _age(seconds: float) -> str:
    """About how long ago, in the largest unit that it has one of."""
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit} ago"
    return "just now"


def kept_json(items: Sequence[Kept]) -> list[dict[str, Any]]:
    """The same for a program."""
    return [{**vars(item), "path": str(item.path)} for item in items]


def solved_text(solved: Solved, written: Path | None) -> str:
    """A plan by what was measured, the front, and where it was written."""
    plan = solved.plan
    points = [(p.bits_per_value, p.n_bytes, p.kld) for p in solved.front]
    parts = (
        layers_text(plan.pairs),
        memory_text(plan.pairs, solved.geometry, plan.vector_bytes),
        front_text(points, solved.geometry.n_ctx),
        f"predicted mean KLD of the plan: {solved.kld:.5f}; not proved"
        + (f"\nWritten to {written}" if written else ""),
    )
    return "\n\n".join(parts)


def solved_json(solved: Solved, written: Path | None) -> dict[str, Any]:
    """The same for a program."""
    front = [vars(p) for p in solved.front]
    return {
        "written": written and str(written),
        "plan": plan_json(solved.plan),
        "kld": solved.kld,
        "front": front,
        "sensitivities": [vars(s) for s in solved.sensitivities],
    }


def csv_text(records: Sequence[Any]) -> str:
    """Records of one kind as CSV, for a table: their fields, then a line for each."""
    out = StringIO()
    writer = csv.DictWriter(out, [f.name for f in fields(records[0])] if records else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(vars(record) for record in records)
    return out.getvalue()


def shown_text(shown: Shown) -> str:
    """A plan as the run time resolves it."""
    line = _conditions_line([(layer.il, layer.k_mean, layer.k_scale, layer.k_basis) for layer in shown.layers])
    memory = memory_text(shown.pairs, shown.geometry, shown.vector_bytes)
    text = f"plan from: {shown.source}\n\n{layers_text(shown.pairs)}{line}\n\n{memory}"
    if shown.plan and shown.plan.quality:
        rival = shown.plan.rival_quality
        beside = f"; best uniform pair {shown.plan.rival}: {_kld(rival)}" if rival else ""
        weights = shown.plan.calibration.get("proof_weights")
        of_copy = f" (weights in {printable(str(weights))})" if weights else ""
        text += f"\n\nmean KLD when calibrated: {_kld(shown.plan.quality)}{beside}{of_copy}"
    return "\n".join((text, *(f"note: {note}" for note in shown.notes)))


def shown_json(shown: Shown) -> dict[str, Any]:
    """The same for a program."""
    conditioned = {
        layer.il: {"k_mean": layer.k_mean, "k_scale": layer.k_scale, "k_basis": layer.k_basis} for layer in shown.layers
    }
    layers = [
        {"il": il, "type_k": p.type_k, "type_v": p.type_v, **conditioned.get(il, {})}
        for il, p in enumerate(shown.pairs)
    ]
    memory = [
        {"name": name, "bytes": n_bytes, "bits_per_value": bits, "of_f16": share}
        for name, n_bytes, bits, share in memory_rows(shown.pairs, shown.geometry, shown.vector_bytes)
    ]
    return {
        "source": shown.source,
        "layers": layers,
        "n_ctx": shown.geometry.n_ctx,
        "memory": memory,
        "notes": list(shown.notes),
        "plan": shown.plan and plan_json(shown.plan),
    }


def _conditions_line(layers: Sequence[tuple[int, bool, bool, bool]]) -> str:
    text = conditions_text(layers)
    return f"\nK conditioned: {text}" if text else ""
