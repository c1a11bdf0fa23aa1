"""Room on a disk: taken before it is needed, and errors that tell how much is missing where."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from .errors import KvtunerError, PlanError

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_CANNOT = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS)  # what a file system says that cannot reserve


def mib(n_bytes: int) -> str:
    """Bytes in MiB, rounded up, as errors give them."""
    return f"{-(-n_bytes >> 20)} MiB"


def need(folder: Path, n_bytes: int) -> None:
    """Raises OSError if the folder's disk has less than n_bytes free."""
    if shutil.disk_usage(folder).free < n_bytes:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))


def reserve(file: BinaryIO, folder: Path, n_bytes: int) -> None:
    """Take the room of the file's first n_bytes now. Raises OSError if the disk does not have it."""
    need(folder, n_bytes)
    if n_bytes and hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(file.fileno(), 0, n_bytes)
        except OSError as error:
            if error.errno not in _CANNOT:
                raise


@contextmanager
def write_errors(target: Path, n_bytes: int, cure: str, kind: type[KvtunerError] = PlanError) -> Iterator[None]:
    """Turns an OSError of the block, which writes n_bytes to target, into an error of this kind: why, what it needs,
    the cure."""
    try:
        yield
    except OSError as error:
        raise kind(
            f"{target}: not written ({why(error, Path(target).parent)}), need {mib(n_bytes)} in "
            f"{Path(target).parent} and the right to write. {cure}"
        ) from error


def why(error: OSError, folder: Path) -> str:
    """The reason of an error; where there is no room, with what is free in the folder."""
    reason = error.strerror or str(error)
    if error.errno not in NO_ROOM:
        return reason
    free = 0
    with suppress(OSError):
        free = shutil.disk_usage(folder).free
    return f"no space: {free >> 20} MiB free" if error.errno != errno.EFBIG else f"{reason}, {free >> 20} MiB free"
