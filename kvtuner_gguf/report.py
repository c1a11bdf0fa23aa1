"""Tables from saved results: text for a terminal, plain values for JSON. No model here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .geometry import Geometry
from .pair import Pair
from .plan import Plan
from .printable import printable
from .quality import Comparison

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
    rows = [
        (
            r.name,
            f"{r.bits_per_value:.2f}",
            f"{r.n_bytes / MIB:.1f}",
            f"{r.quality.kld_mean:.5f}",
            f"{r.quality.kld_p999:.3f}",
            f"{100 * r.quality.same_top:.1f} %",
        )
        for r in c.rows
    ]
    head = ("cache", "bits", f"MiB at {c.n_ctx}", "mean KLD", "99.9 % KLD", "same top token")
    note = (
        f"KLD against an f16 cache, in nats; text {printable(c.text)}, {c.n_positions} scored positions in "
        f"chunks of {c.chunk_ctx} tokens."
    )
    return "\n".join((table(head, rows), note, *(f"note: {printable(n)}" for n in c.notes)))


def front_text(points: Sequence[tuple[float, int, float]], n_ctx: int) -> str:
    """One line per plan of the front: (bits per value, bytes, predicted mean KLD)."""
    rows = [(f"{bits:.2f}", f"{n_bytes / MIB:.1f}", f"{kld:.5f}") for bits, n_bytes, kld in points]
    return table(("bits", f"MiB at {n_ctx}", "predicted mean KLD"), rows)


def comparison_json(c: Comparison) -> dict[str, Any]:
    rows = [{"name": r.name, "bits_per_value": r.bits_per_value, "bytes": r.n_bytes, **vars(r.quality)} for r in c.rows]
    return {
        "text": c.text,
        "n_positions": c.n_positions,
        "chunk_ctx": c.chunk_ctx,
        "n_ctx": c.n_ctx,
        "rows": rows,
        "notes": list(c.notes),
    }


def layers_text(pairs: Sequence[Pair]) -> str:
    """One line per run of equal layers."""
    rows = []
    for first, last, pair in Plan(tuple(pairs)).runs():
        layers = f"{first}" if first == last else f"{first}-{last}"
        rows.append((layers, pair.type_k or "none of its own", pair.type_v))
    return table(("layers", "K", "V"), rows)


def conditions_text(layers: Sequence[tuple[int, bool, bool]]) -> str:
    """Which layers' K is conditioned, from (il, mean, scale) each; "" if none's is."""
    sides = (("mean", [il for il, mean, _ in layers if mean]), ("scale", [il for il, _, scale in layers if scale]))
    return ", ".join(f"{name} in layers {_ranges(il)}" for name, il in sides if il)


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
