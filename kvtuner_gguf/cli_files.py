"""The commands about files: show, apply, strip, export, cache, lib-dir."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from .arguments import FILE, MODEL, ModelFirst, shared
from .errors import PlanError
from .kept import KINDS, RPC
from .plan import Plan
from .terminal import note, print_json, show, show_json, show_path

if TYPE_CHECKING:
    from .output import Output


def written_to(to: Output, plan: Plan | None, recovery: str = "") -> Path:
    """Where the plan now stands."""
    path = to.write(plan, recovery)
    for text in to.notes:
        note(f"note: {text}")
    return path


def plan_in(model: Path) -> Plan:
    """In the file, or beside it."""
    from .gguf_file import read_plan
    from .in_force import plan_beside

    plan = read_plan(model) or plan_beside(model)
    if plan is None:
        raise PlanError(f"{model}: holds no plan. Make one with: kvtuner-gguf calibrate {model}")
    return plan


@click.command("show", cls=ModelFirst)
@click.argument("model", type=MODEL)
@click.option(
    "--plan", "plan_file", type=MODEL, help="A sidecar to show on this model, instead of the plan in the file."
)
@shared("c", "ngl", "json")
def show_plan(model: Path, plan_file: Path | None, n_ctx: int, n_gpu_layers: int, as_json: bool) -> None:
    """Show the plan of MODEL as the run time resolves it, and its memory at a context."""
    from .report import shown_json, shown_text
    from .shown import shown

    found = shown(model, plan_file, n_ctx=n_ctx, n_gpu_layers=n_gpu_layers)
    if as_json:
        print_json(shown_json(found))
    else:
        show(shown_text(found))


@click.command(cls=ModelFirst)
@click.argument("model", type=MODEL)
@click.argument("plan_file", type=MODEL)
@click.option("-o", "--output", type=FILE, help="Write a new GGUF. Default: into MODEL itself.")
@shared("force")
def apply(model: Path, plan_file: Path, output: Path | None, force: bool) -> None:
    """Write the plan of a sidecar, PLAN_FILE, into MODEL."""
    from .gguf_file import weights_hash
    from .output import gguf

    plan = Plan.load(plan_file)
    made_on = plan.calibration.get("weights")
    if made_on and made_on != (have := weights_hash(model)):
        note(f"note: {plan_file} was calibrated on other weights ({made_on}, {model} has {have}): calibrate again")
    show(f"Written to {written_to(gguf(model, output, reads=[plan_file], force=force), plan)}")


@click.command(cls=ModelFirst)
@click.argument("model", type=MODEL)
@click.option("-o", "--output", type=FILE, help="Write a new GGUF. Default: change MODEL itself.")
@shared("force")
def strip(model: Path, output: Path | None, force: bool) -> None:
    """Take the plan out of MODEL; what remains is the file as it was before."""
    from .output import gguf

    show(f"Written to {written_to(gguf(model, output, force=force), None)}")


@click.command(cls=ModelFirst)
@click.argument("model", type=MODEL)
@click.option("-o", "--output", type=FILE, help="Sidecar to write. Default: standard output.")
@click.option("--card", is_flag=True, help="Print a page about the plan instead, in Markdown, to publish it with.")
@shared("c", "ngl", "force")
def export(model: Path, output: Path | None, card: bool, n_ctx: int, n_gpu_layers: int, force: bool) -> None:
    """Copy the plan of MODEL into a sidecar. A sidecar named MODEL.kvtuner.json, beside MODEL, is found by itself."""
    from .output import sidecar

    plan = plan_in(model)
    if card:
        from .card import card_text
        from .shown import shown

        if output is not None:
            raise click.UsageError("--card is printed: kvtuner-gguf export MODEL --card > README.md")
        show(card_text(shown(model, plan, n_ctx=n_ctx, n_gpu_layers=n_gpu_layers), plan, model.name))
        return
    if output is None:
        show_json(plan.to_json())
    else:
        show(f"Written to {written_to(sidecar(output, reads=[model], force=force), plan)}")


@click.command()
@click.option(
    "--clear", type=click.Choice([*KINDS, "model", RPC, "all"]), help="Remove what is kept of this kind, or all of it."
)
@shared("json")
def cache(clear: str | None, as_json: bool) -> None:
    """List what is kept: measurements of calibrations, answers to tasks, grades of verdicts, models that were fetched
    or sent to a worker here, and what clients of an rpc-server sent."""
    from . import kept
    from .report import kept_json, kept_text

    items = [item for item in kept.kept() if clear in (None, "all", item.kind)]
    if clear is None:
        if as_json:
            print_json(kept_json(items))
        else:
            show(kept_text(items))
        return
    freed, left = kept.clear(items)
    for item in left:
        note(f"note: {item.path}: in use, and left as it is")
    if as_json:
        print_json({"freed_bytes": freed, "left": kept_json(left)})
    else:
        show(f"{freed / 2**20:.1f} MiB freed")


@click.command("lib-dir")
def show_lib_dir() -> None:
    """Print the folder of the patched libraries: LLAMA_CPP_LIB_PATH for a program on llama-cpp-python that does not
    import us."""
    from . import native

    show_path(native.lib_dir())
