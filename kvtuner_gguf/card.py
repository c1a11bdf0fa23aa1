"""What to say of a plan where it is published: a page in Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from .in_force import BESIDE
from .plan import Plan
from .printable import printable
from .report import FIGURES, LAYERS, MIB, figures, layer_rows, memory_rows
from .shown import Shown


def card_text(shown: Shown, plan: Plan, name: str) -> str:
    """The page of a plan, as it is resolved on its model, whose file has this name: what it saves, what it was measured
    to cost, how it is used, its layers, and how it was made. Ends without a newline."""
    model, n_ctx = printable(name), shown.geometry.n_ctx
    (_, n_bytes, bits, share), (_, f16_bytes, *_), _ = memory_rows(shown.pairs, shown.geometry, shown.vector_bytes)
    lines = (
        f"# K/V cache plan for {model}",
        "",
        f"{bits:.2f} bits per cached value in place of f16's 16: at {n_ctx} tokens {n_bytes / MIB:.1f} MiB in place of "
        f"{f16_bytes / MIB:.1f} ({100 * share:.0f} %). kvtuner-gguf measured what each layer of this model bears, and "
        "chose its K type and its V type by that. A stock llama.cpp ignores the plan.",
        "",
        *_measured(plan),
        "## Use",
        "",
        f"With kvtuner-gguf installed, a sidecar of the name `{model}{BESIDE}` beside `{model}` is found by itself, by "
        "`kvtuner-gguf chat` and by every program that imports `llama_cpp`. For `llama-server` and others it is "
        "written into the file:",
        "",
        "```bash",
        f"kvtuner-gguf apply {model} {model}{BESIDE}",
        "```",
        "",
        "## Layers",
        "",
        *_table(LAYERS, layer_rows(shown.pairs)),
        "",
        *_made(plan),
        *(f"Note: {printable(note)}" for note in shown.notes),
    )
    return "\n".join(lines).rstrip("\n")


def _measured(plan: Plan) -> Iterator[str]:
    """What its proof found; nothing if it has none."""
    if plan.quality is None or plan.bits_per_value is None:
        return
    rows = [("this plan", f"{plan.bits_per_value:.2f}", *figures(plan.quality))]
    if plan.rival and plan.rival_quality and plan.rival_bits is not None:
        rival = (f"{plan.rival}, the best uniform pair", f"{plan.rival_bits:.2f}", *figures(plan.rival_quality))
        rows.append(rival)
    yield from _table(("cache", "bits", *FIGURES), rows)
    copy, n = plan.calibration.get("proof_weights"), plan.quality.n_positions
    yield ""
    yield (
        "KLD is the Kullback-Leibler divergence of the next token's probabilities from those of an f16 cache, in nats, "
        "on text that the search has not seen"
        + (f", over {n} positions" if n else "")
        + (f", with a copy of the model in {printable(str(copy))}" if copy else "")
        + "; +- is a standard error."
    )
    yield ""


def _made(plan: Plan) -> Iterator[str]:
    """How it was made; nothing if it does not say."""
    if plan.calibration:
        yield "## How it was made"
        yield ""
        yield from _table(("what", "value"), [(key, str(value)) for key, value in plan.calibration.items()])
        yield ""


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    cells = ([printable(cell).replace("|", "\\|") for cell in row] for row in (head, ["---"] * len(head), *rows))
    return [f"| {' | '.join(row)} |" for row in cells]
