"""What a calibration tells of itself while it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

Advance = Callable[[int], None]  # so many more are done


class Progress(Protocol):
    """Whoever shows it: a terminal, an app's window."""

    def bar(self, title: str, total: int) -> AbstractContextManager[Advance]:
        """A step of so many parts begins; it ends with the block."""

    def say(self, text: str) -> None:
        """One line."""


class Silent:
    """Shows nothing."""

    @contextmanager
    def bar(self, title: str, total: int) -> Iterator[Advance]:
        """Takes what is done, and drops it."""
        yield lambda n: None

    def say(self, text: str) -> None:
        """Drops the line."""
