"""Programs of the tests that are written in C++."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def compiled(source: Path, folder: Path, *args: str, compiler: str | None = None) -> Path:
    """The program of a source, with the headers of ggml, of our types and of their CUDA code; by a compiler of this
    machine unless one is named. Skips the test if there is none, or no source tree."""
    from kvtuner_gguf import native

    found = shutil.which(compiler) if compiler else next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), "")
    trees = (native.lib_dir().parent, ROOT / "build" / "editable")  # of a build that is tested in its folder, or ours
    headers = [path for tree in trees if (path := tree / "llama.cpp" / "ggml" / "include").is_dir()]
    if not found or not headers:
        pytest.skip("no C++ compiler" if not found else "no source tree in build/: install with 'pip install -e .'")
    program = folder / source.stem
    includes = [f"-I{path}" for path in (headers[0], ROOT / "native" / "ggml-base", ROOT / "native" / "ggml-cuda")]
    command = [found, "-std=c++17", "-O2", "-ffp-contract=off", *includes, str(source), *args, "-o", str(program)]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr[-3000:]
    return program


def of_library(*names: str) -> list[str]:
    """What links a program to the library that is tested."""
    from kvtuner_gguf import native

    lib = native.lib_dir()
    return [f"-L{lib}", *(f"-l{name}" for name in names), f"-Wl,-rpath,{lib}", f"-Wl,-rpath-link,{lib}"]
