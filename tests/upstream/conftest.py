"""Build folders for llama.cpp's own tools and tests, patched and stock, made once and kept."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def build(name: str, target: str, *options: str) -> Path:
    """build/<name>/bin with a target built. Skips where there is no cmake."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    cmake = shutil.which("cmake", path=path)
    if cmake is None:
        pytest.skip("cmake is missing: pip install 'kvtuner-gguf[test]'")
    folder = ROOT / "build" / name
    env = {**os.environ, "PATH": path}
    configure = [
        cmake,
        "-S",
        str(ROOT),
        "-B",
        str(folder),
        "-G",
        "Ninja",
        "-DKVTUNER_BUILD_TOOLS=ON",
        f"-DPython3_EXECUTABLE={sys.executable}",
    ]
    for command in ([*configure, *options], [cmake, "--build", str(folder), "--target", *target.split()]):
        run = subprocess.run(command, env=env, capture_output=True, text=True)
        assert run.returncode == 0, (run.stdout + run.stderr)[-3000:]
    return folder / "bin"


@pytest.fixture(scope="session")
def builder() -> Callable[..., Path]:
    return build


@pytest.fixture(scope="session")
def patched_bin() -> Path:
    return build("tools", "kvtuner kvtuner-tests")


@pytest.fixture(scope="session")
def plain_bin() -> Path:
    """Patched, but with stock's CPU attention, so that its numbers are stock's to the bit."""
    return build("plain", "kvtuner", "-DKVTUNER_CPU_ATTN=OFF")


@pytest.fixture(scope="session")
def stock_bin() -> Path:
    return build("stock", "kvtuner llama-bench test-save-load-state", "-DKVTUNER_STOCK=ON")
