"""What a calibration leaves on disk, so that an interrupted one goes on where it was: its folder, and the runs it measured."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ..default_model import cache_dir
from ..errors import CalibrationError, KvtunerError
from ..gguf_file import weights_hash
from ..gguf_header import read_header
from ..pair import Pair
from ..plan import Quality
from .options import Options

RECORDS = 2  # counted up when runs of the same options come to mean something else, so that old records are left alone


def work_dir(options: Options, *sizes: int) -> Path:
    """Where the stages' records of this calibration are: the same text and model, and runs of the same sizes, the same folder."""
    parts = [RECORDS, _weights_sample(options.model), options.n_chunk, options.seed, *sizes]
    if options.text:
        parts.append(hashlib.sha256(options.text.read_bytes()).hexdigest())
    return cache_dir() / "calibrate" / hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


@contextmanager
def claimed(work: Path) -> Iterator[None]:
    """The folder is this process's alone as long as this is open; the lock goes with the process, however it ends.

    Raises CalibrationError if another process has claimed it.
    """
    try:
        import fcntl
    except ImportError:  # Windows: not guarded
        yield
        return
    work.parent.mkdir(parents=True, exist_ok=True)
    with work.with_name(f"{work.name}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CalibrationError(f"'{work}' is in use: this model is being calibrated already. Wait until that ends, or end it.") from None
        yield


def _weights_sample(model: Path) -> str:
    """Hash of the tensor table and of the start of each tensor: the same with and without a plan in the file."""
    digest = hashlib.sha256(weights_hash(model).encode())
    tensors = read_header(model).tensors
    with model.open("rb") as file:
        for tensor in tensors:
            file.seek(tensor.offset)
            digest.update(file.read(min(tensor.n_bytes or 4096, 4096)))
    return digest.hexdigest()


class EvaluationCache:
    """Qualities that were measured, one JSON line each, so that an interrupted search goes on where it was."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.known: dict[tuple[str, str], Quality] = {}
        for line in path.read_text().splitlines() if path.exists() else ():
            try:
                item = json.loads(line)
                self.known[item["what"], item["pairs"]] = Quality(**item["quality"])
            except (ValueError, KeyError, TypeError, KvtunerError):
                continue  # the line that was being written at the interruption

    def get(self, what: str, measure: Callable[[tuple[Pair, ...]], Quality], pairs: tuple[Pair, ...]) -> Quality:
        key = (what, " ".join(map(str, pairs)))
        if key not in self.known:
            self.known[key] = measure(pairs)
            with self.path.open("a") as file:
                file.write(json.dumps({"what": what, "pairs": key[1], "quality": vars(self.known[key])}) + "\n")
        return self.known[key]

    def of(self, what: str) -> list[tuple[tuple[Pair, ...], Quality]]:
        """All that was measured so, in order."""
        return [(tuple(_pair(p) for p in pairs.split(" ")), quality) for (w, pairs), quality in self.known.items() if w == what]


def _pair(text: str) -> Pair:
    """'q8_0/q4_0', or '/' of a layer without KV."""
    return Pair(*text.split("/"))
