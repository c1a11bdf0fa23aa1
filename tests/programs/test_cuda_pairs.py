"""A CUDA build has a decoding kernel for every pair that the planner may choose: one list, from the table of cache
types."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from itertools import product
from pathlib import Path

import pytest

from kvtuner_gguf.calibrate.options import DEFAULT_TYPES, PAPER_TYPES
from kvtuner_gguf.codecs import CODECS

ROOT = Path(__file__).resolve().parents[2]


def generate(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """What CMakeLists.txt makes of native/ggml-cuda/kvt-cuda.cmake: a header with the pairs, and files of instances."""
    cmake = shutil.which("cmake", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if cmake is None or compiler is None:
        pytest.skip("no C++ compiler" if cmake else "cmake is missing: pip install 'kvtuner-gguf[test]'")
    script = folder / "pairs.cmake"
    script.write_text(
        f"cmake_minimum_required(VERSION 3.21)\ninclude({ROOT}/native/ggml-cuda/kvt-cuda.cmake)\n"
        f'kvt_cuda_pairs()\nkvt_cuda_instances({folder} sources)\nmessage(STATUS "stock ${{GGML_CUDA_FA_QUANTS}}")\n'
    )
    command = [cmake, f"-DCMAKE_CXX_COMPILER={compiler}", *options, "-P", str(script)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def pairs_of(folder: Path, macro: str) -> set[tuple[str, str]]:
    line = re.search(rf"#define {macro}\(X\)(.*)", (folder / "kvt-fattn-pairs.h").read_text())[1]
    return {(k.lower(), v.lower()) for k, v in re.findall(r"X\((\w+), (\w+)\)", line)}


def for_v(names: Iterable[str]) -> list[str]:
    """Those that V may have, too: group types are for K."""
    return [name for name in names if not CODECS[name].groups]


def test_the_pairs_are_those_of_the_codecs(tmp_path):
    run = generate(tmp_path)
    assert run.returncode == 0, run.stderr
    names = set(CODECS) - {"f32", "bf16"}  # the graph casts an f32 cache to f16; bf16 stands beside itself only
    assert pairs_of(tmp_path, "KVT_FATTN_PAIRS") == {*product(names, for_v(names)), ("bf16", "bf16")}


def test_every_pair_of_the_menu_has_a_decoding_kernel(tmp_path):
    run = generate(tmp_path)
    assert run.returncode == 0, run.stderr
    have = pairs_of(tmp_path, "KVT_FATTN_PAIRS")
    menu = DEFAULT_TYPES + PAPER_TYPES
    assert set(product(menu, for_v(menu))) <= have

    # and each is compiled once: by ggml-cuda, or as one of ours
    stock = {tuple(pair.split("-")) for pair in re.search(r"stock (\S+)", run.stdout)[1].split(";")}
    ours = [
        (k.lower(), v.lower(), int(head_dim))
        for file in tmp_path.glob("kvt-fattn-*.cu")
        for head_dim, k, v in re.findall(
            r"DECL_FATTN_VEC_CASE\((\d+), GGML_TYPE_(\w+), GGML_TYPE_(\w+)\)", file.read_text()
        )
    ]
    assert stock.isdisjoint(pairs_of(tmp_path, "KVT_FATTN_PAIRS_OURS"))
    assert stock | pairs_of(tmp_path, "KVT_FATTN_PAIRS_OURS") == have
    assert sorted(ours) == sorted((k, v, d) for k, v in have - stock for d in (64, 128, 256))


def test_pairs_can_be_named(tmp_path):
    assert generate(tmp_path, "-DKVTUNER_CUDA_PAIRS=q8_0-q4_0,q3_64-q2_64").returncode == 0
    assert pairs_of(tmp_path, "KVT_FATTN_PAIRS") == {
        ("f16", "f16"),
        ("bf16", "bf16"),
        ("q8_0", "q4_0"),
        ("q3_64", "q2_64"),
    }


def test_a_pair_that_does_not_exist_is_named(tmp_path):
    run = generate(tmp_path, "-DKVTUNER_CUDA_PAIRS=q8_0-q9_9")
    assert run.returncode != 0
    assert "'q8_0-q9_9' names 'q9_9'" in run.stderr


def test_a_type_for_k_only_is_not_taken_for_v(tmp_path):
    run = generate(tmp_path, "-DKVTUNER_CUDA_PAIRS=k3_64-q2_64;q8_0-k3_64")
    assert run.returncode != 0
    assert "'q8_0-k3_64' has 'k3_64' for V, and that is a type for K only" in " ".join(run.stderr.split())
