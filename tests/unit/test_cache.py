"""The cache folder: closed to others, tried before it is used, and rid of what a killed process left."""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path

import pytest

from kvtuner_gguf import cache
from kvtuner_gguf.errors import KvtunerError

posix = pytest.mark.skipif(os.name == "nt", reason="needs POSIX modes, locks and signals")
pytestmark = pytest.mark.usefixtures("own_cache")


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@posix
@pytest.mark.parametrize("before", [None, 0o755, 0o777, 0o700])
def test_it_is_its_owners_alone(before):
    if before is not None:
        cache.cache_dir().mkdir(parents=True)
        cache.cache_dir().chmod(before)
    assert cache.open_cache() == cache.cache_dir() and mode(cache.cache_dir()) == 0o700
    with cache.scratch() as folder:
        assert mode(folder) == 0o700


@pytest.mark.parametrize("kind", ["file", "device"])
def test_a_variable_that_names_no_folder_is_named(kind, own_cache, tmp_path, monkeypatch):
    if sys.platform == "win32" and kind == "device":
        pytest.skip("needs /dev/null")
    own_cache.touch()
    if kind == "device":
        monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    with (
        pytest.raises(
            KvtunerError, match=r"cache folder .*kvtuner-gguf: cannot be written .* Set \w+ to a folder that can"
        ),
        cache.scratch(),
    ):
        pytest.fail("opened")


def test_a_folder_that_takes_no_file_is_named(monkeypatch):
    def fail(**_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(cache.tempfile, "TemporaryFile", fail)
    with pytest.raises(KvtunerError, match="Read-only file system"):
        cache.open_cache()


@pytest.mark.parametrize("end", [None, ValueError, KeyboardInterrupt, SystemExit])
def test_scratch_goes_however_the_block_ends(end):
    try:
        with cache.scratch() as folder:
            (folder / "deep").mkdir()
            (folder / "deep" / "large").write_bytes(b"x")
            if end:
                raise end
    except BaseException as error:
        assert type(error) is end
    assert os.listdir(cache.cache_dir()) == []


@posix
def test_a_lock_is_one_processs_and_ends_with_it(tmp_path):
    with cache.lock(tmp_path / "lock") as first, cache.lock(tmp_path / "lock") as second:
        assert first is True and second is False
    with cache.lock(tmp_path / "lock") as again:
        assert again is True


@posix
def test_a_user_without_a_home_is_told_what_to_set(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(
        Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("Could not determine home directory."))
    )
    with pytest.raises(KvtunerError, match="Set XDG_CACHE_HOME"):
        cache.open_cache()
