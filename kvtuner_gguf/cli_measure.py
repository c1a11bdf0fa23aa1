"""The commands that measure: fit, calibrate, solve, evaluate, verdict."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .arguments import FILE, MODEL, Memory, ModelFirst, shared
from .cli_files import plan_in, written_to
from .pair import Pair
from .plan import Plan
from .terminal import Terminal, note, print_json, show

if TYPE_CHECKING:
    from .api import Options


@click.command(cls=ModelFirst)
@click.argument("model", type=MODEL)
@click.option("--plan", "plan_file", type=MODEL, help="A sidecar to count, instead of the plan in the file.")
@click.option(
    "--memory", type=Memory(), help="What weights, cache and buffers may take together. [default: what is free]"
)
@shared("c", "ngl", "json")
def fit(model: Path, plan_file: Path | None, memory: int | None, n_ctx: int, n_gpu_layers: int, as_json: bool) -> None:
    """Tell what MODEL takes of memory with each usual cache, and how much context fits. Loads no weights, and needs no
    plan."""
    from . import api
    from .report import fit_json, fit_text

    found = api.fit(model, plan_file, n_ctx=n_ctx, memory=memory, n_gpu_layers=n_gpu_layers)
    grades = api.known_grades(model)
    if as_json:
        print_json(fit_json(found, grades))
    else:
        show(fit_text(found, grades, model))


@click.command(cls=ModelFirst)
@click.argument("model", type=MODEL)
@click.option(
    "-o", "--output", type=FILE, help="Write a new GGUF, or with .json a sidecar. Default: into MODEL itself."
)
@shared("bits", "memory", "kld")
@click.option(
    "--method",
    type=click.Choice(["fitted", "paper"]),
    default="fitted",
    show_default=True,
    help="How to search: 'fitted' is ours, 'paper' is KVTuner's.",
)
@click.option(
    "--trials",
    "n_trials",
    type=click.IntRange(8, 10000),
    help="Real runs of the search. [default: two per layer and about 20 more; paper 100]",
)
@shared("types", "mean", "scale", "basis")
@click.option("--report", type=FILE, help="Write a page of HTML about it, too: what was measured, in pictures.")
@click.option("--tasks", help="Ask these tasks under f16 and the plan, too: see `kvtuner-gguf evaluate`.")
@click.option(
    "--workers",
    metavar="tcp://HOST:PORT|N",
    help="Who does the runs: workers of this dask scheduler, or so many processes here. Default: this process.",
)
@shared("fresh", "c", "f", "chunks", "seed", "t", "ngl", "force", "json")
@click.pass_context
def calibrate(
    ctx: click.Context,
    /,
    model: Path,
    output: Path | None,
    report: Path | None,
    tasks: str | None,
    force: bool,
    as_json: bool,
    **given: Any,
) -> None:
    """Measure MODEL, find its plan, prove it on held-out text, and write it into the file.

    One goal: --bits, --memory or --max-kld. The default is 6 bits: three eighths of f16's memory, well below
    q8_0's 8.5, and above the 4.5 to 5.5 at which many models lose more than they save.
    """
    from . import api
    from .output import output as place
    from .report import outcome_json, outcome_text, tasks_json, tasks_text

    api.check_packages()
    options = options_of(model, **given)
    to = place(model, output, reads=_texts(options), force=force)
    if tasks is not None:
        api.check_tasks(model, tasks, seed=options.seed)
    if report:
        from .output import check_page
        from .page import check_plotly

        check_plotly()
        check_page(report, reads=[model, *_texts(options), *([output] if output else [])], force=force)
    with told_what_is_kept():
        outcome = api.calibrate(options, Terminal())
    written = written_to(to, outcome.plan, _recovery(ctx))
    answered = None
    if tasks is not None:
        with told_what_is_kept():
            answered = api.evaluate_tasks(
                model,
                {"plan": outcome.plan},
                tasks,
                Terminal(),
                n_ctx=options.n_ctx,
                seed=options.seed,
                n_threads=options.n_threads,
                n_gpu_layers=options.n_gpu_layers,
            )
    if report:
        from .page import save_page

        save_page(report, model, outcome, api.solve(options), answered)
        note(f"report: {report}")
    if as_json:
        print_json(outcome_json(outcome, written) | ({"tasks": tasks_json(answered)} if answered else {}))
    else:
        show("\n\n".join([outcome_text(outcome, written), *([tasks_text(answered)] if answered else [])]))


@click.command(cls=ModelFirst)
@click.argument("model", type=MODEL)
@click.option(
    "-o", "--output", type=FILE, help="Write the plan: a new GGUF, or with .json a sidecar. Default: show it only."
)
@click.option(
    "--csv",
    "as_csv",
    type=click.Choice(["front", "sensitivities"]),
    help="Print CSV: the front, or what each side of each layer in each type adds to the KLD.",
)
@shared("bits", "memory", "kld", "types", "mean", "scale", "basis", "c", "f", "chunks", "seed", "ngl", "force", "json")
def solve(model: Path, output: Path | None, force: bool, as_csv: str | None, as_json: bool, **given: Any) -> None:
    """Find another plan by what `calibrate` measured of MODEL, in seconds and without a run.

    The goal is as in `calibrate`; the other options must be as they were there. The KLDs are predicted, on the text of
    the search: `kvtuner-gguf evaluate` measures them.
    """
    from . import api
    from .output import output as place
    from .report import csv_text, solved_json, solved_text

    api.check_packages()
    if as_csv and as_json:
        raise click.UsageError("give one of --csv and --json.")
    options = options_of(model, **given)
    to = None if output is None else place(model, output, reads=_texts(options), force=force)
    solved = api.solve(options, Terminal())
    written = None if to is None else written_to(to, solved.plan)
    if as_csv:
        show(csv_text(getattr(solved, as_csv)), nl=False)
    elif as_json:
        print_json(solved_json(solved, written))
    else:
        show(solved_text(solved, written))


def options_of(model: Path, **given: Any) -> Options:
    from .api import Options, WithinBits, WithinBytes, WithinKld
    from .codecs import codec

    kinds = {"bits": WithinBits, "memory": WithinBytes, "max_kld": WithinKld}
    asked = [kind(value) for name, kind in kinds.items() if (value := given.pop(name, None)) is not None]
    if len(asked) > 1:
        raise click.UsageError("give one goal: --bits, --memory or --max-kld.")
    if asked:
        given["goal"] = asked[0]
    if given.get("method") == "paper" and isinstance(given.get("goal"), WithinKld):
        raise click.UsageError("--method paper searches within --bits or --memory, not for --max-kld.")
    names = given.pop("types", None)
    types = tuple(codec(t.strip()).name for t in (names or "").split(",") if t.strip())
    if names is not None and not types:
        raise click.BadParameter("names no type. Write for example q8_0,q4_0.", param_hint="--types")
    return Options(model, types=types, n_threads=given.pop("threads", None), **given)


def _texts(options: Options) -> list[Path]:
    return [options.text] if options.text else []


@contextmanager
def told_what_is_kept() -> Iterator[None]:
    """Tells who ends the block early that nothing is lost."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        note("stopped; what was measured is kept, and the same command goes on with it")
        raise


def _recovery(ctx: click.Context) -> str:
    """What to run when all is measured and the plan cannot be written."""
    args = [arg for arg in ctx.find_root().obj if arg != "--fresh"]
    command = shlex.join(["kvtuner-gguf", *args, "-o", "ELSEWHERE"])
    return f"What was measured is kept: this writes the plan elsewhere without measuring again: {command}"


@click.command(cls=ModelFirst)
@click.argument("model", type=MODEL)
@click.argument("plans", nargs=-1, required=True)
@click.option("-ctk", "--cache-type-k", "type_k", help="One more row: this K type for all layers ...")
@click.option("-ctv", "--cache-type-v", "type_v", help="... with this V type.")
@click.option(
    "--tasks",
    help="Ask these tasks instead: JSON Lines of prompts with expected answers, or a set of ours: short, or long:N "
    "with N tokens in each prompt.",
)
@shared("fresh", "c", "f", "chunks", "seed", "t", "ngl", "json")
@click.pass_context
def evaluate(
    ctx: click.Context,
    /,
    plans: tuple[str, ...],
    type_k: str | None,
    type_v: str | None,
    tasks: str | None,
    fresh: bool,
    as_json: bool,
    **given: Any,
) -> None:
    """Measure the KLD of PLANS on MODEL against an f16 cache, or, with --tasks, how many tasks they answer right.

    Each of PLANS is 'file' (the plan in the model), a sidecar (.json), another GGUF's plan, or a uniform pair such as
    q8_0/q4_0.
    """
    from . import api
    from .report import comparison_json, comparison_text, tasks_json, tasks_text

    api.check_packages()
    model, n_threads = given.pop("model"), given.pop("threads")
    named = {name: _plan_named(name, model) for name in plans}
    if type_k or type_v:
        pair = Pair(type_k or "f16", type_v or "f16")
        named[str(pair)] = pair
    if tasks is not None:
        text = [name for name in ("text", "n_chunk") if _is_given(ctx, name)]
        if text:
            raise click.UsageError("--tasks brings its own text: leave -f and --chunks out.")
        del given["text"], given["n_chunk"]
        with told_what_is_kept():
            answered = api.evaluate_tasks(model, named, tasks, Terminal(), n_threads=n_threads, fresh=fresh, **given)
        if as_json:
            print_json(tasks_json(answered))
        else:
            show(tasks_text(answered))
        return
    if fresh:
        raise click.UsageError("--fresh is for --tasks: nothing else is kept.")
    comparison = api.evaluate(model, named, Terminal(), n_threads=n_threads, **given)
    if as_json:
        print_json(comparison_json(comparison))
    else:
        show(comparison_text(comparison))


@click.command(cls=ModelFirst)
@click.argument("model", type=MODEL)
@click.argument("pairs", nargs=-1)
@shared("c", "f", "seed", "t", "ngl", "json")
def verdict(model: Path, pairs: tuple[str, ...], threads: int | None, as_json: bool, **given: Any) -> None:
    """Tell in a minute or two which cache types MODEL bears: safe, visible or broken.

    Measured is the KLD of PAIRS such as q4_0/q4_0, each until it is clear; without any of q8_0/q8_0, q8_0/q4_0,
    q5_1/q5_1, q4_0/q4_0 and of the plan in the file or beside it.
    """
    from . import api
    from .report import verdict_json, verdict_text

    asked = [Pair.parse(name) for name in pairs]
    found = api.verdict(model, Terminal(), pairs=asked, n_threads=threads, **given)
    if as_json:
        print_json(verdict_json(found))
    else:
        show(verdict_text(found, model))


def _is_given(ctx: click.Context, name: str) -> bool:
    return ctx.get_parameter_source(name) is not click.core.ParameterSource.DEFAULT


def _plan_named(name: str, model: Path) -> Plan | Pair:
    if name == "file" or name.endswith(".gguf"):
        return plan_in(model if name == "file" else Path(name))
    if name.endswith(".json"):
        return Plan.load(name)
    return Pair.parse(name)
