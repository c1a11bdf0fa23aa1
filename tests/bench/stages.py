"""What each stage of a calibration takes: seconds, memory, and disk, by its own lines of progress.

python tests/bench/stages.py calibrate MODEL [OPTION ...]

Runs the command in an empty cache folder beside the model, where all that it keeps lies. Memory is the largest of a
stage: what is the process's own, and with the pages of the model's file that are in memory, which the system takes
back when it needs them. Disk is the largest of a stage, without the model and its copy, and the copy. Linux.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from process import markdown

SAMPLE_S = 0.1
STAGE = re.compile(r"\[\d+/\d+\] (?P<name>.*?)(?: \(.*\))? \.\.\.")


@dataclass
class Stage:
    name: str
    since: float
    own: int = 0  # bytes
    resident: int = 0
    disk: int = 0
    copy: int = 0

    def see(self, own: int, resident: int, disk: int, copy: int) -> None:
        self.own, self.resident = max(self.own, own), max(self.resident, resident)
        self.disk, self.copy = max(self.disk, disk), max(self.copy, copy)


def memory_of(pid: int) -> tuple[int, int]:
    """Bytes: anonymous, and all that is resident."""
    found = dict(re.findall(r"^(RssAnon|VmRSS):\s*(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE))
    return int(found["RssAnon"]) << 10, int(found["VmRSS"]) << 10


def disk_of(folder: Path) -> tuple[int, int]:
    """Bytes that the folder's files take: all but models, and models."""
    rest = models = 0
    for path in folder.rglob("*"):
        with suppress(OSError):
            if path.is_file():
                n_bytes = path.stat().st_blocks * 512
                models += n_bytes * (path.suffix == ".gguf")
                rest += n_bytes * (path.suffix != ".gguf")
    return rest, models


def watched(process: subprocess.Popen[str], folder: Path) -> Iterator[Stage]:
    """The stages, once each is over."""
    stages = [Stage("begin", time.monotonic())]

    def look() -> None:
        while process.poll() is None:
            with suppress(OSError, KeyError):
                stages[-1].see(*memory_of(process.pid), *disk_of(folder))
            time.sleep(SAMPLE_S)

    looking = threading.Thread(target=look)
    looking.start()
    assert process.stderr is not None
    for line in process.stderr:
        print(line, end="", file=sys.stderr, flush=True)
        if found := STAGE.match(line):
            stages.append(Stage(found["name"], time.monotonic()))
            yield stages[-2]
    looking.join()
    yield stages[-1]


def main() -> int:
    if len(sys.argv) < 3 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    model = Path(sys.argv[2])
    rows, start = [], time.monotonic()
    with TemporaryDirectory(dir=model.parent, prefix="stages-") as tmp:
        process = subprocess.Popen(
            [sys.executable, "-m", "kvtuner_gguf", *sys.argv[1:]],
            env=os.environ | {"XDG_CACHE_HOME": tmp},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for stage in watched(process, Path(tmp)):
            end = time.monotonic()
            mib = (stage.own, stage.resident, stage.disk, stage.copy)
            rows.append([stage.name, f"{end - stage.since:.0f}", *(f"{n >> 20}" for n in mib)])
    head = ["stage", "s", "own memory, MiB", "with the model's pages", "disk, MiB", "copy of the model"]
    print(markdown(head, [*rows, ["all", f"{time.monotonic() - start:.0f}", "", "", "", ""]]))
    return process.returncode


if __name__ == "__main__":
    sys.exit(main())
