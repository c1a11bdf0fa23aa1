"""What a calibration tells of itself while it runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
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


OWN_WEIGHTS = "own weights"  # the stages after a proof on a copy

# the stages of a calibration by how their titles start, and the seconds that they took on SmolLM2-135M with two cores:
# what is left is told by these shares, until others are told
STAGES = (
    ("text", 17),
    ("capture", 7),
    ("condition", 12),
    ("error", 7),
    ("search: f16", 2),
    ("search: price", 33),
    ("search: best", 14),
    ("search: uniform", 6),
    ("heldout", 3),
    ("prove", 23),
    ("own weights: f16", 5),
    ("own weights: noise", 10),
)
PAPER_STAGES = (*STAGES[:5], ("search: real runs", 65), *STAGES[7:])
_LEAST_S = 5.0  # of work, from which on it tells what is left


class Staged:
    """Numbers the stages of a work, and tells from the second on how long the rest may take.

    stages  how the title of each starts, and its usual share of the time; one that is passed over takes none
    """

    def __init__(self, progress: Progress, stages: Sequence[tuple[str, float]]) -> None:
        self._progress, self._stages = progress, stages
        self._seconds = self._shares = 0.0  # of the stages so far

    @contextmanager
    def bar(self, title: str, total: int) -> Iterator[Advance]:
        """The same, its title numbered."""
        at = next((i for i, (name, _) in enumerate(self._stages) if title.startswith(name)), None)
        if at is None:
            with self._progress.bar(title, total) as advance:
                yield advance
            return
        start = time.monotonic()
        with self._progress.bar(f"[{at + 1}/{len(self._stages)}] {title}{self._left(at)}", total) as advance:
            yield advance
        self._seconds += time.monotonic() - start
        self._shares += self._stages[at][1]

    def expect(self, seconds: Mapping[str, float]) -> None:
        """How long the stages of these names may take, before the first has begun."""
        self._stages = [(name, seconds.get(name, share)) for name, share in self._stages]

    def without(self, name: str) -> None:
        """The stages of this name do not come."""
        self._stages = [s for s in self._stages if not s[0].startswith(name)]

    def say(self, text: str) -> None:
        """The same."""
        self._progress.say(text)

    def _left(self, at: int) -> str:
        """How long this stage and all after it may take."""
        if self._seconds < _LEAST_S or not self._shares:
            return ""
        seconds = self._seconds / self._shares * sum(share for _, share in self._stages[at:])
        return f" ({about(seconds)} left in all)"


def about(seconds: float) -> str:
    """A duration, as roughly as it is known."""
    if seconds < 90:
        return f"about {max(10, 10 * round(seconds / 10))} s"
    if seconds < 5400:
        return f"about {round(seconds / 60)} min"
    return f"about {seconds / 3600:.1f} h"
