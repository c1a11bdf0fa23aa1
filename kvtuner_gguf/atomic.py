"""A file that is written whole or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


@contextmanager
def atomic_file(target: Path, like: os.stat_result | None = None) -> Iterator[BinaryIO]:
    """A file to write that becomes target when the block ends, and leaves no trace if it does not end well.

    It lies beside the target, is synced and then renamed over it. Mode and owner are those of `like`,
    else of the target if there is one. Unbuffered: write() may take less than it is given for huge data.
    Raises OSError; what stood at target is then unchanged.
    """
    if like is None and target.exists():
        like = os.stat(target)
    temp = target.with_name(f"{target.name[:50]}.{secrets.token_hex(8)}.kvtuner-tmp")  # seen, if a power cut leaves it
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    try:
        with open(os.open(temp, flags, 0o666 if like is None else 0o600), "w+b", buffering=0) as out:
            yield out
            os.fsync(out.fileno())
        if like is not None:
            with suppress(AttributeError, OSError):  # only root may give a file away; Windows has no owners
                os.chown(temp, like.st_uid, like.st_gid)
            os.chmod(temp, like.st_mode & 0o7777)
        os.replace(temp, target)
    except BaseException:
        with suppress(OSError):
            os.unlink(temp)
        raise
    with suppress(OSError):  # makes the rename durable, where the system knows how: Windows does not
        fd = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
