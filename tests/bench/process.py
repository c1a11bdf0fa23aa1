"""Builds of ggml's libraries in processes of their own, as two cannot be loaded into one, and what they time."""

from __future__ import annotations

import argparse
import json
import os
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


def parser_of_sweeps(what: str | None, pairs: str, depths: str, rounds: int) -> argparse.ArgumentParser:
    """With a model, the builds that run it, and what they run."""
    parser = argparse.ArgumentParser(description=what, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--pairs", default=pairs)
    parser.add_argument("--first-pairs", help="pairs that the first build runs; by default all")
    parser.add_argument("--depths", default=depths)
    parser.add_argument("--rounds", type=int, default=rounds)
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


def in_turns(builds: Sequence[Process], question: Any, rounds: int) -> list[list[Any]]:
    """The answers of each build, which are asked one after the other in each round; [] of one that answers null."""
    answers = [[build.ask(question) for build in builds] for _ in range(rounds)]
    return [[one for one in of_build if one is not None] for of_build in zip(*answers)]


def median_time(calls: Sequence[Callable[[], object]], seconds: float) -> float:
    """Seconds of a call, the calls in turns for so long in all."""
    times: list[float] = []
    while sum(times) < seconds or len(times) < 5:
        for call in calls:
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
    return median(times)


def llama_bench(folder: Path, model: Path, pair: str, depth: int, n_threads: int, tests: list[str]) -> dict[str, float]:
    """Test -> tokens per second, of one run of a build's llama-bench. tests: its options, as -p 512 -n 32"""
    k, v = pair.split("/")
    options = ("-fa", 1, "-ctk", k, "-ctv", v, "-d", depth, "-t", n_threads, "-r", 1, "-o", "jsonl")
    command = [folder / "llama-bench", "-m", model, *options, *tests]
    env = {**os.environ, "LD_LIBRARY_PATH": str(folder)}
    run = subprocess.run(list(map(str, command)), env=env, capture_output=True, text=True, check=True)
    runs = [json.loads(line) for line in run.stdout.splitlines()]
    return {f"pp{r['n_prompt']}" if r["n_prompt"] else f"tg{r['n_gen']}": r["avg_ts"] for r in runs}


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    first, *others = [f"| {' | '.join(cells)} |" for cells in (head, *rows)]
    return "\n".join([first, "|---" * len(head) + "|", *others])
