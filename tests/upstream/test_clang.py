"""clang, which is the compiler of macOS, takes our native code."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
DATABASE = ROOT / "build" / "editable" / "compile_commands.json"

pytestmark = pytest.mark.upstream


def faults(entry: dict[str, Any], clang: str) -> str:
    """What clang says of a file, whose command is that of the build, but for what is to be written."""
    _, *args = shlex.split(entry["command"])
    out = args.index("-o")
    kept = [arg for arg in args[:out] + args[out + 2 :] if arg not in ("-c", "-fopenmp")]
    command = [clang, "-std=c++17", *kept, "-fsyntax-only"]
    run = subprocess.run(command, cwd=entry["directory"], capture_output=True, text=True)
    return run.stderr[-3000:] if run.returncode else ""


def test_clang_takes_our_native_code():
    clang = shutil.which("clang++")
    if clang is None:
        pytest.skip("clang++ is missing: apt install clang")
    if not DATABASE.is_file():
        pytest.skip("no build/editable: install with 'pip install -e .'")
    native = [e for e in json.loads(DATABASE.read_text()) if e["file"].startswith(str(ROOT / "native"))]
    assert len(native) > 15
    with ThreadPoolExecutor(2) as threads:
        said = list(threads.map(lambda entry: faults(entry, clang), native))
    assert {e["file"]: text for e, text in zip(native, said) if text} == {}
