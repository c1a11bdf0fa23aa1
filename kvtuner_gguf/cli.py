"""The kvtuner-gguf command: its commands, and how one ends. A command parses, calls one function, and prints."""

from __future__ import annotations

from typing import Any

import click

from . import __version__, cli_chat, cli_files, cli_measure
from .errors import MOST_CHARACTERS, KvtunerError
from .interrupts import orderly
from .printable import printable
from .room import NO_ROOM
from .terminal import show


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


def _show_version(ctx: click.Context, _option: click.Parameter, is_asked: bool) -> None:
    if is_asked and not ctx.resilient_parsing:
        from .native import LLAMA_CPP_COMMIT

        show(f"kvtuner-gguf {__version__}, llama.cpp {LLAMA_CPP_COMMIT}")
        ctx.exit()


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_show_version, help="Show versions."
)
def main() -> None:
    """Choose a K and a V cache type for each layer of a GGUF model, by measuring it, and run it with that plan."""


for module in (cli_measure, cli_files, cli_chat):
    for command in vars(module).values():
        if isinstance(command, click.Command):
            main.add_command(command)

if __name__ == "__main__":
    main()
