"""What a calibration leaves on disk, so that an interrupted one goes on where it was: its folder and its records."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol, TypeVar

from kvtuner_gguf import __version__, native
from kvtuner_gguf.cache import cache_dir, lock
from kvtuner_gguf.calibrate.options import Options
from kvtuner_gguf.calibrate.records import append_line, read_lines
from kvtuner_gguf.errors import CalibrationError, KvtunerError
from kvtuner_gguf.pair import Pair, Pairs
from kvtuner_gguf.quality import Quality

RECORDS = 7  # counted up when runs of the same options come to mean something else, so that old records are left alone


class _Record(Protocol):
    """What can be kept."""

    def save(self, path: Path) -> None: ...

    @classmethod
    def load(cls, path: Path) -> _Record: ...


Kept = TypeVar("Kept", bound=_Record)


def work_dir(options: Options, *sizes: int) -> Path:
    """Where the stages' records of this calibration are: the same text and model, runs of the same sizes by the same
    program, the same folder."""
    return keyed_dir("calibrate", RECORDS, *options.identity(), *sizes)


def keyed_dir(kind: str, records: int, *parts: object) -> Path:
    """The folder of records that these parts name, made by this program. kind: of kept.KINDS"""
    program = (records, __version__, native.build_id(), os.environ.get("LLAMA_ATTN_ROT_DISABLE", ""))
    return cache_dir() / kind / hashlib.sha256(repr([*program, *parts]).encode()).hexdigest()[:16]


@contextmanager
def claimed(work: Path, what: str = "calibrated") -> Iterator[None]:
    """The folder is this process's alone as long as this is open; the claim goes with the process, however it ends.

    what  is being done with the model

    Raises CalibrationError if another process has claimed it.
    """
    work.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with lock(work.with_name(f"{work.name}.lock")) as ours:
        if ours is False:
            raise CalibrationError(
                f"'{work}' is in use: this model is being {what} already. Wait until that ends, or end it."
            )
        yield


class Evaluations:
    """Qualities that were measured, one JSON line each, so that an interrupted search goes on where it was.

    what  names the text, the model's weights and K's vectors of the runs
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._known: dict[tuple[str, str], Quality] = {}
        for item in read_lines(path):
            with suppress(KeyError, TypeError, KvtunerError):  # a line of ours by its seal, of another version
                self._known[item["what"], item["pairs"]] = Quality(**item["quality"])

    def get(self, what: str, measure: Callable[[Pairs], Quality], pairs: Pairs) -> Quality:
        """As it was measured, or, where it was not, measured and kept."""
        if not self.knows(what, pairs):
            self.keep(what, pairs, measure(pairs))
        return self._known[_key(what, pairs)]

    def knows(self, what: str, pairs: Pairs) -> bool:
        """Whether it was measured."""
        return _key(what, pairs) in self._known

    def keep(self, what: str, pairs: Pairs, quality: Quality) -> None:
        """What was measured, here or elsewhere."""
        key = _key(what, pairs)
        self._known[key] = quality
        append_line(self.path, {"what": what, "pairs": key[1], "quality": vars(quality)})

    def of(self, what: str) -> list[tuple[Pairs, Quality]]:
        """All that was measured so, in order."""
        return [
            (tuple(_pair(p) for p in pairs.split(" ")), quality)
            for (w, pairs), quality in self._known.items()
            if w == what
        ]


def _key(what: str, pairs: Pairs) -> tuple[str, str]:
    return what, " ".join(map(str, pairs))


def _pair(text: str) -> Pair:
    """'q8_0/q4_0', or '/' of a layer without KV."""
    return Pair(*text.split("/"))


class Store:
    """The records of one calibration.

    evaluations  the runs
    """

    def __init__(self, folder: Path, *, read_only_of: Path | None = None) -> None:
        """read_only_of: the model, where nothing may be measured: what is not there is an error."""
        self.folder, self._model = folder, read_only_of
        self.evaluations = Evaluations(folder / "evaluations.jsonl")

    def get(self, kind: type[Kept], name: str, make: Callable[[], Kept]) -> Kept:
        """The record of this name and kind: as it was kept, or, where there is none that reads, made and kept."""
        path = self.folder / name
        with suppress(CalibrationError):
            return kind.load(path)  # type: ignore[return-value] # mypy has no Self in a Protocol's classmethod
        self.check_writable(path)
        found = make()
        found.save(path)
        return found

    def check_writable(self, path: Path) -> None:
        """Raises CalibrationError if nothing may be measured, so that `path` cannot be made."""
        if self._model is not None:
            raise CalibrationError(
                f"model '{self._model}' was not measured with these options ({path} is missing or damaged). "
                f"Run first: kvtuner-gguf calibrate {self._model} -o plan.json"
            )
