"""What a user is told when the source cannot be fetched, patched, or compiled."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import os
import shutil
import subprocess
import sys
import tarfile
import textwrap
from importlib.machinery import SourceFileLoader
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def series(monkeypatch):
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    loader = SourceFileLoader("series", str(ROOT / "patches" / "series"))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("series", loader))
    loader.exec_module(module)
    return module


def pip_that(monkeypatch, series, *, stderr: str = "", writes: bytes | None = None) -> None:
    """Replaces pip download by one that fails, or writes a file."""

    def run(command, **_):
        if writes is not None:
            folder = Path(command[command.index("--dest") + 1])
            (folder / f"llama_cpp_python-{series.VERSION}.tar.gz").write_bytes(writes)
        return subprocess.CompletedProcess(command, int(bool(stderr)), "", stderr)

    monkeypatch.setattr(series.subprocess, "run", run)


def test_no_pip_names_the_cure(series, monkeypatch, tmp_path):
    pip_that(monkeypatch, series, stderr="/usr/bin/python3: No module named pip")
    with pytest.raises(SystemExit, match="has no pip.*KVTUNER_LLAMA_CPP_DIR"):
        series.download(tmp_path)


def test_a_failed_download_shows_what_pip_said(series, monkeypatch, tmp_path):
    pip_that(monkeypatch, series, stderr="ERROR: no route to the index")
    with pytest.raises(SystemExit, match="(?s)could not download.*no route to the index"):
        series.download(tmp_path)


def test_another_file_is_refused_by_its_hash(series, monkeypatch, tmp_path):
    pip_that(monkeypatch, series, writes=b"not the sdist")
    with pytest.raises(SystemExit, match=f"sha256 is [0-9a-f]{{64}}, need {series.SHA256}"):
        series.download(tmp_path)


BACKEND = """
import os
from pathlib import Path
with open(os.environ["MARK"], "a") as mark:
    mark.write("ran")
def prepare_metadata_for_build_wheel(folder, config=None):
    info = Path(folder, "llama_cpp_python-VERSION.dist-info")
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\\nName: llama-cpp-python\\nVersion: VERSION\\n")
    return info.name
"""


@pytest.fixture
def private_index(series, monkeypatch, tmp_path):
    """pip looks into one folder only, which holds an sdist of the pinned name whose build code leaves a mark -> (sdist,
    mark)"""
    top, folder = f"llama_cpp_python-{series.VERSION}", tmp_path / "links"
    folder.mkdir()
    files = {
        "pyproject.toml": f"""
            [build-system]
            requires = []
            build-backend = "backend"
            backend-path = ["."]
            [project]
            name = "{series.PACKAGE}"
            version = "{series.VERSION}"
            """,
        "PKG-INFO": f"Metadata-Version: 2.1\nName: {series.PACKAGE}\nVersion: {series.VERSION}\n",
        "backend.py": BACKEND.replace("VERSION", series.VERSION),
    }
    sdist, mark = folder / f"{top}.tar.gz", tmp_path / "mark"
    with tarfile.open(sdist, "w:gz") as tar:
        for name, text in files.items():
            data = textwrap.dedent(text).encode()
            member = tarfile.TarInfo(f"{top}/{name}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    for name, value in (
        ("PIP_NO_INDEX", "1"),
        ("PIP_FIND_LINKS", str(folder)),
        ("PIP_CONFIG_FILE", os.devnull),
        ("MARK", str(mark)),
    ):
        monkeypatch.setenv(name, value)
    return sdist, mark


def test_no_code_of_an_sdist_with_another_hash_is_run(series, private_index, tmp_path):
    _, mark = private_index
    (tmp_path / "into").mkdir()
    with pytest.raises(SystemExit, match=f"index served another file, sha256 {series.SHA256} is needed"):
        series.download(tmp_path / "into")
    assert not mark.exists()


def test_the_pinned_sdist_is_fetched_from_a_private_index(series, private_index, monkeypatch, tmp_path):
    sdist, mark = private_index
    (tmp_path / "into").mkdir()
    monkeypatch.setattr(series, "SHA256", hashlib.sha256(sdist.read_bytes()).hexdigest())
    assert series.download(tmp_path / "into").read_bytes() == sdist.read_bytes()
    assert mark.exists()  # else the test above would prove nothing


def test_a_patch_that_does_not_apply_is_named(series, tmp_path):
    tree = tmp_path / "llama.cpp"
    (tree / "src").mkdir(parents=True)
    (tree / "src" / "llama-kv-cache.cpp").write_text("another version\n")
    series.commit_base(tree)
    with pytest.raises(SystemExit, match="0001-.*does not apply.*pinned source"):
        series.apply(tree)


def test_a_checkout_of_another_pin_is_refused(series, monkeypatch, tmp_path):
    tree = tmp_path / "llama.cpp"
    (tree / "src").mkdir(parents=True)
    (tree / "src" / "llama-kv-cache.cpp").write_text("this version\n")
    series.commit_base(tree)
    series.fetch(tree)
    monkeypatch.setattr(series, "BASE", "llama.cpp of another version")
    with pytest.raises(SystemExit, match=f"holds llama.cpp of {series.PACKAGE} {series.VERSION}, .*Remove it"):
        series.fetch(tree)


def test_all_that_name_the_pinned_version_name_the_same(series):
    assert series.PIN.keys() == {"version", "sha256", "commit"}
    assert f'"{series.PACKAGE}=={series.VERSION}"' in (ROOT / "pyproject.toml").read_text()
    assert f'LLAMA_CPP_COMMIT = "{series.PIN["commit"]}"' in (ROOT / "kvtuner_gguf" / "native.py").read_text()


def test_a_folder_that_holds_no_llama_cpp_is_refused(series, tmp_path):
    (tmp_path / "other").mkdir()
    with pytest.raises(SystemExit, match="other holds no llama.cpp source tree"):
        series.fetch(tmp_path / "llama.cpp", tmp_path / "other")


def test_the_id_changes_with_a_patch(series, monkeypatch, tmp_path):
    before = series.series_id()
    for patch in series.patches():
        shutil.copy(patch, tmp_path)
    monkeypatch.setattr(series, "HERE", tmp_path)
    assert series.series_id() == before
    (tmp_path / "0001-x.patch").write_text("one more")
    assert series.series_id() != before


@pytest.mark.skipif(shutil.which("cmake") is None, reason="no cmake")
def test_no_compiler_names_what_to_install(tmp_path):
    env = {k: v for k, v in os.environ.items() if k not in ("CXX", "CC")} | {"PATH": str(tmp_path)}
    command = [
        shutil.which("cmake"),
        "-S",
        str(ROOT),
        "-B",
        str(tmp_path / "build"),
        "-DCMAKE_FIND_USE_CMAKE_SYSTEM_PATH=OFF",
    ]
    run = subprocess.run(command, env=env, capture_output=True, text=True)
    assert (
        run.returncode != 0
        and "no C++ compiler was found" in run.stderr
        and "apt install g++" in run.stderr.replace("\n ", "")
    )
