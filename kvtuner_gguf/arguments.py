"""Arguments and options that several commands have in common, in llama.cpp's words."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from .values import brief

Command = TypeVar("Command", bound=Callable[..., Any])

_HOSTS = f"{__name__}.hosts"
MODEL = click.Path(exists=True, dir_okay=False, path_type=Path)
FILE = click.Path(dir_okay=False, path_type=Path)


class FiniteFloat(click.FloatRange):
    """A number within a range that is neither nan nor infinite."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"'{value}' is not a finite number.", param, ctx)
        return number


class Tokens(click.IntRange):
    """A number of tokens: 32768, or 32k, whose k is 1024."""

    name = "tokens"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if match := re.fullmatch(r"(\d+)k", str(value), re.IGNORECASE):
            value = 1024 * int(match[1])
        return super().convert(value, param, ctx)


class Memory(click.ParamType):  # type: ignore[type-arg] # generic in click 8.5 alone
    """Bytes: 96M, 1.5GiB, 300000000. K, M and G are powers of 1024."""

    name = "bytes"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        match = re.fullmatch(r"([0-9.]+)\s*([KMGT]?)(i?B)?", str(value), re.IGNORECASE)
        try:
            if match is None:
                raise ValueError
            n_bytes = int(float(match[1]) * 1024 ** " KMGT".index(match[2].upper() or " "))
        except (ValueError, OverflowError):
            n_bytes = 0
        if not 0 < n_bytes < 2**63:
            self.fail(f"{brief(value)} is not a size. Write for example 96M or 1.5G.", param, ctx)
        return n_bytes


class ModelFirst(click.Command):
    """A command whose first argument is MODEL, which may be given as -m MODEL as well, wherever that stands."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params.append(click.Option(["-m", "--model", "as_option"], expose_value=False, help="The same as MODEL."))

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if found := self._as_option(args):
            where, model = found
            args = [*args[: where.start], *args[where.stop :]]
            args.insert(0, f"./{model}" if model.startswith("-") else model)
        return super().parse_args(ctx, args)

    def _as_option(self, args: list[str]) -> tuple[range, str] | None:
        """Where -m MODEL stands, and MODEL; None if it does not."""
        with_value = {name for p in self.params if isinstance(p, click.Option) and not p.is_flag for name in p.opts}
        at = 0
        while at < len(args) and args[at] != "--":
            if args[at] in ("-m", "--model") and at + 1 < len(args):
                return range(at, at + 2), args[at + 1]
            if joined := re.fullmatch("(?:-m|--model=)(.+)", args[at], re.DOTALL):
                return range(at, at + 1), joined[1]
            at += 2 if args[at] in with_value else 1  # what an option is given is not looked at
        return None


def _use_hosts(ctx: click.Context, _param: click.Parameter, servers: str | None) -> None:
    if servers is None or ctx.resilient_parsing:
        return
    from . import rpc

    rpc.use(servers)
    ctx.meta[_HOSTS] = rpc.ALL_LAYERS


def _layers(ctx: click.Context, _param: click.Parameter, n: int | None) -> int:
    return ctx.meta.get(_HOSTS, 0) if n is None else n


def _devices(function: Command) -> Command:
    """-ngl, and --rpc, which goes first, as -ngl then has another default."""
    function = click.option(
        "--rpc",
        metavar="HOST:PORT,...",
        is_eager=True,
        expose_value=False,
        callback=_use_hosts,
        help="Hosts that run `kvtuner-gguf rpc-server`, to hold layers with their caches.",
    )(function)
    return click.option(
        "-ngl",
        "--n-gpu-layers",
        type=click.IntRange(0),
        callback=_layers,
        help="Layers to keep on the GPU, or on the hosts of --rpc. [default: 0; with --rpc all]",
    )(function)


def shared(*names: str) -> Callable[[Command], Command]:
    """The options of these names, in this order."""
    options = {
        "c": click.option(
            "-c",
            "--ctx-size",
            "n_ctx",
            default=8192,
            show_default=True,
            type=Tokens(64),
            help="Context at which bytes are counted, in tokens: 32768, or 32k.",
        ),
        "f": click.option(
            "-f",
            "--file",
            "text",
            type=FILE,
            help="Text to measure on, .txt or .jsonl. Default: the model writes its own.",
        ),
        "t": click.option(
            "-t", "--threads", type=click.IntRange(1), help="Threads. Default: all processors this process may use."
        ),
        "ngl": _devices,
        "plan": click.option(
            "--plan", "plan_file", type=MODEL, help="A sidecar to use instead of the plan in the file."
        ),
        "no-plan": click.option("--no-plan", is_flag=True, help="Run without a plan, on an f16 cache."),
        "chunks": click.option(
            "--chunks",
            "n_chunk",
            default=4,
            show_default=True,
            type=click.IntRange(2, 1000),
            help="Pieces of text: more take longer and tell more.",
        ),
        "seed": click.option(
            "--seed",
            default=0,
            show_default=True,
            type=click.IntRange(0, 2**31 - 1),
            help="Seed of the text and the search.",
        ),
        "bits": click.option(
            "--bits", type=float, help="Goal: real bits per cached value, scales included. [default: 6]"
        ),
        "memory": click.option("--memory", type=Memory(), help="Goal: bytes of the cache at -c, for example 96M."),
        "kld": click.option(
            "--max-kld", type=float, help="Goal: the least memory whose mean KLD stays within this, in nats."
        ),
        "types": click.option(
            "--types",
            help="Cache types to choose from, comma-separated. [default: all but f32 and bf16, and q2, q3 "
            "and iq4_nl only where 64 does not divide a head; paper: q8_0,q4_0,q2_64]",
        ),
        "mean": click.option(
            "--k-mean/--no-k-mean",
            default=None,
            help="Whether K may be cached without its mean, where that helps. [default: yes; paper: no]",
        ),
        "scale": click.option(
            "--k-scale/--no-k-scale",
            default=None,
            help="Whether K may be scaled per channel, where that helps. [default: yes; paper: no]",
        ),
        "basis": click.option(
            "--k-basis/--no-k-basis",
            default=None,
            help="Whether K may be in a basis, which types of groups (k5_64 to k2_64) need, where that helps. "
            "[default: yes; paper: no]",
        ),
        "force": click.option(
            "--force",
            is_flag=True,
            help="Replace the file of -o, whatever it holds. Without it only a sidecar by a sidecar, and the same "
            "model.",
        ),
        "fresh": click.option(
            "--fresh", is_flag=True, help="Forget what was measured before, instead of going on with it."
        ),
        "json": click.option("--json", "as_json", is_flag=True, help="Print JSON."),
    }

    def decorate(function: Command) -> Command:
        for name in reversed(names):
            function = options[name](function)
        return function

    return decorate
