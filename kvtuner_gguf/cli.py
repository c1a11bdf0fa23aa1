"""The kvtuner-gguf command: parse, call one function, print."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import __version__
from .arguments import FILE, MODEL, FiniteFloat, shared
from .errors import MOST_CHARACTERS, KvtunerError, PlanError
from .interrupts import orderly
from .kept import KINDS
from .pair import Pair
from .plan import Plan
from .printable import printable
from .room import NO_ROOM
from .terminal import Terminal, note, print_json, show, show_json, show_path

if TYPE_CHECKING:
    from .api import Options
    from .llama import Llama
    from .output import Output


class Commands(click.Group):
    """Turns a KvtunerError into `Error: ...` and exit 1, in this one place. No text of others goes out unprintable, no
    signal ends a write midway."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        with orderly():
            return super().main(*args, **kwargs)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.obj = list(args)  # as typed: what a failure at the end tells to run
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KvtunerError as error:
            raise click.ClickException(printable(error, MOST_CHARACTERS)) from None
        except click.ClickException as error:
            error.message = printable(error.message, MOST_CHARACTERS, keep="\n")  # type: ignore[misc] # no other way
            raise
        except OSError as error:  # every write says more than this; a disk can fill up at any other place, too
            if error.errno not in NO_ROOM:
                raise
            raise click.ClickException(
                printable(f"{error.filename or 'a file'}: {error.strerror}. Make room, and run the command again.")
            ) from None


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="kvtuner-gguf")
def main() -> None:
    """Choose a K and a V cache type for each layer of a GGUF model, by measuring it, and run it with that plan."""


@main.command()
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
    help="Real runs of the search. [default: two per layer and about 24 more; paper 100]",
)
@shared("types", "mean", "scale", "basis")
@shared("fresh", "c", "f", "chunks", "seed", "t", "ngl", "force", "json")
@click.pass_context
def calibrate(
    ctx: click.Context, /, model: Path, output: Path | None, force: bool, as_json: bool, **given: Any
) -> None:
    """Measure MODEL, find its plan, prove it on held-out text, and write it into the file.

    One goal: --bits, --memory or --max-kld. The default is 6 bits: three eighths of f16's memory, well below
    q8_0's 8.5, and above the 4.5 to 5.5 at which many models lose more than they save.
    """
    from . import api
    from .output import output as place
    from .report import outcome_json, outcome_text

    api.check_packages()
    options = _options(model, **given)
    to = place(model, output, reads=_texts(options), force=force)
    with _kept():
        outcome = api.calibrate(options, Terminal())
    written = _written(to, outcome.plan, _recovery(ctx))
    if as_json:
        print_json(outcome_json(outcome, written))
    else:
        show(outcome_text(outcome, written))


@main.command()
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
    options = _options(model, **given)
    to = None if output is None else place(model, output, reads=_texts(options), force=force)
    solved = api.solve(options, Terminal())
    written = None if to is None else _written(to, solved.plan)
    if as_csv:
        show(csv_text(getattr(solved, as_csv)), nl=False)
    elif as_json:
        print_json(solved_json(solved, written))
    else:
        show(solved_text(solved, written))


def _options(model: Path, **given: Any) -> Options:
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


def _written(to: Output, plan: Plan | None, recovery: str = "") -> Path:
    """Where the plan now stands."""
    path = to.write(plan, recovery)
    for text in to.notes:
        note(f"note: {text}")
    return path


@contextmanager
def _kept() -> Iterator[None]:
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


@main.command("show")
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


@main.command()
@click.argument("plans", nargs=-1, required=True)
@click.option("-ctk", "--cache-type-k", "type_k", help="One more row: this K type for all layers ...")
@click.option("-ctv", "--cache-type-v", "type_v", help="... with this V type.")
@click.option(
    "--tasks",
    help="Ask these tasks instead: JSON Lines of prompts with expected answers, or a set of ours: short, or long:N "
    "with N tokens in each prompt.",
)
@shared("fresh", "m", "c", "f", "chunks", "seed", "t", "ngl", "json")
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
    """Measure the KLD of PLANS against an f16 cache, or, with --tasks, how many tasks they answer right.

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
        with _kept():
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


@main.command()
@click.argument("model", type=MODEL)
@shared("c", "f", "seed", "t", "ngl", "json")
def verdict(model: Path, threads: int | None, as_json: bool, **given: Any) -> None:
    """Tell in a minute or two which usual cache types MODEL bears: safe, visible or broken.

    Measured is the KLD of q8_0/q8_0, q8_0/q4_0, q5_1/q5_1, q4_0/q4_0 and of the plan in the file, each until it is
    clear.
    """
    from . import api
    from .report import verdict_json, verdict_text

    found = api.verdict(model, Terminal(), n_threads=threads, **given)
    if as_json:
        print_json(verdict_json(found))
    else:
        show(verdict_text(found, model))


def _is_given(ctx: click.Context, name: str) -> bool:
    return ctx.get_parameter_source(name) is not click.core.ParameterSource.DEFAULT


def _plan_named(name: str, model: Path) -> Plan | Pair:
    if name == "file" or name.endswith(".gguf"):
        return _plan_in(model if name == "file" else Path(name))
    if name.endswith(".json"):
        return Plan.load(name)
    return Pair.parse(name)


def _plan_in(model: Path) -> Plan:
    from .gguf_file import read_plan

    plan = read_plan(model)
    if plan is None:
        raise PlanError(f"{model}: holds no plan. Make one with: kvtuner-gguf calibrate {model}")
    return plan


@main.command()
@click.argument("model", type=MODEL)
@click.argument("plan_file", type=MODEL)
@click.option("-o", "--output", type=FILE, help="Write a new GGUF. Default: into MODEL itself.")
@shared("force")
def apply(model: Path, plan_file: Path, output: Path | None, force: bool) -> None:
    """Write the plan of a sidecar, PLAN_FILE, into MODEL."""
    from .output import gguf

    plan = Plan.load(plan_file)
    show(f"Written to {_written(gguf(model, output, reads=[plan_file], force=force), plan)}")


@main.command()
@click.argument("model", type=MODEL)
@click.option("-o", "--output", type=FILE, help="Write a new GGUF. Default: change MODEL itself.")
@shared("force")
def strip(model: Path, output: Path | None, force: bool) -> None:
    """Take the plan out of MODEL; what remains is the file as it was before."""
    from .output import gguf

    show(f"Written to {_written(gguf(model, output, force=force), None)}")


@main.command()
@click.argument("model", type=MODEL)
@click.option("-o", "--output", type=FILE, help="Sidecar to write. Default: standard output.")
@shared("force")
def export(model: Path, output: Path | None, force: bool) -> None:
    """Copy the plan of MODEL into a sidecar."""
    from .output import sidecar

    plan = _plan_in(model)
    if output is None:
        show_json(plan.to_json())
    else:
        show(f"Written to {_written(sidecar(output, reads=[model], force=force), plan)}")


@main.command()
@click.option(
    "--clear", type=click.Choice([*KINDS, "model", "all"]), help="Remove what is kept of this kind, or all of it."
)
@shared("json")
def cache(clear: str | None, as_json: bool) -> None:
    """List what is kept: measurements of calibrations, answers to tasks, the fetched default model."""
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


@main.command("lib-dir")
def show_lib_dir() -> None:
    """Print the folder of the patched libraries: LLAMA_CPP_LIB_PATH for a program on llama-cpp-python that does not
    import us."""
    from . import native

    show_path(native.lib_dir())


@main.command()
@click.option("-p", "--prompt", help="Answer this and exit.")
@click.option("--system", help="System message.")
@click.option("--plan", "plan_file", type=MODEL, help="A sidecar to use instead of the plan in the file.")
@click.option("--no-plan", is_flag=True, help="Run without a plan, on an f16 cache.")
@click.option("-ctk", "--cache-type-k", "type_k", help="One K type for all layers, whatever the plan says.")
@click.option("-ctv", "--cache-type-v", "type_v", help="One V type for all layers, whatever the plan says.")
@click.option(
    "-n", "--predict", "max_tokens", type=click.IntRange(1), help="Most tokens of an answer. Default: what fits."
)
@click.option(
    "--temp",
    "temperature",
    default=0.7,
    show_default=True,
    type=FiniteFloat(0),
    help="Temperature; 0 takes the likeliest token.",
)
@shared("m", "c", "t", "ngl")
def chat(prompt: str | None, system: str | None, max_tokens: int | None, temperature: float, **given: Any) -> None:
    """Chat with a model under its plan. /reset forgets the conversation, /exit ends it."""
    from .chat import answer, chat_loop, utf8

    system = system and utf8(system)
    llm = _open_llama(**given)
    note(_memory_line(llm))

    def write(piece: str) -> None:
        show(piece, nl=False)

    if prompt is not None:
        messages = [{"role": "system", "content": system}] if system else []
        for piece in answer(
            llm,
            [*messages, {"role": "user", "content": utf8(prompt)}],
            max_tokens=max_tokens,
            temperature=temperature,
            say=note,
        ):
            write(piece)
        show("")
    else:
        if hasattr(sys.stdin, "reconfigure"):
            sys.stdin.reconfigure(errors="replace")  # a line that is no UTF-8 is no reason to end
        chat_loop(llm, _read_line, write, system=system, max_tokens=max_tokens, temperature=temperature)
    llm.close()


def _open_llama(
    model: Path,
    plan_file: Path | None = None,
    no_plan: bool = False,
    n_ctx: int = 8192,
    threads: int | None = None,
    n_gpu_layers: int = 0,
    type_k: str | None = None,
    type_v: str | None = None,
) -> Llama:
    from .in_force import asked_plan
    from .llama import Llama
    from .template import TemplateError, template_error
    from .threads import default_threads

    plan = asked_plan(False if no_plan else plan_file)
    try:
        return Llama(
            str(model),
            plan=plan,
            n_ctx=n_ctx,
            n_threads=threads or default_threads(),
            n_gpu_layers=n_gpu_layers,
            type_k=type_k,
            type_v=type_v,
            verbose=False,
        )
    except TemplateError as error:
        raise template_error(error, f"model '{model}'") from None
    except ValueError as error:
        raise KvtunerError(f"model '{model}' at {n_ctx} tokens: {error}. Check the file, the types, and -c.") from None


def _memory_line(llm: Llama) -> str:
    from .report import MIB

    pairs = sorted({str(p) for p in llm.plan.pairs if p.type_k})
    notes = "".join(f"\nnote: {n}" for n in llm.plan_notes)
    return (
        f"K/V cache: {llm.kv_bytes / MIB:.1f} MiB at {llm.n_ctx()} tokens, {len(pairs)} pairs: "
        f"{', '.join(pairs)}{notes}"
    )


def _read_line() -> str | None:
    try:
        return input("> ")
    except EOFError:
        return None


@main.command()
@click.option(
    "--trials",
    "n_trials",
    default=None,
    type=click.IntRange(8, 10000),
    help="Real runs of the search. [default: two per layer and about 24 more]",
)
@click.option(
    "-o", "--output", type=FILE, default="SmolLM2-135M-Instruct.kvtuner.gguf", show_default=True, help="GGUF to write."
)
@shared("seed", "t", "force")
def demo(n_trials: int | None, output: Path, seed: int, threads: int | None, force: bool) -> None:
    """Do it all on the default small model: fetch, calibrate, write, and chat under the plan."""
    from . import api
    from .default_model import default_model
    from .output import gguf
    from .report import outcome_text

    start = time.monotonic()
    note("the default small model, which is fetched the first time ...")
    api.check_packages()
    model = default_model()
    to = gguf(model, output, force=force)
    with _kept():
        outcome = api.calibrate(_options(model, seed=seed, n_trials=n_trials, threads=threads), Terminal())
    show(outcome_text(outcome, _written(to, outcome.plan)))
    question = "What is a key-value cache good for? Answer in two sentences."
    llm = _open_llama(output, threads=threads)
    from .chat import answer

    show(f"\n{_memory_line(llm)}\n> {question}")
    show("".join(answer(llm, [{"role": "user", "content": question}], max_tokens=120, temperature=0.0)))
    llm.close()
    show(f"\n{time.monotonic() - start:.0f} s in all, peak memory {_peak_mib():.0f} MiB")


def _peak_mib() -> float:
    """Peak memory of this process, in MiB; 0 where the system does not tell."""
    try:
        import resource
    except ImportError:
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1024 * 1024 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    main()
