"""What is handed on: the licences and the notices in sdist and wheel, one version, a command without its script."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

import kvtuner_gguf
from kvtuner_gguf import native

ROOT = Path(__file__).resolve().parents[2]
NOTICES = ["LICENSE", "LICENSE_THIRD_PARTY", "licenses/libgomp.txt", "licenses/xxhash.txt"]
BUILT = (".git", ".*_cache", "build", "dist", "*.gguf", ".venv", "__pycache__", "*.egg-info")  # none of it is a source


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and with the metadata that a wheel would have; a wheel itself takes minutes."""
    pytest.importorskip("scikit_build_core", reason="no scikit-build-core")
    source, out = tmp_path_factory.mktemp("source") / "tree", tmp_path_factory.mktemp("built")
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(*BUILT))
    code = (
        "import sys; from scikit_build_core import build; build.build_sdist(sys.argv[1]); "
        "build.prepare_metadata_for_build_wheel(sys.argv[1])"
    )
    subprocess.run([sys.executable, "-c", code, str(out)], cwd=source, check=True, capture_output=True)
    return out


def test_the_sdist_holds_the_notices_and_what_is_built(built):
    with tarfile.open(next(built.glob("*.tar.gz"))) as tar:
        names = {name.split("/", 1)[1] for name in tar.getnames() if "/" in name}
    assert {*NOTICES, "CMakeLists.txt", "patches/series", "kvtuner_gguf/py.typed", "calibrate/__init__.py"} <= names


def test_the_wheel_holds_the_notices(built):
    folder = next(built.glob("*.dist-info"))
    held = [str(file.relative_to(folder / "licenses")) for file in (folder / "licenses").rglob("*") if file.is_file()]
    assert sorted(held) == NOTICES
    assert "License-Expression: MIT\n" in (folder / "METADATA").read_text()


def test_the_version_is_the_packages(built):
    assert f"\nVersion: {kvtuner_gguf.__version__}\n" in (next(built.glob("*.dist-info")) / "METADATA").read_text()


def test_the_package_runs_as_a_module():
    command = [sys.executable, "-m", "kvtuner_gguf", "--version"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert run.stdout == f"kvtuner-gguf {kvtuner_gguf.__version__}, llama.cpp {native.LLAMA_CPP_COMMIT}\n"


@pytest.mark.parametrize(
    "holder",
    ["The ggml authors", "Mozilla Foundation", "Jeffrey Quesnelle", "Niels Lohmann", "Yann Collet", "Andrei Betlen"],
)
def test_whose_code_is_built_is_named(holder):
    assert holder in (ROOT / "LICENSE_THIRD_PARTY").read_text()
