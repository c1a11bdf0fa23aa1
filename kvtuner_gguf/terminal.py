"""What the commands show: results on standard output, progress on standard error."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import click

from .errors import KvtunerError
from .printable import json_printable, printable

BEAT_S = 30.0  # between two lines of a log that tell how far a step is


def show(text: str, *, nl: bool = True) -> None:
    """Lines to standard output. Raises KvtunerError if they cannot be written, for example to a full disk."""
    _write(printable(text, sys.maxsize, keep="\n\t"), nl)


def show_json(text: str) -> None:
    """JSON to standard output, as it is but for what would act on a terminal. Raises KvtunerError as `show`."""
    _write(json_printable(text), False)


def show_path(path: Path) -> None:
    """A path to standard output byte for byte, for a program to read."""
    _write(os.fsencode(path), True)


def print_json(value: Any) -> None:
    show_json(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def note(text: str) -> None:
    """Lines to standard error, on a terminal broken between words; what cannot be written there ends nothing."""
    text = printable(text, sys.maxsize, keep="\n")
    if sys.stderr.isatty():
        columns = shutil.get_terminal_size().columns
        lines = (
            textwrap.fill(line, columns, break_long_words=False, break_on_hyphens=False) for line in text.split("\n")
        )
        text = "\n".join(lines)
    with suppress(OSError):
        click.echo(text, err=True)


def _write(text: str | bytes, nl: bool) -> None:
    try:
        click.echo(text, nl=nl)
    except OSError as error:
        if error.errno == errno.EPIPE:  # the reader has seen enough, as `head` does: click ends the command
            raise
        with suppress(OSError, ValueError):  # what could not be written is tried again at the end otherwise
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise KvtunerError(
            f"standard output: cannot be written ({error.strerror}). Make room, or send it elsewhere."
        ) from None


class Terminal:
    """Progress for a person: bars on stderr, and lines."""

    def say(self, text: str) -> None:
        note(text)

    @contextmanager
    def bar(self, title: str, total: int) -> Iterator[Callable[[int], None]]:
        if not sys.stderr.isatty():  # a bar in a log file is noise
            beat = _Beat(title, total)
            yield beat.advance
            note(f"{title}: {beat.seconds():.0f} s")
            return
        columns = shutil.get_terminal_size().columns
        label = title if len(title) <= columns // 2 else f"{title[: max(8, columns // 2) - 3]}..."
        with click.progressbar(length=total, label=label, file=sys.stderr, show_pos=True, width=0) as bar:
            yield bar.update


class _Beat:
    """Lines in a log: that a step began, and, while it lasts, how far it is."""

    def __init__(self, title: str, total: int) -> None:
        self.title, self.total, self.done = title, total, 0
        self.start = self.last = time.monotonic()
        note(f"{title} ...")

    def seconds(self) -> float:
        """So far."""
        return time.monotonic() - self.start

    def advance(self, n: int) -> None:
        """So many more are done."""
        self.done += n
        now = time.monotonic()
        if now - self.last >= BEAT_S and self.done:
            self.last = now
            left = self.seconds() * (self.total - self.done) / self.done
            note(f"{self.title}: {100 * self.done / self.total:.0f} %, {self.seconds():.0f} s, {left:.0f} s to go")
