"""What the scripts here have in common: their arguments, and environments of their own."""

from __future__ import annotations

import argparse
import os
import subprocess
import venv
from collections.abc import Sequence
from pathlib import Path

from kvtuner_gguf import Plan
from kvtuner_gguf.gguf_file import read_plan

WITHOUT_LIBRARY = {"CMAKE_ARGS": "-DLLAMA_BUILD=OFF -DLLAVA_BUILD=OFF"}


def asked(doc: str) -> tuple[Path, Path, Plan]:
    """The wheel and the model of the command line, and the model's plan."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path, help="ours, as `pip wheel . --no-deps` builds it")
    parser.add_argument("model", type=Path, help="with a plan that quantizes V")
    options = parser.parse_args()
    plan = read_plan(options.model)
    if plan is None or all(pair.type_v in ("", "f16") for pair in plan.pairs):
        parser.error(f"{options.model}: needs a plan that quantizes V")
    return options.wheel.resolve(), options.model.resolve(), plan


def installed(folder: Path, *rounds: Sequence[str]) -> Path:
    """The Python of a new environment into which these were installed, one round after the other."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    for packages in rounds:
        command = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check", *packages]
        subprocess.run(command, check=True, env=os.environ | WITHOUT_LIBRARY)
    return python
