"""What stands where a file is to be written: looked at before the work, and once more by the write itself."""

from __future__ import annotations

import errno
import math
import os
import re
import stat
import tempfile
from pathlib import Path

from .errors import PlanError
from .room import need

_FAT_LIMIT = 1 << 32  # bytes that FAT cannot hold; a smaller file is held by all, and FAT fills it with zeros
_BLOB = re.compile(r"(sha256-)?[0-9a-f]{40,64}")  # a file of a hub's or a program's store, named by its content


def check_place(target: Path) -> None:
    """Raises PlanError for a link, and for a file of a store of blobs: what they name is not to be changed."""
    if target.is_symlink():  # a rename would put a file where the link is, and leave what it points to as it was
        real = Path(os.path.realpath(target))
        if _is_blob(real):
            raise PlanError(
                f"{target}: is a symbolic link to {real}, in a store whose files are named by their content. Write "
                "a new file with -o."
            )
        raise PlanError(f"{target}: is a symbolic link to {real}. Give that path, or write a new file with -o.")
    if _is_blob(target):
        raise PlanError(
            f"{target}: is in a store whose files are named by their content. Write a new file elsewhere with -o."
        )


def _is_blob(path: Path) -> bool:
    return path.absolute().parent.name == "blobs" and bool(_BLOB.fullmatch(path.name))


def check_writable(target: Path) -> None:
    """Raises PlanError if an existing file may not be changed, or not be replaced in its folder."""
    info = os.stat(target)
    if not (info.st_mode & 0o222 and os.access(target, os.W_OK)):
        raise PlanError(f"{target}: is read-only. Allow writing to it, or write a new file with -o.")
    folder = os.stat(target.parent)
    if hasattr(os, "geteuid") and folder.st_mode & stat.S_ISVTX and os.geteuid() not in (0, folder.st_uid, info.st_uid):
        raise PlanError(
            f"{target}: belongs to another user, in a folder where only they may replace it. Write a new file with -o."
        )


def check_folder(target: Path, n_bytes: int) -> None:
    """Raises OSError if no file of n_bytes can be made in the target's folder: tried with one that has no name."""
    if n_bytes > _most_bytes():
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
    with tempfile.TemporaryFile(dir=target.parent) as file:
        if n_bytes >= _FAT_LIMIT:
            # refused at once by a file system that holds no such file; others need no zeros for it
            file.truncate(n_bytes)
    need(target.parent, n_bytes)


def _most_bytes() -> float:
    """Of a file that this process may write."""
    try:
        import resource
    except ImportError:  # Windows
        return math.inf
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    return math.inf if limit == resource.RLIM_INFINITY else limit
