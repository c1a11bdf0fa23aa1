"""Freezes examples/stream.py, and a program that imports llama_cpp alone, by PyInstaller, and runs them with an empty
environment: is the plan in force, and does it answer?

python tests/integrations/frozen.py WHEEL MODEL
"""

from __future__ import annotations

import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory

from environment import asked, installed

from kvtuner_gguf import Llama

ROOT = Path(__file__).resolve().parents[2]
ALONE = """
import sys
import llama_cpp
llm = llama_cpp.Llama(sys.argv[1], n_ctx=4096, verbose=False)
from kvtuner_gguf import native
print(*(f"{layer.type_k}/{layer.type_v}" for layer in native.ctx_layers(llm._model.model, llm._ctx.ctx)))
llm.close()
"""


def frozen(python: Path, program: Path, folder: Path) -> Path:
    """The program as one folder that needs no Python, outside of which it is run."""
    command = [python, "-m", "PyInstaller", "--noconfirm", "--log-level", "WARN", "--onedir", program]
    subprocess.run(command, cwd=folder, check=True)
    return folder / "dist" / program.stem


def run(folder: Path, *args: object) -> subprocess.CompletedProcess[str]:
    command = [str(folder / folder.name), *map(str, args)]
    return subprocess.run(command, env={}, cwd="/", capture_output=True, text=True, check=True)


def mib(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 2**20


def main() -> None:
    wheel, model, plan = asked(__doc__)
    llm = Llama(str(model), n_ctx=4096, verbose=False)
    want = f"cache: {llm.kv_bytes / 2**20:.1f} MiB"
    llm.close()
    with TemporaryDirectory() as tmp:
        folder = Path(tmp)
        python = installed(folder / "venv", ("pyinstaller", str(wheel)))
        (folder / "alone.py").write_text(ALONE)
        stream = frozen(python, ROOT / "examples" / "stream.py", folder)
        answer = run(stream, model, "Say hello.")
        assert answer.stderr.splitlines() == [want] and answer.stdout.strip(), answer
        print(f"stream.py, {mib(stream):.0f} MiB: {want}; {answer.stdout.strip()!r}")
        alone = frozen(python, folder / "alone.py", folder)
        layers = run(alone, model).stdout.split()
        assert layers == [str(pair) for pair in plan.pairs if pair.type_k], layers
        print(f"a program that imports llama_cpp alone, {mib(alone):.0f} MiB: plan in force")


if __name__ == "__main__":
    main()
