"""A file opened for reading: one that is a file, as opening a pipe would wait for ever."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

from .errors import PlanError

StrPath = str | os.PathLike[str]


def is_regular(path: StrPath) -> bool:
    """Whether a file is there, and no folder, pipe or device. Raises OSError if nothing is."""
    return stat.S_ISREG(os.stat(path).st_mode)


def sha256_of(path: StrPath) -> str:
    """64 hex digits of a file's bytes, read a piece at a time. Raises OSError."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while data := file.read(1 << 20):
            digest.update(data)
    return digest.hexdigest()


@contextmanager
def opened(path: StrPath, what: str) -> Iterator[BinaryIO]:
    """The file, open for reading; PlanError if it is none, or cannot be opened or read. what: "a GGUF file" """
    try:
        if not is_regular(path):
            raise PlanError(f"{path}: is a folder or a device, need {what}. Check the path.")
        with open(path, "rb", buffering=1 << 20) as file:
            yield file
    except OSError as err:
        raise PlanError(f"{path}: cannot be read ({err.strerror}). Check the path and its permissions.") from err
