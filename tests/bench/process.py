"""Builds of ggml's libraries in processes of their own, as two cannot be loaded into one, and what they time."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any


def parser_of_builds(what: str | None) -> argparse.ArgumentParser:
    """With the folders of the builds, and the threads that they work with."""
    parser = argparse.ArgumentParser(description=what, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--threads", type=int, default=2)
    return parser


class Process:
    """A script that answers each line of JSON with another."""

    def __init__(self, script: str, *args: object) -> None:
        command = [sys.executable, script, *map(str, args)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, value: Any) -> Any:
        self._process.stdin.write(json.dumps(value) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()


def median_time(calls: Sequence[Callable[[], object]], seconds: float) -> float:
    """Seconds of a call, the calls in turns for so long in all."""
    times: list[float] = []
    while sum(times) < seconds or len(times) < 5:
        for call in calls:
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
    return median(times)
