"""The CUDA code of our cache types, without a GPU: run on the host, thread by thread, and compared with the CPU's
codecs."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.native

ROOT = Path(__file__).resolve().parents[2]
OURS = ["q2_64", "q2_32", "q3_64", "q3_32", "q6_32", "k2_64", "k3_64", "k4_64", "k5_64", "t2_64", "t3_64", "t4_64"]


def compiled(name: str, folder: Path, *libs: str) -> Path:
    """A program of tests/cuda, built against the library that is tested."""
    from kvtuner_gguf import native

    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    lib, program = native.lib_dir(), folder / name
    trees = (lib.parent, ROOT / "build" / "editable")  # of a build that is tested in its folder, or of the package
    headers = [path for tree in trees if (path := tree / "llama.cpp" / "ggml" / "include").is_dir()]
    if not compiler or not headers:
        pytest.skip("no C++ compiler" if not compiler else "no source tree in build/: install with 'pip install -e .'")
    command = [
        compiler,
        "-std=c++17",
        "-O2",
        "-ffp-contract=off",
        f"-I{headers[0]}",
        f"-I{ROOT / 'native/ggml-base'}",
        f"-I{ROOT / 'native/ggml-cuda'}",
        str(ROOT / "tests" / "cuda" / f"{name}.cpp"),
        f"-L{lib}",
        *libs,
        f"-Wl,-rpath,{lib}",
        f"-Wl,-rpath-link,{lib}",
        "-o",
        str(program),
    ]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr[-3000:]
    return program


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Lines "ok|FAIL type what" of tests/cuda/host.cpp, on the library that is tested."""
    program = compiled("host", tmp_path_factory.mktemp("cuda"), "-lggml-base")
    return subprocess.run([str(program)], capture_output=True, text=True).stdout.splitlines()


def test_what_a_gpu_checks_says_that_there_is_none(tmp_path):
    program = compiled("device", tmp_path, "-lggml", "-lggml-base")
    run = subprocess.run([str(program), "bytes"], capture_output=True, text=True)
    if run.returncode != 2:  # there is one
        assert run.returncode == 0, run.stdout
        return
    assert "finds no GPU" in run.stderr


def test_device_code_gives_the_bytes_and_values_of_the_cpu(results):
    assert [line for line in results if not line.startswith("ok ")] == []


@pytest.mark.parametrize("name", [*OURS, "iq4_nl"])
def test_every_type_is_read_and_ours_are_written(results, name):
    tried = [line.split(" ", 2)[2] for line in results if line.split(" ", 2)[1] == name]
    assert sum(what.startswith("dot product") for what in tried) == 3
    assert sum(what.startswith("set rows") for what in tried) == (0 if name == "iq4_nl" else 2)
