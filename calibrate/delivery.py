"""A model that a worker's machine has not: sent there in parts, and kept in its cache under the hash of its weights."""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from kvtuner_gguf.cache import cache_dir, open_cache
from kvtuner_gguf.errors import KvtunerError, PlanError
from kvtuner_gguf.identity import weights_sample
from kvtuner_gguf.room import reserve, write_errors

if TYPE_CHECKING:
    from distributed import Client

PART_BYTES = 32 << 20


# ---- on the worker


def place(sample: str) -> Path:
    """Where this machine keeps a model that was sent to it: `kvtuner-gguf cache` lists and clears it."""
    return cache_dir() / f"{sample[:32]}.gguf"


def receive(sample: str, at: int, n_bytes: int, part: bytes) -> None:
    """Write a part of a model's file of n_bytes, which is there under its name once all of it is. Raises KvtunerError
    if there is no room, or it is another model than was said."""
    open_cache()
    path = place(sample)
    unfinished = path.with_suffix(f".{os.getpid()}.part")  # several workers of a machine do not share one
    cure = "Make room there, or put the model there by hand."
    try:
        with write_errors(path, n_bytes, cure, KvtunerError), unfinished.open("r+b" if at else "wb") as file:
            if at == 0:
                reserve(file, path.parent, n_bytes)
            file.seek(at)
            file.write(part)
        if at + len(part) == n_bytes:
            _check(unfinished, sample)
            unfinished.replace(path)
    except KvtunerError:
        unfinished.unlink(missing_ok=True)
        raise


def _check(path: Path, sample: str) -> None:
    with suppress(PlanError):  # no GGUF file
        if weights_sample(path) == sample:
            return
    raise KvtunerError(f"what was sent has other weights than {sample[:12]}: the file was changed meanwhile.")


# ---- where the calibration runs


class Delivery:
    """A model's file on its way to a worker, in a thread of its own.

    why_not  once it is over: why the worker has it not; "" = it has
    """

    def __init__(self, client: Client, address: str, path: Path, sample: str) -> None:
        self.why_not = ""
        self._client, self._address, self._path, self._sample = client, address, path, sample
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @property
    def is_over(self) -> bool:
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            self._send()
        except Exception as error:  # the worker's own, or dask's where the worker or the scheduler is gone
            self.why_not = str(error) or type(error).__name__

    def _send(self) -> None:
        n_bytes, at = self._path.stat().st_size, 0
        with self._path.open("rb") as file:
            while part := file.read(PART_BYTES):
                there = self._client.scatter(part, workers=[self._address], direct=True, hash=False)
                self._client.submit(
                    receive, self._sample, at, n_bytes, there, workers=[self._address], pure=False
                ).result()
                at += len(part)
