"""The CUDA code of our cache types, without a GPU: run on the host, thread by thread, and compared with the CPU's
codecs."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from compiling import compiled, of_library

from kvtuner_gguf.calibrate.options import DEFAULT_TYPES, PAPER_TYPES
from kvtuner_gguf.codecs import CODECS

pytestmark = pytest.mark.native

SOURCES = Path(__file__).resolve().parents[1] / "cuda"
OURS = ["q2_64", "q2_32", "q3_64", "q3_32", "q6_32", "k2_64", "k3_64", "k4_64", "k5_64", "t2_64", "t3_64", "t4_64"]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Lines "ok|FAIL type what" of tests/cuda/host.cpp, on the library that is tested."""
    program = compiled(SOURCES / "host.cpp", tmp_path_factory.mktemp("cuda"), *of_library("ggml-base"))
    return subprocess.run([str(program)], capture_output=True, text=True).stdout.splitlines()


def test_what_a_gpu_checks_says_that_there_is_none(tmp_path):
    program = compiled(SOURCES / "device.cpp", tmp_path, *of_library("ggml", "ggml-base"))
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
    assert "dequantize, for conversions and rows" in tried
    assert sum(what.startswith("set rows") for what in tried) == (0 if name == "iq4_nl" else 2)


def test_attention_reads_every_type_that_a_plan_may_give_to_k_or_to_v(results):
    """Of each K type and each V type in one kernel: so every pair is read."""
    tried = set(re.findall(r"attention over (\w+)-(\w+), head size (\d+)", "\n".join(results)))
    names = set(CODECS) - {"f32", "bf16"}  # the graph casts an f32 cache to f16; bf16 stands beside itself only
    assert names >= set(DEFAULT_TYPES + PAPER_TYPES)
    sizes = {"64", "128", "256"}
    assert {(k, d) for k, _, d in tried} == {(name, d) for name in names for d in sizes}
    for_v = {name for name in names if not CODECS[name].groups}
    assert {(v, d) for _, v, d in tried} == {(name, d) for name in for_v for d in sizes}
