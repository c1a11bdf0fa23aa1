"""A write leaves the old file or the new one, as its owner had it, and nothing beside it."""

from __future__ import annotations

import os
import signal
import stat
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kvtuner_gguf import atomic
from kvtuner_gguf.atomic import atomic_file

pytestmark = pytest.mark.usefixtures("signals_as_at_start")
posix = pytest.mark.skipif(os.name == "nt", reason="needs POSIX modes and signals")
root = pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs root, to be two users")


@pytest.fixture(params=["unnamed", "named"])
def way(request, monkeypatch):
    """How the file is made: without a name first, or under a temporary one."""
    if request.param == "named":
        monkeypatch.setattr(atomic, "_can_name", lambda device, folder: False)
    return request.param


def write(path: Path, data: bytes = b"new", **kwargs: object) -> None:
    with atomic_file(path, **kwargs) as out:
        out.write(data)


def test_the_file_is_there_when_the_block_ends_and_not_before(way, tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"old")
    with atomic_file(path) as out:
        out.write(b"new")
        assert path.read_bytes() == b"old"
        assert len(os.listdir(tmp_path)) == (1 if way == "unnamed" and hasattr(os, "O_TMPFILE") else 2)
    assert path.read_bytes() == b"new" and os.listdir(tmp_path) == ["a"]


@posix
def test_the_mode_of_a_new_file(way, tmp_path):
    before = os.umask(0o027)
    try:
        write(tmp_path / "plain")
        write(tmp_path / "private", private=True)
    finally:
        os.umask(before)
    assert [stat.S_IMODE((tmp_path / n).stat().st_mode) for n in ("plain", "private")] == [0o640, 0o600]


@posix
def test_an_old_file_keeps_its_mode_whatever_the_other_one_has(way, tmp_path):
    path = tmp_path / "a"
    path.touch()
    path.chmod(0o640)
    other = tmp_path / "b"
    other.touch()
    other.chmod(0o606)
    write(path, like=other.stat())
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    write(tmp_path / "c", like=other.stat())
    assert stat.S_IMODE((tmp_path / "c").stat().st_mode) == 0o606


@posix
def test_xattrs_are_kept(way, tmp_path):
    path = tmp_path / "a"
    path.touch()
    try:
        os.setxattr(path, "user.origin", b"hub")
    except (OSError, AttributeError):
        pytest.skip("this file system keeps no xattrs")
    write(path)
    assert os.getxattr(path, "user.origin") == b"hub"


ACL = struct.pack("<I", 2) + b"".join(
    struct.pack("<HHI", *e)
    for e in [(1, 6, 2**32 - 1), (2, 6, 1234), (4, 4, 2**32 - 1), (16, 6, 2**32 - 1), (32, 0, 2**32 - 1)]
)


@posix
def test_an_access_list_is_kept(way, tmp_path):
    """Owner rw, user 1234 rw, group r, mask rw, others nothing."""
    path = tmp_path / "a"
    path.touch()
    try:
        os.setxattr(path, "system.posix_acl_access", ACL)
    except (OSError, AttributeError):
        pytest.skip("this file system keeps no access lists")
    before = path.stat().st_mode
    write(path)
    assert os.getxattr(path, "system.posix_acl_access") == ACL and path.stat().st_mode == before


AS_MEMBER = """
import os, sys
from pathlib import Path
from kvtuner_gguf.atomic import atomic_file
os.setgroups([int(g) for g in sys.argv[2:]])
os.setgid(1000)
os.setuid(1000)
with atomic_file(Path(sys.argv[1])) as out:
    out.write(b"new")
"""


@root
@pytest.mark.parametrize(
    ("mode", "groups", "expected"),
    [
        (0o664, [3000], (3000, 0o664)),  # a member of the group keeps it, though root alone could keep the owner
        (0o660, [], (1000, 0o600)),  # another group gets no access
        (0o664, [], (1000, 0o644)),  # but what everybody has
        (0o4770, [3000], (3000, 0o770)),
    ],
)
def test_a_group_is_kept_or_shut_out(mode, groups, expected, tmp_path):
    folder = tmp_path / "shared"
    folder.mkdir()
    for parent in [folder, *folder.parents][: len(folder.parts) - 2]:
        parent.chmod(parent.stat().st_mode | 0o011)
    folder.chmod(0o777)
    path = folder / "a"
    path.write_bytes(b"old")
    os.chown(path, 2000, 3000)
    path.chmod(mode)
    subprocess.run([sys.executable, "-c", AS_MEMBER, str(path), *map(str, groups)], check=True)
    assert path.read_bytes() == b"new"
    assert (path.stat().st_gid, stat.S_IMODE(path.stat().st_mode)) == expected


@posix
@pytest.mark.parametrize("kind", ["link", "folder", "device"])
def test_what_is_no_file_is_not_replaced(way, kind, tmp_path):
    path = tmp_path / "a"
    if kind == "link":
        path.symlink_to("b")
    elif kind == "folder":
        path.mkdir()
    else:
        path = Path("/dev/null")
    with pytest.raises(OSError, match="link, a folder or a device"):
        write(path)
    assert not path.is_file()


WRITER = """
import sys, time
from pathlib import Path
from kvtuner_gguf import atomic
from kvtuner_gguf.interrupts import orderly
if sys.argv[2] == "named":
    atomic._can_name = lambda device, folder: False
with orderly(), atomic.atomic_file(Path(sys.argv[1])) as out:
    out.write(b"half")
    out.flush()
    print("half", flush=True)
    time.sleep(60)
"""


def writer(path: Path, way: str) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path), way], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert process.stdout.readline() == b"half\n"
    return process


@posix
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_program_that_is_told_to_end_leaves_nothing(way, number, tmp_path):
    (tmp_path / "a").write_bytes(b"old")
    with writer(tmp_path / "a", way) as process:
        process.send_signal(number)
    assert process.returncode in (128 + number, 1, -number)
    assert os.listdir(tmp_path) == ["a"] and (tmp_path / "a").read_bytes() == b"old"


@posix
def test_the_next_write_takes_away_what_a_killed_one_left_and_nothing_else(tmp_path):
    others = ["a.kvtuner-tmp", "b.0123456789abcdef.kvtuner-tmp.txt", ".hidden"]
    for name in others:
        (tmp_path / name).touch()
    with writer(tmp_path / "dead", "named") as process:
        process.kill()
    with writer(tmp_path / "living", "named") as process:
        write(tmp_path / "new")
        left = [name for name in os.listdir(tmp_path) if name not in (*others, "new")]
        assert len(left) == 1 and left[0].startswith("living.")
        process.kill()
    write(tmp_path / "new")
    assert sorted(os.listdir(tmp_path)) == sorted([*others, "new"])


@posix
def test_a_signal_inside_a_callback_from_c_ends_the_program_once_c_has_come_back():
    program = """
import ctypes, os, signal, sys
from kvtuner_gguf.interrupts import called_from_c, orderly
compare_type = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_int), ctypes.POINTER(ctypes.c_int))
@called_from_c
def compare(a, b):
    os.kill(os.getpid(), signal.SIGTERM)
    return a[0] - b[0]
items = (ctypes.c_int * 3)(3, 1, 2)
with orderly():
    try:
        ctypes.CDLL(None).qsort(items, 3, ctypes.sizeof(ctypes.c_int), compare_type(compare))
        print(list(items), flush=True)
        import time
        time.sleep(60)
    finally:
        print("cleared up", flush=True)
"""
    start = time.monotonic()
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.stdout == "[1, 2, 3]\ncleared up\n" and result.returncode == 128 + signal.SIGTERM, result
    assert result.stderr == "" and time.monotonic() - start < 30


@posix
def test_a_signal_during_an_import_ends_the_program_once_that_is_done(tmp_path):
    """numpy.random's modules, among others, ignore any exception of what they register themselves with."""
    (tmp_path / "careless.py").write_text(
        "import os, signal\ntry:\n    os.kill(os.getpid(), signal.SIGTERM)\nexcept:\n    pass\n"
    )
    (tmp_path / "program.py").write_text(
        """
from kvtuner_gguf.interrupts import orderly
with orderly():
    try:
        import careless
        print("imported", flush=True)
        import time
        time.sleep(60)
    finally:
        print("cleared up", flush=True)
"""
    )
    start = time.monotonic()
    for how in (["program.py"], ["-c", "import program"]):
        result = subprocess.run([sys.executable, *how], capture_output=True, text=True, cwd=tmp_path)
        assert result.stdout == "imported\ncleared up\n" and result.returncode == 128 + signal.SIGTERM, result
        assert result.stderr == ""
    assert time.monotonic() - start < 30


@posix
def test_a_signal_that_is_ignored_stays_so():
    program = """
import os, signal
from kvtuner_gguf.interrupts import orderly
signal.signal(signal.SIGHUP, signal.SIG_IGN)
with orderly():
    os.kill(os.getpid(), signal.SIGHUP)
    print("goes on")
assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
"""
    assert (
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
        == "goes on\n"
    )
