"""What a calibration leaves on disk, so that an interrupted one goes on where it was: its folder, and the runs it
measured."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from kvtuner_gguf import __version__, native
from kvtuner_gguf.cache import cache_dir, lock
from kvtuner_gguf.calibrate.corpus import file_sha256
from kvtuner_gguf.calibrate.options import Options
from kvtuner_gguf.calibrate.records import append_line, read_lines
from kvtuner_gguf.errors import CalibrationError, KvtunerError
from kvtuner_gguf.identity import weights_sample
from kvtuner_gguf.pair import Pair
from kvtuner_gguf.quality import Quality

RECORDS = 3  # counted up when runs of the same options come to mean something else, so that old records are left alone


def work_dir(options: Options, *sizes: int) -> Path:
    """Where the stages' records of this calibration are: the same text and model, runs of the same sizes by the same
    program, the same folder."""
    runs = [__version__, native.build_id(), os.environ.get("LLAMA_ATTN_ROT_DISABLE", ""), options.n_gpu_layers]
    parts = [RECORDS, *runs, weights_sample(options.model), options.n_chunk, options.seed, *sizes]
    if options.text:
        parts.append(file_sha256(options.text))
    return cache_dir() / "calibrate" / hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


@contextmanager
def claimed(work: Path) -> Iterator[None]:
    """The folder is this process's alone as long as this is open; the claim goes with the process, however it ends.

    Raises CalibrationError if another process has claimed it.
    """
    work.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with lock(work.with_name(f"{work.name}.lock")) as ours:
        if ours is False:
            raise CalibrationError(
                f"'{work}' is in use: this model is being calibrated already. Wait until that ends, or end it."
            )
        yield


class EvaluationCache:
    """Qualities that were measured, one JSON line each, so that an interrupted search goes on where it was."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.known: dict[tuple[str, str], Quality] = {}
        for item in read_lines(path):
            with suppress(KeyError, TypeError, KvtunerError):  # a line of ours by its seal, of another version
                self.known[item["what"], item["pairs"]] = Quality(**item["quality"])

    def get(self, what: str, measure: Callable[[tuple[Pair, ...]], Quality], pairs: tuple[Pair, ...]) -> Quality:
        key = (what, " ".join(map(str, pairs)))
        if key not in self.known:
            self.known[key] = measure(pairs)
            append_line(self.path, {"what": what, "pairs": key[1], "quality": vars(self.known[key])})
        return self.known[key]

    def of(self, what: str) -> list[tuple[tuple[Pair, ...], Quality]]:
        """All that was measured so, in order."""
        return [
            (tuple(_pair(p) for p in pairs.split(" ")), quality)
            for (w, pairs), quality in self.known.items()
            if w == what
        ]


def _pair(text: str) -> Pair:
    """'q8_0/q4_0', or '/' of a layer without KV."""
    return Pair(*text.split("/"))
