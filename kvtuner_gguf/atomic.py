"""A file that is written whole or not at all."""

from __future__ import annotations

import errno
import os
import re
import secrets
import signal
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from io import BufferedRandom
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows, where a file that is open cannot be removed
    fcntl = None  # type: ignore[assignment]

_TEMP = re.compile(r".{0,50}\.[0-9a-f]{16}\.kvtuner-tmp", re.DOTALL)
_XATTRS = re.compile(r"user\..*|system\.posix_acl_access|security\.selinux")  # others vouch for the old content


@contextmanager
def atomic_file(target: Path, like: os.stat_result | None = None, *, private: bool = False) -> Iterator[BufferedRandom]:
    """A file to write that becomes target when the block ends, and leaves no trace if it does not end well.

    Where the system can, it has no name until it is whole, so that even a killed process leaves nothing. Else it lies
    beside the target, and what a killed process left goes with the next write there. It is synced, named, and its
    folder synced.
    like     of a new file: whose mode and owner it takes; one that replaces another keeps that one's, its xattrs and
             its ACL
    private  a new file is its owner's alone
    Raises OSError; what stood at target is then unchanged. A target that is a link, a folder or a device is refused.
    """
    target = Path(target)
    old = _regular(target)
    remove_stale(target.parent)
    temp, kept = _temp_beside(target), old or like
    mode = 0o600 if private or kept else 0o666
    try:
        fd, unnamed = _opened(target.parent, temp, mode)
        with open(fd, "w+b") as out:
            yield out
            out.flush()
            if kept is not None:
                _take_over(fd, temp, kept, target if old else None)
            os.fsync(fd)
            with _signals_wait():
                if unnamed:
                    _name(fd, temp)
                if fcntl is None:
                    out.close()
                os.replace(temp, target)
    except BaseException:
        with suppress(OSError):
            os.unlink(temp)
        raise
    _sync_folder(target.parent)


def remove_stale(folder: Path) -> None:
    """Removes what writers that were killed left in a folder: ours by name and owner, and locked by no living
    process."""
    with suppress(OSError), os.scandir(folder) as entries:
        for name in [entry.path for entry in entries if _TEMP.fullmatch(entry.name)]:
            with suppress(OSError):  # locked, gone by now, or not ours to remove
                _remove_unlocked(name)


def _remove_unlocked(name: str) -> None:
    if fcntl is None:
        os.unlink(name)
        return
    fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        info = os.fstat(fd)
        if stat.S_ISREG(info.st_mode) and os.geteuid() in (0, info.st_uid):
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.unlink(name)
    finally:
        os.close(fd)


def _regular(target: Path) -> os.stat_result | None:
    """What stands at target; None if nothing does. Raises OSError if it is anything but a file: a rename would put one
    in its place."""
    try:
        info = os.lstat(target)
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(info.st_mode):
        raise OSError(errno.EINVAL, "is a link, a folder or a device, not a file", str(target))
    return info


def _temp_beside(target: Path) -> Path:
    return target.with_name(f"{target.name[:50]}.{secrets.token_hex(8)}.kvtuner-tmp")


def _opened(folder: Path, temp: Path, mode: int) -> tuple[int, bool]:
    """A new file in the folder, locked, and whether it has no name yet."""
    if hasattr(os, "O_TMPFILE"):
        with suppress(OSError):  # what is wrong with the folder is said when the file is made by name
            if _can_name(os.stat(folder).st_dev, str(folder)):
                return _locked(os.open(folder, os.O_TMPFILE | os.O_RDWR, mode)), True
    fd = _locked(os.open(temp, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), mode))
    if fcntl is not None and not os.fstat(fd).st_nlink:  # taken for a dead one's before it was locked
        os.close(fd)
        return _opened(folder, temp, mode)
    return fd, False


@cache
def _can_name(_device: int, folder: str) -> bool:
    """Whether a file system makes files without a name and gives them one later: tried, as not all do that claim it."""
    temp = _temp_beside(Path(folder) / "try")
    try:
        fd = os.open(folder, os.O_TMPFILE | os.O_RDWR, 0o600)
        try:
            with _signals_wait():
                _name(fd, temp)
                os.unlink(temp)
        finally:
            os.close(fd)
    except OSError:
        return False
    return True


def _name(fd: int, path: Path) -> None:
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.link(f"/proc/self/fd/{fd}", path.name, dst_dir_fd=folder)  # a folder's fd makes Python follow the link
    finally:
        os.close(folder)


def _locked(fd: int) -> int:
    """The same, locked as long as it is open, where the file system knows locks."""
    if fcntl is not None:
        with suppress(OSError):
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return fd


@contextmanager
def _signals_wait() -> Iterator[None]:
    """No signal ends this thread inside the block."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGHUP, signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _take_over(fd: int, temp: Path, like: os.stat_result, old: Path | None) -> None:
    """Group, owner and mode of another file, and what else `old` carries; as far as this process may set them."""
    if hasattr(os, "fchown"):
        for uid, gid in (
            (-1, like.st_gid),
            (like.st_uid, -1),
        ):  # a member may keep the group where only root may keep the owner
            with suppress(OSError):
                os.fchown(fd, uid, gid)
    if old is not None and hasattr(os, "listxattr"):
        _copy_xattrs(old, fd)
    mode, now = stat.S_IMODE(like.st_mode), os.fstat(fd)
    if now.st_gid != like.st_gid:  # another group gets no more than everybody
        mode &= ~(stat.S_ISGID | stat.S_IRWXG) | (mode & stat.S_IRWXO) << 3
    if now.st_uid != like.st_uid:
        mode &= ~stat.S_ISUID
    os.chmod(fd if os.chmod in os.supports_fd else temp, mode)


def _copy_xattrs(old: Path, fd: int) -> None:
    with suppress(OSError):
        for name in filter(_XATTRS.fullmatch, os.listxattr(old)):
            with suppress(OSError):
                os.setxattr(fd, name, os.getxattr(old, name))


def _sync_folder(folder: Path) -> None:
    """Makes a rename durable, where the system knows how: Windows does not."""
    with suppress(OSError):
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
