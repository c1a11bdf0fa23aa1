#!/usr/bin/env python3
"""Registers, shared memory and spills of our CUDA kernels, by the compiler's own report. Fails if one spills. No GPU
needed.

BUILD is a build folder configured with -DGGML_CUDA=ON: its compiler, its source tree, its pairs of types.
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
VEC = re.compile(r"flash_attn_ext_vecILi(\d+)ELi(\d)EL9ggml_type(\d+)ELS0_(\d+)ELb(\d)")
ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\S+)'.*?(?P<stack>\d+) bytes stack frame, (?P<store>\d+) bytes spill stores, "
    r"(?P<load>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)


def pairs_of(build: Path) -> list[tuple[str, str]]:
    """The pairs that are ours in this build, as GGML_TYPE_ names."""
    text = (build / "kvt-fattn" / "kvt-fattn-pairs.h").read_text()
    return re.findall(r"X\((\w+), (\w+)\)", text.split("KVT_FATTN_PAIRS_OURS(X)")[1])


def type_names() -> dict[int, str]:
    """ggml's numbers of the types that a cache may hold."""
    names = {0: "f32", 1: "f16", 2: "q4_0", 3: "q4_1", 6: "q5_0", 7: "q5_1", 8: "q8_0", 20: "iq4_nl", 30: "bf16"}
    ours = re.findall(r"X\(\w+, (\w+), (\d+),", (NATIVE / "ggml-base" / "kvt-table.h").read_text())
    return names | {int(number): name for name, number in ours}


def compile_report(nvcc: str, include: list[str], source: Path, arch: str, *flags: str) -> list[dict[str, str]]:
    """ptxas' figures of each kernel in a source file."""
    with tempfile.TemporaryDirectory() as tmp:
        command = [nvcc, *FLAGS, *flags, f"-arch=sm_{arch}", *include, str(source), "-o", f"{tmp}/out.o"]
        run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        sys.exit(f"registers: {source.name} did not compile for sm_{arch}:\n{run.stderr[-3000:]}")
    return [m.groupdict() for m in ENTRY.finditer(run.stdout + run.stderr)]


def group_of(name: str, types: dict[int, str]) -> tuple[str, ...] | None:
    """What a kernel is counted under; None if it is not ours, or the empty variant that upstream makes of soft-cap at
    64."""
    vec = VEC.search(name)
    if vec:
        head_dim, n_col, k, v, softcap = map(int, vec.groups())
        return (
            None
            if softcap and head_dim == 64
            else ("attention", f"{types[k]}/{types[v]}", f"head size {head_dim}, {n_col} token" + "s" * (n_col > 1))
        )
    kernel = re.search(r"k_kvt_\w+?(?=IL)|dequantize_block|k_get_rows", name)
    return (kernel[0], "all types", "") if kernel and "kvt" in name else None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("build", type=Path)
    parser.add_argument("--arch", nargs="+", default=ARCHS, help=f"[default: {' '.join(ARCHS)}]")
    parser.add_argument("--pairs", nargs="+", help="K-V pairs, one of the types ours [default: the build's]")
    args = parser.parse_args()

    cache = (args.build / "CMakeCache.txt").read_text()
    nvcc = re.search(r"^CMAKE_CUDA_COMPILER:\w+=(.*)$", cache, re.MULTILINE)[1]
    ggml = args.build / "llama.cpp" / "ggml"
    cuda = ggml / "src" / "ggml-cuda"
    include = [f"-I{folder}" for folder in (cuda, ggml / "include", ggml / "src", *OURS)]
    pairs = [tuple(pair.upper().split("-")) for pair in args.pairs] if args.pairs else pairs_of(args.build)
    types = type_names()
    n_spill = 0

    with tempfile.TemporaryDirectory() as tmp:
        sources = [(NATIVE / "ggml-cuda" / "kvt-cuda.cu", EXACT), (cuda / "convert.cu", ()), (cuda / "getrows.cu", ())]
        for k, v in pairs:
            sources.append((Path(tmp) / f"{k}-{v}.cu", ()))
            cases = "".join(f"DECL_FATTN_VEC_CASE({d}, GGML_TYPE_{k}, GGML_TYPE_{v});\n" for d in (64, 128, 256))
            sources[-1][0].write_text(f'#include "fattn-vec.cuh"\n{cases}')
        print(
            "arch     kernel            types            variant                 registers   smem  spills", flush=True
        )
        for arch in args.arch:
            for source, flags in sources:
                groups = defaultdict(list)
                for figures in compile_report(nvcc, include, source, arch, *flags):
                    group = group_of(figures["name"], types)
                    if group:
                        groups[group].append(figures)
                for (kernel, pair, variant), found in groups.items():
                    spills = sum(int(f["store"]) + int(f["load"]) for f in found)
                    smem = max(int((re.search(r"(\d+) bytes smem", f["rest"]) or [0, 0])[1]) for f in found)
                    registers = max(int(f["registers"]) for f in found)
                    n_spill += spills > 0
                    print(
                        f"sm_{arch:<5} {kernel:<17} {pair:<16} {variant:<25} {registers:>7} {smem:>6} {spills:>7}",
                        flush=True,
                    )
    return n_spill > 0


if __name__ == "__main__":
    sys.exit(main())
