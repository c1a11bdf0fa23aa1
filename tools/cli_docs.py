#!/usr/bin/env python3
"""Writes docs/cli.md: what `--help` says of each command. Run it when an option has changed; a unit test compares."""

from __future__ import annotations

from pathlib import Path

import click

from kvtuner_gguf.cli import main

PAGE = Path(__file__).resolve().parents[1] / "docs/cli.md"
HEAD = """# Commands

Written by `python tools/cli_docs.py` from what `--help` says; do not edit.

Commands, options and files complete with the tab key after `eval "$(_KVTUNER_GGUF_COMPLETE=bash_source kvtuner-gguf)"`
in `~/.bashrc` (`zsh_source` in `~/.zshrc`; fish: `_KVTUNER_GGUF_COMPLETE=fish_source kvtuner-gguf | source`).
"""


def helps(command: click.Command, words: tuple[str, ...] = ("kvtuner-gguf",)) -> list[tuple[str, str]]:
    """(the command as typed, its help) of a command and of all below it, in the order in which help lists them."""
    context = click.Context(command, info_name=" ".join(words), terminal_width=110, help_option_names=["-h", "--help"])
    found = [(" ".join(words), command.get_help(context))]
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            found += helps(command.commands[name], (*words, name))
    return found


def page() -> str:
    """docs/cli.md."""
    return HEAD + "".join(f"\n## {name}\n\n```text\n{text}\n```\n" for name, text in helps(main))


if __name__ == "__main__":
    PAGE.write_text(page())
