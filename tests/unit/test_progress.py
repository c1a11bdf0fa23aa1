"""What a long command tells of itself: its stages, what is left, and that it lives."""

from __future__ import annotations

import re
from contextlib import contextmanager
from pathlib import Path

import pytest

from kvtuner_gguf import terminal
from kvtuner_gguf.calibrate import pipeline, progress
from kvtuner_gguf.calibrate.progress import PAPER_STAGES, STAGES, Staged, about
from kvtuner_gguf.terminal import Terminal


class Titles:
    def __init__(self):
        self.titles, self.done = [], 0

    @contextmanager
    def bar(self, title, total):
        self.titles.append(title)
        yield self.add

    def add(self, n):
        self.done += n

    def say(self, text):
        self.titles.append(text)


@pytest.fixture
def clock(monkeypatch):
    """What time it is, for progress and terminal."""
    now = [100.0]
    for module in (progress, terminal):
        monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def test_stages_are_numbered_and_what_is_left_is_told_by_their_shares(clock):
    seen = Titles()
    staged = Staged(seen, (("a", 10), ("b", 10), ("c", 30), ("d", 10)))
    for title, seconds in (("a one", 20.0), ("other", 1000.0), ("c three", 60.0), ("d four", 1.0)):
        with staged.bar(title, 5) as advance:
            advance(5)
            clock[0] += seconds
    staged.say("a word")
    assert seen.titles == [
        "[1/4] a one",
        "other",
        "[3/4] c three (about 80 s left in all)",
        "[4/4] d four (about 20 s left in all)",
        "a word",
    ]
    assert seen.done == 20


def test_what_is_left_is_told_by_the_seconds_that_are_expected(clock):
    """One stage took twice as long as was said, so the other two may as well; one that takes no time tells nothing."""
    seen = Titles()
    staged = Staged(seen, (("a", 1), ("b", 1), ("c", 1), ("d", 1)))
    staged.expect({"a": 0, "b": 20, "c": 30, "d": 90})
    for title in "abc":
        with staged.bar(title, 1):
            clock[0] += 0 if title == "a" else 40
    assert seen.titles == ["[1/4] a", "[2/4] b", "[3/4] c (about 4 min left in all)"]


def test_a_start_too_short_tells_nothing(clock):
    seen = Titles()
    staged = Staged(seen, (("a", 1), ("b", 1)))
    for title in ("a", "b"):
        with staged.bar(title, 1):
            clock[0] += 1.0
    assert seen.titles == ["[1/2] a", "[2/2] b"]


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(2, "about 10 s"), (84, "about 80 s"), (90, "about 2 min"), (3000, "about 50 min"), (9000, "about 2.5 h")],
)
def test_a_duration_is_told_roughly(seconds, said):
    assert about(seconds) == said


@pytest.mark.parametrize("stages", [STAGES, PAPER_STAGES])
def test_every_stage_is_one_that_the_code_shows(stages):
    """A title that changes must not lose its number."""
    folder = Path(pipeline.__file__).parent
    titles = [
        title
        for name in ("text", "measured", "methods", "pipeline", "proof")
        for title in re.findall(r'(?:\.bar\(|title: str = |title=)"([^"]+)"', (folder / f"{name}.py").read_text())
    ]
    assert len(titles) == 13 and all(any(t.startswith(name) for t in titles) for name, _ in stages)


def test_a_log_gets_a_line_at_the_start_at_the_end_and_now_and_then(clock, monkeypatch):
    lines = []
    monkeypatch.setattr(terminal, "note", lines.append)
    monkeypatch.setattr(terminal.sys.stderr, "isatty", lambda: False, raising=False)
    with Terminal().bar("work", 10) as advance:
        for _ in range(4):
            clock[0] += 16.0
            advance(2)
        clock[0] += 16.0
    assert lines == ["work ...", "work: 40 %, 32 s, 48 s to go", "work: 80 %, 64 s, 16 s to go", "work: 80 s"]
