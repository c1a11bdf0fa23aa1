"""The commands that run a model: chat, serve, demo."""

from __future__ import annotations

import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .arguments import FILE, MODEL, FiniteFloat, ModelFirst, shared
from .cli_files import written_to
from .cli_measure import options_of, told_what_is_kept
from .errors import KvtunerError
from .terminal import Terminal, note, show

if TYPE_CHECKING:
    from .llama import Llama


@click.command(cls=ModelFirst)
@click.argument("model", type=MODEL)
@click.option("-p", "--prompt", help="Answer this and exit.")
@click.option("--system", help="System message.")
@shared("plan", "no-plan")
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
@click.option("--top-k", default=40, show_default=True, type=click.IntRange(0), help="Of so many tokens; 0 = of all.")
@click.option("--top-p", default=0.95, show_default=True, type=FiniteFloat(0, 1), help="Of so much probability.")
@click.option("--min-p", default=0.05, show_default=True, type=FiniteFloat(0, 1), help="Beside the likeliest one's.")
@click.option("--repeat-penalty", default=1.0, show_default=True, type=FiniteFloat(0), help="1 is none.")
@click.option("-s", "--seed", type=click.IntRange(0, 2**32 - 1), help="Of what is drawn. Default: another each time.")
@shared("c", "t", "ngl")
def chat(prompt: str | None, system: str | None, **given: Any) -> None:
    """Chat with MODEL under its plan. /help lists what can be said beside questions; Ctrl-C stops an answer."""
    from .chat import answer, chat_loop, utf8

    names = ("max_tokens", "temperature", "top_k", "top_p", "min_p", "repeat_penalty", "seed")
    sampling = {name: given.pop(name) for name in names}

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
            say=note,
            **sampling,
        ):
            write(piece)
        show("")
    else:
        if hasattr(sys.stdin, "reconfigure"):
            sys.stdin.reconfigure(errors="replace")  # a line that is no UTF-8 is no reason to end
        with suppress(ImportError):
            import readline  # input() then has a history, and lines can be edited

            readline.parse_and_bind("set enable-bracketed-paste on")  # what is pasted is one message; Python's is off
        chat_loop(llm, _read_line, write, system=system, **sampling)
    llm.close()


@click.command(cls=ModelFirst)
@click.argument("model", type=MODEL)
@click.argument("extra", nargs=-1, metavar="[-- LLAMA_SERVER_OPTIONS]")
@shared("plan", "no-plan")
@click.option(
    "--host", default="127.0.0.1", show_default=True, help="Address to listen at; others than this need a key."
)
@click.option("--port", default=8080, show_default=True, type=click.IntRange(0, 65535), help="0: one that is free.")
@click.option(
    "--api-key", envvar="LLAMA_API_KEY", show_envvar=True, help="Key that requests must bring, as OpenAI's clients do."
)
@click.option(
    "-np",
    "--parallel",
    "n_parallel",
    default=4,
    show_default=True,
    type=click.IntRange(1, 256),
    help="Requests that are answered at once; they share the context.",
)
@click.option(
    "--slot-save-path",
    "slots",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder that slots are saved to and restored from (POST /slots/0?action=save).",
)
@click.option("-v", "--verbose", is_flag=True, help="Show what llama-server logs.")
@shared("c", "t", "ngl")
def serve(
    model: Path,
    plan_file: Path | None,
    no_plan: bool,
    extra: tuple[str, ...],
    n_ctx: int,
    threads: int | None,
    **given: Any,
) -> None:
    """Serve MODEL under its plan to OpenAI's clients, by the patched llama-server. Ctrl-C ends it."""
    if extra and not extra[0].startswith("-"):
        raise click.UsageError(f"Got unexpected extra argument ({extra[0]}).")
    from .serve import Server

    plan = False if no_plan else plan_file
    options = {"plan": plan, "n_ctx": n_ctx, "n_threads": threads, "extra": extra, "say": note, **given}
    with suppress(KeyboardInterrupt), Server(model, **options) as server:
        server.watch()


@click.command(name="rpc-server")
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    help="Address to listen at. No key is asked for: everyone who reaches another one is let into the process.",
)
@click.option("--port", default=50052, show_default=True, type=click.IntRange(0, 65535), help="0: one that is free.")
@click.option("-t", "--threads", type=click.IntRange(1), help="Threads. Default: all processors this process may use.")
@click.option("--cache", "keep", is_flag=True, help="Keep large tensors in the cache folder: a model is sent once.")
def rpc_server(host: str, port: int, threads: int | None, keep: bool) -> None:
    """Hold layers of other machines' models, with their caches, and compute them: for commands with --rpc.

    One client after another. Ctrl-C ends it.
    """
    import signal

    from . import rpc
    from .cache import open_cache
    from .kept import RPC
    from .ports import LOOPBACK

    if host not in LOOPBACK:
        note(
            f"note: {host} is reached by other machines. The protocol has no key; use it in networks of your own alone"
        )
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)  # C does not come back to let Python handle it
    rpc.serve(host, port, n_threads=threads, cache=open_cache() / RPC if keep else None)


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
        return input("> " if sys.stdin.isatty() else "")
    except EOFError:
        return None


@click.command()
@click.option(
    "--trials",
    "n_trials",
    default=None,
    type=click.IntRange(8, 10000),
    help="Real runs of the search. [default: two per layer and about 20 more]",
)
@click.option(
    "-o", "--output", type=FILE, default="SmolLM2-135M-Instruct.kvtuner.gguf", show_default=True, help="GGUF to write."
)
@shared("fresh", "seed", "t", "force")
def demo(n_trials: int | None, output: Path, fresh: bool, seed: int, threads: int | None, force: bool) -> None:
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
    with told_what_is_kept():
        outcome = api.calibrate(
            options_of(model, fresh=fresh, seed=seed, n_trials=n_trials, threads=threads), Terminal()
        )
    show(outcome_text(outcome, written_to(to, outcome.plan)))
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
