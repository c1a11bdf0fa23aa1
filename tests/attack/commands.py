"""Our commands in processes that are forked, so that they start in no time; ended by a signal at a chosen moment, or
not.

The process that forks must run no model itself: OpenMP's threads do not survive a fork.
"""

from __future__ import annotations

import mmap
import os
import random
import resource
import signal
import struct
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import NamedTuple

import scipy.optimize
import scipy.sparse  # noqa: F401
from fault import Fault, need

import kvtuner_gguf.output
import kvtuner_gguf.report  # noqa: F401
from kvtuner_gguf import native
from kvtuner_gguf.calibrate import jobs, pipeline  # noqa: F401 - jobs: for the attacks
from kvtuner_gguf.cli import main

native.library()
pipeline.STREAM, pipeline.SEARCH_CTX = 256, 128  # a calibration in two seconds
LONGEST = 600  # seconds of a command of two, so that one on the busiest machine does not count as one that hangs


class Ended(NamedTuple):
    """code: as the shell has it, minus the signal's number for one that was ended by it. seconds: that it took."""

    code: int
    text: str
    seconds: float


class Moment(NamedTuple):
    """When a signal comes: after so many seconds, or at the n-th line of the files named."""

    number: signal.Signals
    seconds: float | None = None
    line: int = 0
    files: tuple[str, ...] = ()


def command(
    folder: Path, *args: object, moment: Moment | None = None, prepare: Callable[[], None] | None = None
) -> Ended:
    """Run it, and wait for its end. prepare: called in its process first."""
    return finish(start(folder, *args, moment=moment, prepare=prepare), moment)


class Running(NamedTuple):
    pid: int
    output: Path
    start: float


def start(
    folder: Path, *args: object, moment: Moment | None = None, prepare: Callable[[], None] | None = None
) -> Running:
    out = folder / f"output-{time.monotonic_ns()}"
    ready, told = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 70
        try:
            os.close(ready)
            _become(out)
            if prepare:
                prepare()
            if moment and moment.seconds is None:
                _trace(moment)
            os.write(told, b".")
            code = _run([str(a) for a in args])
        finally:
            os._exit(code)
    os.close(told)
    os.read(ready, 1)
    os.close(ready)
    return Running(pid, out, time.monotonic())


def finish(running: Running, moment: Moment | None = None) -> Ended:
    if moment and moment.seconds is not None:
        time.sleep(moment.seconds)
        os.kill(running.pid, moment.number)
    watch = threading.Timer(LONGEST, os.kill, (running.pid, signal.SIGKILL))
    watch.start()
    _, status = os.waitpid(running.pid, 0)
    watch.cancel()
    seconds = time.monotonic() - running.start
    text = running.output.read_text(errors="replace")
    running.output.unlink()
    code = os.waitstatus_to_exitcode(status)
    need(seconds < LONGEST, f"hangs: no end after {LONGEST} s: {text[-500:]}")
    return Ended(code, text, seconds)


def _become(output: Path) -> None:
    """A process of its own: output to a file, signals as a program has them when it starts."""
    fd = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _run(args: list[str]) -> int:
    """The exit code of our command line, whose end runs as at a program's."""
    try:
        main(args, prog_name="kvtuner-gguf")
    except SystemExit as e:
        return e.code if isinstance(e.code, int) else 0 if e.code is None else 1
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
    return 0


def _trace(moment: Moment) -> None:
    """Send the signal to this process at its line."""
    left = moment.line

    def on_line(frame: FrameType, event: str, _: object) -> Callable | None:
        nonlocal left
        if event == "line":
            left -= 1
            if left == -1:
                os.kill(os.getpid(), moment.number)
        return on_line

    def on_call(frame: FrameType, event: str, _: object) -> Callable | None:
        return on_line if frame.f_code.co_filename.endswith(moment.files) else None

    sys.settrace(on_call)


def lines_of(folder: Path, files: tuple[str, ...], *args: object) -> int:
    """How many lines of these files a command runs."""
    counter = mmap.mmap(-1, 8)  # shared with the process that counts

    def count() -> None:
        counted = 0

        def on_line(frame: FrameType, event: str, _: object) -> Callable:
            nonlocal counted
            counted += event == "line"
            struct.pack_into("q", counter, 0, counted)
            return on_line

        sys.settrace(lambda frame, event, _: on_line if frame.f_code.co_filename.endswith(files) else None)

    ended = command(folder, *args, prepare=count)
    need(ended.code == 0, ended.text)
    return struct.unpack("q", counter)[0]


def limit_files(n_bytes: int) -> None:
    """No file of this process may become larger."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, resource.RLIM_INFINITY))


def held(ended: Ended, what: str, *, codes: tuple[int, ...] = (0, 1)) -> None:
    """Raises Fault for a traceback, or an end that is none of a program that knows what it does."""
    if (
        "Traceback" in ended.text
        or ended.code not in codes
        or (ended.code == 1 and "Error: " not in ended.text and 1 in codes and "Aborted" not in ended.text)
    ):
        raise Fault(f"{what}: ends with {ended.code}, {ended.text[-1500:]!r}")


def calibrate_args(model: Path, text: Path, *more: object) -> tuple[object, ...]:
    """A calibration that takes a second or two."""
    return ("calibrate", model, *same_as_calibrated(text), "--bits", 6.5, "--trials", 8, "-t", 1, *more)


def same_as_calibrated(text: Path) -> tuple[object, ...]:
    """The options that solve and calibrate must have in common."""
    return ("-f", text, "--types", "q8_0,q4_0", "--chunks", 2, "-c", 1024)


def random_moment(rng: random.Random, seconds: float, n_lines: int, files: tuple[str, ...]) -> Moment:
    number = rng.choice((signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL))
    if rng.random() < 0.5:
        return Moment(number, seconds=rng.uniform(0, 1.2 * seconds))
    return Moment(number, line=rng.randrange(n_lines), files=files)


def names(folder: Path) -> set[str]:
    """Everything under the folder."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}
