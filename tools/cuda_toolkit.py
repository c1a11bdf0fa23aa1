#!/usr/bin/env python3
"""tools/cuda_toolkit.py DIR - a CUDA toolkit in DIR, from PyPI by package name, to compile and link with where there is
no GPU.

The wheels lack what a toolkit for development has besides: the names without a version that a linker looks for, and a
stub of the driver's libcuda.so, made here. Done before: nothing to do. Then

    cmake -B BUILD -DGGML_CUDA=ON -DCUDAToolkit_ROOT=DIR -DCMAKE_CUDA_COMPILER=DIR/bin/nvcc
    -DCMAKE_CUDA_ARCHITECTURES=86
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

VERSION = "13.0"
PACKAGES = ("cuda-nvcc", "cuda-crt", "cuda-runtime", "cuda-culibos", "cuda-cccl", "nvvm", "cublas")


def download(folder: Path) -> Path:
    """The wheels, unpacked by pip: all share one tree, which is the toolkit's."""
    wanted = [f"nvidia-{name}=={VERSION}.*" for name in PACKAGES]
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "--target"]
    run = subprocess.run([*pip, str(folder), *wanted], capture_output=True, text=True)
    if run.returncode:
        sys.exit(f"toolkit: pip could not fetch {', '.join(wanted)}:\n{run.stderr.strip()[-2000:]}")
    return folder / "nvidia" / f"cu{VERSION.split('.')[0]}"


def driver_stub(root: Path) -> None:
    """lib/stubs/libcuda.so: every function that cuda.h names, to link with, never to run."""
    stubs = root / "lib" / "stubs"
    stubs.mkdir()
    header = (root / "include" / "cuda.h").read_text()
    names = sorted(set(re.findall(r"\bcu[A-Z]\w*(?=\()", header)) | set(re.findall(r"\bcu[A-Z]\w*_v\d+\b", header)))
    code = "".join(f"int {name}(void) {{ return 34; }}\n" for name in names)  # CUDA_ERROR_STUB_LIBRARY
    command = [
        "cc",
        "-w",
        "-shared",
        "-fPIC",
        "-Wl,-soname,libcuda.so.1",
        "-x",
        "c",
        "-",
        "-o",
        str(stubs / "libcuda.so"),
    ]
    subprocess.run(command, input=code, text=True, check=True)
    (stubs / "libcuda.so.1").symlink_to("libcuda.so")  # programs that link with our library look for this name


def toolkit(root: Path) -> Path:
    """The toolkit in root, made if it is not there. -> its nvcc"""
    nvcc = root / "bin" / "nvcc"
    if nvcc.exists():
        return nvcc
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root.parent) as tmp:
        made = download(Path(tmp))
        for lib in (made / "lib").glob("*.so.*"):
            (lib.parent / f"{lib.name.split('.so.')[0]}.so").symlink_to(lib.name)
        (made / "lib64").symlink_to("lib")
        driver_stub(made)
        shutil.rmtree(root, ignore_errors=True)
        made.rename(root)
    return nvcc


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    print(toolkit(Path(sys.argv[1]).resolve()))
