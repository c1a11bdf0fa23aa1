"""Programs from PyPI that use llama-cpp-python and know nothing of this package, in environments where they were
installed before it and after it: is the plan in force on both sides, without a note, and do they stream?

python tests/integrations/integrations.py WHEEL MODEL

WHEEL  ours, as `pip wheel . --no-deps` builds it
MODEL  with a plan that quantizes V
Some minutes, and 900 MB in the folder for temporary files.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.request import urlopen

from environment import asked, installed

HERE = Path(__file__).resolve().parent
PROGRAMS = (
    "llama-cpp-python[server]==0.3.36",
    "llm",
    "llm-gguf",
    "langchain-community",
    "llama-index-llms-llama-cpp",
    "openai",
)


def told(stderr: str) -> dict[str, list[str]]:
    """What observed.py said of the last context."""
    lines = [line for line in stderr.splitlines() if line.startswith("observed ")]
    assert lines, stderr
    return json.loads(lines[-1].removeprefix("observed "))


def of_program(python: Path, *args: object, env: dict[str, str] | None = None) -> tuple[str, dict[str, list[str]]]:
    """What a program prints, and what it was observed to allocate."""
    command = [str(x) for x in (python, HERE / "observed.py", *args)]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | (env or {}))
    assert result.returncode == 0, result.stderr
    return result.stdout.strip(), told(result.stderr)


def of_llm(python: Path, model: Path, folder: Path) -> tuple[str, dict[str, list[str]]]:
    env = {"LLM_USER_PATH": str(folder / "llm")}
    register = [python, "-m", "llm", "gguf", "register-model", "planned", model]
    subprocess.run(register, check=True, capture_output=True, env=os.environ | env)
    return of_program(python, "llm", "-m", "gguf/planned", "Say hello in three words.", env=env)


def of_server(python: Path, model: Path, folder: Path) -> tuple[str, dict[str, list[str]]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        python,
        HERE / "observed.py",
        "llama_cpp.server",
        "--model",
        model,
        "--n_ctx",
        "512",
        "--port",
        str(port),
    ]
    log = folder.with_suffix(".log")
    with open(log, "w") as stderr:
        server = subprocess.Popen([str(x) for x in command], stdout=stderr, stderr=stderr)
    try:
        for _ in range(120):
            with suppress(OSError), urlopen(f"http://127.0.0.1:{port}/v1/models") as answer:
                answer.read()
                break
            time.sleep(0.5)
        client = [python, HERE / "with_openai.py", f"http://127.0.0.1:{port}/v1"]
        answer = subprocess.run([str(x) for x in client], capture_output=True, text=True)
        assert answer.returncode == 0, answer.stderr
    finally:
        server.terminate()
        server.wait()
    return answer.stdout.strip(), told(log.read_text())


def runs(python: Path, model: Path, folder: Path) -> dict[str, Callable[[], tuple[str, dict[str, list[str]]]]]:
    """Each program, by the name that is printed."""
    return {
        "llm, llm-gguf": lambda: of_llm(python, model, folder),
        "LangChain": lambda: of_program(python, HERE / "with_langchain.py", model),
        "LlamaIndex": lambda: of_program(python, HERE / "with_llama_index.py", model),
        "llama_cpp.server": lambda: of_server(python, model, folder),
    }


def main() -> None:
    wheel, model, plan = asked(__doc__)
    want = {"layers": [str(pair) for pair in plan.pairs if pair.type_k], "notes": []}
    failed = False
    with TemporaryDirectory() as tmp:
        folder = Path(tmp)
        for order, rounds in {"before us": (PROGRAMS, (str(wheel),)), "after us": ((str(wheel),), PROGRAMS)}.items():
            python = installed(folder / order.replace(" ", "-"), *rounds)
            for name, run in runs(python, model, folder / order).items():
                answer, have = run()
                failed |= have != want
                how = "plan in force" if have == want else f"NOT AS PLANNED: {have}"
                print(f"{name}, installed {order}: {how}; {answer!r}", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
