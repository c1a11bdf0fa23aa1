"""Runs attempts in a process of its own, so that a crash is a fault that is counted, and the attack goes on after
it."""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from kinds import KINDS, Kind

CHILD = Path(__file__).with_name("child.py")
MOST_FAULTS = 20  # after which an attack ends: the cause will be one
UPSTREAM = "upstream dies of it, too"


@dataclass
class Tally:
    """What an attack found. words: how often each end of an attempt that is right came out; faults: attempt -> what was
    wrong."""

    kind: str
    seed: int
    tried: int = 0
    seconds: float = 0.0
    words: Counter[str] = field(default_factory=Counter)
    faults: dict[int, str] = field(default_factory=dict)


def attack(
    name: str,
    count: int,
    *,
    seed: int = 0,
    first: int = 0,
    keep: Path | None = None,
    sabotage: str = "",
    most_faults: int = MOST_FAULTS,
) -> Tally:
    """Try until `count` of what the kind counts are done, from attempt `first` on.

    The same seed and attempt is the same input. keep: folder for the inputs of faults. sabotage: a function of
    sabotage.py, which makes the product faulty first, to see that the attack finds it.
    """
    kind, tally = KINDS[name], Tally(name, seed)
    end, start = first + -(-count // kind.each), time.monotonic()
    with scratch() as folder:
        while first < end and len(tally.faults) < most_faults:
            first = _until_death(kind, tally, folder, (first, end), sabotage, keep, most_faults)
    tally.seconds = time.monotonic() - start
    return tally


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder for the attack's files, in memory where the system has room there: an attack writes each of its files
    through to the disk."""
    memory = Path("/dev/shm")
    roomy = memory.is_dir() and os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > 2 << 30
    folder = Path(tempfile.mkdtemp(prefix="kvtuner-attack-", dir=memory if roomy else None))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _until_death(
    kind: Kind, tally: Tally, folder: Path, span: tuple[int, int], sabotage: str, keep: Path | None, most_faults: int
) -> int:
    """Attempts of one process; the number of the attempt to go on with."""
    shutil.rmtree(folder)
    folder.mkdir()
    with open(folder.with_suffix(".stderr"), "w+b") as stderr:
        child = _start(kind, tally, folder, span, sabotage, keep, stderr)
        number = None
        try:
            for line in _lines(child, kind.limit_s):
                if line.isdigit():
                    number = int(line)
                    continue
                end = json.loads(line)
                tally.tried += kind.each
                if end["fault"]:
                    _blame(tally, number, end["fault"])
                    if len(tally.faults) >= most_faults:
                        return span[1]
                else:
                    tally.words[end["word"]] += 1
            if child.wait() == 0:
                return span[1]
            why = _death(child.returncode)
        except TimeoutError:
            why = f"hangs: no end after {kind.limit_s:g} s"
        finally:
            _kill(child)
            os.unlink(stderr.name)
        stderr.seek(0)
        text = stderr.read().decode(errors="replace")[-3000:]
    if number is None:
        raise RuntimeError(f"{kind.module}: {why} before its first attempt\n{text}")
    tally.tried += kind.each
    if kind.bare and not sabotage and _bare_dies(kind, folder):
        tally.words[UPSTREAM] += 1
        return number + 1
    _blame(tally, number, f"{why}{kept(folder, keep, tally.kind, tally.seed, number)}\n{text}")
    return number + 1


def _start(
    kind: Kind, tally: Tally, folder: Path, span: tuple[int, int], sabotage: str, keep: Path | None, stderr: object
) -> subprocess.Popen:
    memory = 0 if "san.so" in os.environ.get("LD_PRELOAD", "") else kind.memory  # a sanitizer maps terabytes
    arguments = [
        tally.kind,
        kind.module,
        str(folder),
        str(tally.seed),
        *map(str, span),
        str(memory),
        sabotage,
        str(keep or ""),
    ]
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    environment = {
        **os.environ,
        **threads,
        "XDG_CACHE_HOME": str(folder / "cache"),
        "PYTHONFAULTHANDLER": "1",
        "GGML_NO_BACKTRACE": "1",
    }
    return subprocess.Popen(
        [sys.executable, str(CHILD), *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=stderr,
        env=environment,
        start_new_session=True,
    )


def _lines(child: subprocess.Popen, limit_s: float) -> Iterator[str]:
    """The child's lines. Raises TimeoutError if the next one takes too long."""
    rest, fd = b"", child.stdout.fileno()
    while True:
        if not select.select([fd], [], [], limit_s)[0]:
            raise TimeoutError
        data = os.read(fd, 1 << 16)
        if not data:
            return
        *lines, rest = (rest + data).split(b"\n")
        yield from (line.decode() for line in lines)


def _kill(child: subprocess.Popen) -> None:
    """End the child and what it started; its process group is its own."""
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    child.stdout.close()


def _death(code: int) -> str:
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"ends with code {code}"


def _bare_dies(kind: Kind, folder: Path) -> bool:
    """Whether upstream's own code dies of the same input: of the stock build that KVTUNER_STOCK_LIB names, else of ours
    without a plan."""
    library = os.environ.get("KVTUNER_STOCK_LIB") or _our_library()
    command = [sys.executable, str(CHILD.with_name(kind.bare)), str(folder / "input" / kind.input)]
    environment = {**os.environ, "LLAMA_CPP_LIB_PATH": library, "OMP_NUM_THREADS": "1", "GGML_NO_BACKTRACE": "1"}
    try:
        return subprocess.run(command, env=environment, capture_output=True, timeout=kind.limit_s).returncode < 0
    except subprocess.TimeoutExpired:
        return False


def _our_library() -> str:
    from kvtuner_gguf import native

    return str(native.lib_dir())


def _blame(tally: Tally, number: int, fault: str) -> None:
    tally.faults[number] = f"{tally.kind}, seed {tally.seed}, attempt {number}: {fault}"


def kept(folder: Path, keep: Path | None, kind: str, seed: int | str, number: int) -> str:
    """Keep what an attempt was made with; " (input: ...)", or "" if there is nothing to keep."""
    if keep is None or not any((folder / "input").iterdir()):
        return ""
    saved = keep / f"{kind}-{seed}-{number}"
    shutil.rmtree(saved, ignore_errors=True)
    shutil.copytree(folder / "input", saved, symlinks=True)
    return f" (input: {saved})"
