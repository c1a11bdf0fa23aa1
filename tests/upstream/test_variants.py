"""Attention is right as compiled for other instruction sets than this machine's: plain x86-64, AVX2, AVX-512, each with
and without products of bytes, the last one also without their permutations, and aarch64 with and without products of
bytes under qemu. What is written has the same bytes there."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from itertools import zip_longest
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "native"))

pytestmark = pytest.mark.upstream

VARIANTS = {
    "x64": "",
    "haswell": "avx2",
    "alderlake": "avx_vnni",
    "skylakex": "avx512bw",
    "cascadelake": "avx512_vnni",
    "icelake": "avx512vbmi",
}
"""ggml's name of a build of its CPU backend -> what the processor must have to run it."""

AARCH64 = ("-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64", "-DCMAKE_C_COMPILER=aarch64-linux-gnu-gcc",
           "-DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++", "-DGGML_NATIVE=OFF", "-DGGML_OPENMP=OFF")  # fmt: skip


@pytest.fixture(scope="module")
def variants_bin(builder) -> Path:
    if platform.machine() != "x86_64":
        pytest.skip(f"these variants are for x86_64, not {platform.machine()}")
    targets = " ".join(f"ggml-cpu-{name}" for name in VARIANTS)
    return builder("variants", targets, "-DGGML_NATIVE=OFF", "-DGGML_BACKEND_DL=ON", "-DGGML_CPU_ALL_VARIANTS=ON")


@pytest.mark.parametrize("variant", VARIANTS)
def test_attention_of_a_variant(variants_bin, variant, tmp_path):
    import test_attn
    import test_isolation

    if VARIANTS[variant] not in Path("/proc/cpuinfo").read_text():
        pytest.skip(f"this processor has no {VARIANTS[variant]}")
    for library in variants_bin.glob("libggml-base.so*"):
        (tmp_path / library.name).symlink_to(library)
    (tmp_path / "libggml-cpu.so").symlink_to(variants_bin / f"libggml-cpu-{variant}.so")
    test_attn.check(
        [*test_attn.PAIRS[::5], *test_attn.SHAPES[::7], *test_attn.EXTRAS[::3], *test_attn.ODD[::2], *test_attn.LOUD],
        tmp_path,
    )
    test_isolation.check([*test_isolation.PAIRS[::19], *test_isolation.SHAPES[::11]], tmp_path)


@pytest.fixture(scope="module", params=["armv8-a", "armv8.2-a+dotprod", "armv8.2-a+dotprod+i8mm"])
def aarch64_bin(request, builder) -> Path:
    for program in ("aarch64-linux-gnu-g++", "qemu-aarch64"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is missing: apt install g++-aarch64-linux-gnu qemu-user")
    arch = f"-DGGML_CPU_ARM_ARCH={request.param}"
    return builder(f"aarch64-{request.param.split('+')[-1]}", "test-backend-ops", *AARCH64, arch)


def emulated(folder: Path, program: Path, *args: str) -> subprocess.CompletedProcess[str]:
    """A program for aarch64, with the libraries of a folder."""
    command = ["qemu-aarch64", "-L", "/usr/aarch64-linux-gnu", str(program), *args]
    env = {**os.environ, "QEMU_SET_ENV": f"LD_LIBRARY_PATH={folder}"}
    return subprocess.run(command, env=env, capture_output=True, text=True)


@pytest.mark.parametrize(
    "cases",
    [
        "hsk=(64|128|256),.*kv=113,nb=3,mask=1,sinks=.,max_bias=0.0",
        "type_K=q6_32,type_V=q[28]",
        "type_K=(q3_(32|64)|k[234]_64),type_V=(f16|q2_64|q5_1)",
    ],
)
def test_attention_on_aarch64(aarch64_bin, cases):
    program = aarch64_bin / "test-backend-ops"
    run = emulated(aarch64_bin, program, "-b", "CPU", "-o", "FLASH_ATTN_EXT", "-p", cases)
    assert run.returncode == 0 and "FAIL" not in run.stdout, (run.stdout + run.stderr)[-3000:]
    assert "\n  0/0 tests passed" not in run.stdout, f"no case is called {cases}"


def test_attention_on_aarch64_against_float64(aarch64_bin, tmp_path):
    """Upstream's bound would not see a fault in the lower bits of Q or of the weights."""
    import test_attn
    from compiling import compiled

    link = [f"-L{aarch64_bin}", "-lggml-cpu", "-lggml-base", f"-Wl,-rpath-link,{aarch64_bin}", "-pthread"]
    source = Path(__file__).with_name("attention.cpp")
    program = compiled(source, tmp_path, *link, compiler="aarch64-linux-gnu-g++")
    pairs = ["f16/f16", "bf16/f16", *(f"{k}/{v}" for k, v in zip_longest(
        (*test_attn.BLOCKS, *test_attn.GROUPS), test_attn.BLOCKS[::-1], fillvalue="q8_0"))]  # fmt: skip
    run = emulated(aarch64_bin, program, *pairs)
    assert run.returncode == 0, run.stderr[-3000:]
    lines = [line.split() for line in run.stdout.splitlines()]
    assert len(lines) == 4 * len(pairs)
    for pair, error, loud in lines:
        assert float(error) < test_attn.bound(*pair.split("/"), loud == "1"), (pair, loud)


ENCODERS = [
    ("", "x86-64", "sse2"),
    ("", "x86-64-v2", "sse4_2"),
    ("", "haswell", "avx2"),
    ("", "skylake-avx512", "avx512bw"),
    ("clang++", "haswell", "avx2"),
    ("clang++", "skylake-avx512", "avx512bw"),
    ("aarch64-linux-gnu-g++", "armv8-a", ""),
]
"""A compiler ("": this machine's), its name of an instruction set, and what the processor must have to run it; without
that it runs under qemu."""


@pytest.mark.parametrize("compiler, march, feature", ENCODERS)
def test_our_types_are_written_alike_everywhere(compiler, march, feature, tmp_path):
    from compiling import compiled
    from test_cuda import OURS

    from kvtuner_gguf import native

    source, runs, args = ROOT / "tests" / "native" / "encode.cpp", [], [f"-march={march}"]
    if not feature:
        if shutil.which("qemu-aarch64") is None:
            pytest.skip("qemu-aarch64 is missing: apt install qemu-user")
        runs, args = ["qemu-aarch64"], [*args, "-static"]
    elif platform.machine() != "x86_64" or feature not in Path("/proc/cpuinfo").read_text():
        pytest.skip(f"this processor has no {feature}")
    program = compiled(source, tmp_path, *args, compiler=compiler or None)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((300, 64), np.float32) * rng.choice(np.array([1e-6, 1, 30], np.float32), (300, 1))
    x[::7, ::9] *= 40
    x[5], x[6, 3], x[7, 2] = 0, np.nan, np.inf
    out = subprocess.run([*runs, str(program)], input=x.tobytes(), capture_output=True, check=True).stdout
    names, _, found = out.partition(b"\n")
    expected = [native.encode(name, x).tobytes() for name in names.decode().split()]
    assert len(expected) == len(OURS)
    assert found == b"".join(expected)
