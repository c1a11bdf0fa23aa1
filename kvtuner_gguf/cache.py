"""The folder of files that can be made again: its owner's alone, and free of what a killed process left."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import KvtunerError

try:
    import fcntl
except ImportError:  # Windows: nothing is locked
    fcntl = None  # type: ignore[assignment]

_SCRATCH = "scratch-"


def _base() -> tuple[Path, str]:
    """Where programs keep such files, and the variable that says so."""
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData/Local"), "LOCALAPPDATA"
    if sys.platform == "darwin":
        return Path.home() / "Library/Caches", "HOME"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"), "XDG_CACHE_HOME"


def cache_dir() -> Path:
    """Our folder, which may not be there yet. Raises KvtunerError where the system knows no home."""
    try:
        return _base()[0] / "kvtuner-gguf"
    except RuntimeError:
        raise KvtunerError(
            "cache folder: this user has no home folder. Set XDG_CACHE_HOME to a folder that can be written."
        ) from None


def open_cache() -> Path:
    """Our folder, made if need be, closed to others, and tried. Raises KvtunerError, which names it and the variable
    that moves it."""
    path = cache_dir()
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        info = path.stat()
        if hasattr(os, "geteuid") and info.st_uid == os.geteuid() and info.st_mode & 0o077:
            path.chmod(0o700)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise KvtunerError(
            f"cache folder {path}: cannot be written ({error.strerror}). Set {_base()[1]} to a folder that can."
        ) from None
    return path


@contextmanager
def lock(path: Path) -> Iterator[bool | None]:
    """Whether a file is this process's alone as long as this is open; None where nothing can be locked. It goes with
    the process."""
    path.touch(mode=0o600)
    fd = os.open(path, os.O_RDONLY)
    try:
        yield _flocked(fd)
    finally:
        os.close(fd)


def _flocked(fd: int) -> bool | None:
    if fcntl is None:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.fstat(fd).st_nlink > 0  # else it was removed meanwhile
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return None


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder for large files, removed when the block ends. What killed processes left of theirs is removed first.

    Raises KvtunerError if the cache folder cannot be written.
    """
    cache = open_cache()
    _sweep(cache)
    path, fd = _new_folder(cache)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        if fd is not None:
            os.close(fd)


def _new_folder(cache: Path) -> tuple[Path, int | None]:
    """A folder that is locked by this process, with what holds the lock."""
    while True:
        path = Path(tempfile.mkdtemp(prefix=_SCRATCH, dir=cache))
        if fcntl is None:
            return path, None
        with suppress(FileNotFoundError):  # another process's sweep was faster
            fd = os.open(path, os.O_RDONLY)
            if _flocked(fd) is not False:
                return path, fd
            os.close(fd)


def _sweep(cache: Path) -> None:
    """Removes the folders of `scratch` whose process is gone, as far as locks tell."""
    if fcntl is None:
        return
    for path in cache.glob(f"{_SCRATCH}*"):
        with suppress(OSError):
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
            try:
                if _flocked(fd):
                    shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(fd)
