"""A machine without a compiler: installs from a folder of wheels with nothing but Python's own programs on PATH, an
empty home and empty caches; then fit, chat, calibrate, and serve to OpenAI's client. With --cpu also an answer on an
emulated processor (qemu-user), as `qemu-x86_64 -cpu help` names it.

python tests/integrations/fresh.py FOLDER [--python /usr/bin/python3] [--cpu IvyBridge]
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import time
from pathlib import Path
from tempfile import TemporaryDirectory

HERE = Path(__file__).parent
QUESTION = ("-p", "What is the capital of France?", "--temp", "0", "-n", "16")
NEEDED_NOT = ("cc", "c++", "gcc", "g++", "clang", "cmake", "ninja", "make", "git")
START = time.monotonic()


class Fresh:
    """An environment in a folder, whose home is empty."""

    def __init__(self, folder: Path, python: str) -> None:
        subprocess.run([python, "-m", "venv", folder / "venv"], check=True)
        self.bin, self.folder = folder / "venv" / "bin", folder
        (folder / "home").mkdir()
        pip = {key: value for key, value in os.environ.items() if key.startswith("PIP_")}
        self.env = {"PATH": str(self.bin), "HOME": str(folder / "home"), "LANG": "C.UTF-8", **pip}
        found = [name for name in NEEDED_NOT if shutil.which(name, path=self.env["PATH"])]
        assert not found, f"on PATH: {found}"

    def run(self, title: str, *command: str | Path) -> str:
        """What it prints; how long it took is told."""
        start = time.monotonic()
        made = subprocess.run(list(map(str, command)), env=self.env, cwd=self.folder, capture_output=True, text=True)
        assert made.returncode == 0, f"{title}: {made.stdout[-2000:]}{made.stderr[-2000:]}"
        now = time.monotonic()
        print(f"{title}: {now - start:.1f} s, {now - START:.0f} s from the start", flush=True)
        return made.stdout

    def ours(self, title: str, *args: str | Path) -> str:
        return self.run(title, self.bin / "kvtuner-gguf", *args)


def serve(fresh: Fresh, model: Path) -> None:
    """OpenAI's client at the server, whose address is the first thing that it says."""
    command = [str(fresh.bin / "kvtuner-gguf"), "serve", str(model), "--port", "0", "--api-key", "of-this-test"]
    with subprocess.Popen(command, env=fresh.env, stderr=subprocess.PIPE, text=True) as server:
        try:
            assert server.stderr is not None
            line = server.stderr.readline()
            print(line.strip())
            url = re.match(r"(http://\S+): ", line)
            assert url, line
            fresh.run("openai", fresh.bin / "python", HERE / "with_openai.py", f"{url[1]}/v1", "of-this-test")
        finally:
            server.terminate()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheels", type=Path, help="as tools/wheels.py makes it")
    parser.add_argument("--python", default="/usr/bin/python3")
    parser.add_argument("--cpu")
    options = parser.parse_args()
    for wheel in sorted(options.wheels.glob("*.whl")):
        print(f"{wheel.name}: {wheel.stat().st_size / 2**20:.1f} MiB")
    with TemporaryDirectory() as tmp:
        fresh = Fresh(Path(tmp), options.python)
        install = [fresh.bin / "python", "-m", "pip", "install", "-q", "--no-cache-dir"]
        install += ["--find-links", options.wheels.resolve()]
        fresh.run("pip install kvtuner-gguf", *install, "kvtuner-gguf")
        site = next((fresh.folder / "venv" / "lib").glob("python*/site-packages"))
        for name in ("kvtuner_gguf", "kvtuner_gguf.libs", "llama_cpp"):
            print(f"  {name}: {sum(f.stat().st_size for f in (site / name).rglob('*')) / 2**20:.1f} MiB")
        get = "from kvtuner_gguf.default_model import default_model; print(default_model())"
        model = Path(fresh.run("the model", fresh.bin / "python", "-c", get).strip())
        print(fresh.ours("fit", "fit", model))
        answer = fresh.ours("chat", "chat", model, *QUESTION)
        assert "Paris" in answer, answer
        fresh.run("pip install kvtuner-gguf[calibrate] openai", *install, "kvtuner-gguf[calibrate]", "openai")
        planned = Path(tmp) / "planned.gguf"
        print(fresh.ours("calibrate", "calibrate", model, "--bits", "4.5", "-o", planned))
        answer = fresh.ours("chat, under the plan", "chat", planned, *QUESTION)
        assert "Paris" in answer, answer
        serve(fresh, planned)
        if options.cpu:
            qemu = [shutil.which("qemu-x86_64") or "qemu-x86_64", "-cpu", options.cpu, fresh.bin / "python"]
            answer = fresh.run(f"chat on a {options.cpu}", *qemu, "-m", "kvtuner_gguf", "chat", planned, *QUESTION)
            assert "Paris" in answer, answer
            loaded = "import llama_cpp; print(open('/proc/self/maps').read())"
            maps = fresh.run("which backend", *qemu, "-c", loaded)
            print(sorted(set(re.findall(r"libggml-cpu-\w+", maps))))


if __name__ == "__main__":
    main()
