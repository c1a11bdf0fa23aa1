#!/usr/bin/env python3
"""Registers, shared memory and spills of our CUDA kernels, by the compiler's own report. Fails if one spills. No GPU
needed.

BUILD is a build folder configured with -DGGML_CUDA=ON: its compiler, its source tree.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

NATIVE = Path(__file__).resolve().parents[1] / "native"
OURS = (NATIVE / "ggml-base", NATIVE / "ggml-cuda")
ARCHS = ("75", "80", "86", "89", "90", "120a")
FLAGS = ("-c", "-O3", "-std=c++17", "-DNDEBUG", "-use_fast_math", "-extended-lambda", "-Xptxas", "-v")
EXACT = ("-fmad=false", "-ftz=false", "-prec-div=true", "-prec-sqrt=true")  # as CMakeLists.txt compiles kvt-cuda.cu
ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\S+)'.*?(?P<stack>\d+) bytes stack frame, (?P<store>\d+) bytes spill stores, "
    r"(?P<load>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)


def compile_report(nvcc: str, include: list[str], source: Path, arch: str, *flags: str) -> list[dict[str, str]]:
    """ptxas' figures of each kernel in a source file."""
    with tempfile.TemporaryDirectory() as tmp:
        command = [nvcc, *FLAGS, *flags, f"-arch=sm_{arch}", *include, str(source), "-o", f"{tmp}/out.o"]
        run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        sys.exit(f"registers: {source.name} did not compile for sm_{arch}:\n{run.stderr[-3000:]}")
    return [m.groupdict() for m in ENTRY.finditer(run.stdout + run.stderr)]


def group_of(name: str) -> tuple[str, str] | None:
    """What a kernel is counted under; None if it is not ours."""
    if attn := re.search(r"k_kvt_attnILi(\d+)E", name):
        return "k_kvt_attn", f"head size {attn[1]}"
    kernel = re.search(r"k_kvt_\w+?(?=IL)|dequantize_block|k_get_rows", name)
    return (kernel[0], "all types") if kernel and "kvt" in name else None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("build", type=Path)
    parser.add_argument("--arch", nargs="+", default=ARCHS, help=f"[default: {' '.join(ARCHS)}]")
    args = parser.parse_args()

    cache = (args.build / "CMakeCache.txt").read_text()
    nvcc = re.search(r"^CMAKE_CUDA_COMPILER:\w+=(.*)$", cache, re.MULTILINE)[1]
    ggml = args.build / "llama.cpp" / "ggml"
    cuda = ggml / "src" / "ggml-cuda"
    include = [f"-I{folder}" for folder in (cuda, ggml / "include", ggml / "src", *OURS)]
    own = NATIVE / "ggml-cuda"
    plain = (own / "kvt-attn.cu", cuda / "convert.cu", cuda / "getrows.cu")
    sources = [(own / "kvt-cuda.cu", EXACT), *((source, ()) for source in plain)]
    n_spill = 0

    print("arch     kernel             of              registers   smem  spills", flush=True)
    for arch in args.arch:
        for source, flags in sources:
            groups = defaultdict(list)
            for figures in compile_report(nvcc, include, source, arch, *flags):
                if group := group_of(figures["name"]):
                    groups[group].append(figures)
            for (kernel, of), found in groups.items():
                spills = sum(int(f["store"]) + int(f["load"]) for f in found)
                smem = max(int((re.search(r"(\d+) bytes smem", f["rest"]) or [0, 0])[1]) for f in found)
                registers = max(int(f["registers"]) for f in found)
                n_spill += spills > 0
                print(f"sm_{arch:<5} {kernel:<18} {of:<15} {registers:>9} {smem:>6} {spills:>7}", flush=True)
    return n_spill > 0


if __name__ == "__main__":
    sys.exit(main())
