"""What the commands keep in the cache folder: listed, and cleared."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from .cache import cache_dir, lock
from .printable import printable

KINDS = ("calibrate", "tasks", "verdict")  # folders of folders of records, one for each model, text and sizes
RPC = "rpc"  # a folder of tensors that clients sent to this machine
ABOUT = "about.txt"  # in each of those: what it is of


@dataclass(frozen=True)
class Kept:
    """What is kept, at a path.

    kind     one of KINDS, RPC, or model, of one that was fetched, or sent to a worker here
    about    the model it is of; "" where that is not known
    age_s    seconds since something was last written there
    """

    kind: str
    path: Path
    about: str
    n_bytes: int
    age_s: float


def write_about(folder: Path, model: Path) -> None:
    """Say in a folder of records of which model they are. What cannot be said ends nothing."""
    with suppress(OSError):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        (folder / ABOUT).touch(mode=0o600)
        (folder / ABOUT).write_text(f"{model.resolve()}\n", encoding="utf-8", errors="surrogateescape")


def kept() -> list[Kept]:
    """All that is kept, the latest first. Raises KvtunerError where the system knows no home."""
    found = [_of(kind, path) for kind, path in _places()]
    return sorted(found, key=lambda item: item.age_s)


def clear(items: Iterable[Kept]) -> tuple[int, list[Kept]]:
    """Remove them, but for what another process works in. -> (bytes that are free now, what is left)"""
    freed, left = 0, []
    for item in items:
        if item.path.is_file():
            item.path.unlink(missing_ok=True)
        elif not _clear_folder(item.path):
            left.append(item)
            continue
        freed += item.n_bytes
    return freed, left


def _clear_folder(folder: Path) -> bool:
    """Whether nobody works in it, so that it could be removed, and its lock with it."""
    claim = folder.with_name(f"{folder.name}.lock")
    with lock(claim) as ours:
        if ours is False:
            return False
        shutil.rmtree(folder, ignore_errors=True)
        claim.unlink(missing_ok=True)
    return True


def _places() -> Iterator[tuple[str, Path]]:
    base = cache_dir()
    models = [*base.glob("*.gguf"), *base.glob("*.part")]  # .part: a worker was killed while it was sent one
    for path in sorted(models):
        yield "model", path
    for kind in KINDS:
        for path in sorted((base / kind).glob("*")):
            if path.is_dir():
                yield kind, path
    if (base / RPC).is_dir():
        yield RPC, base / RPC


def _of(kind: str, path: Path) -> Kept:
    files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
    n_bytes, last = 0, 0.0
    for file in files:
        with suppress(OSError):
            info = file.stat()
            n_bytes, last = n_bytes + info.st_size, max(last, info.st_mtime)
    about = path.name
    if path.is_dir():
        about = ""
        with suppress(OSError):
            about = printable((path / ABOUT).read_text(encoding="utf-8", errors="replace").strip())
    return Kept(kind, path, about, n_bytes, max(0.0, time.time() - last))
