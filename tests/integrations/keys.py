"""`kvtuner-gguf chat` in a terminal, driven by keys: history, editing, pasted lines, commands, Ctrl-C in an answer and
in a long prompt, a session saved and gone on with. Prints the screens, to be looked at. Needs tmux.

python tests/integrations/keys.py MODEL [--columns 80] [--program kvtuner-gguf]
"""

from __future__ import annotations

import argparse
import re
import subprocess
import time
from pathlib import Path
from tempfile import TemporaryDirectory

PATIENCE_S = 120


class Screen:
    """A terminal of its own."""

    def __init__(self, columns: int, command: str) -> None:
        self.tmux = ["tmux", "-L", f"kvtuner-{id(self)}"]
        config = ("set-option", "-g", "history-limit", "5000", ";")
        self._run("-f", "/dev/null", *config, "new-session", "-d", "-x", str(columns), "-y", "45", command)

    def _run(self, *args: str) -> str:
        return subprocess.run([*self.tmux, *args], capture_output=True, text=True, check=True).stdout

    def text(self) -> str:
        return self._run("capture-pane", "-p", "-S", "-5000").rstrip()

    def keys(self, *keys: str) -> None:
        self._run("send-keys", *keys)

    def type(self, text: str) -> None:
        """And Enter."""
        self._run("send-keys", "-l", text)
        self.keys("Enter")

    def paste(self, text: str) -> None:
        """As a terminal pastes, in brackets if the program asked for them."""
        subprocess.run([*self.tmux, "load-buffer", "-"], input=text, text=True, check=True)
        self._run("paste-buffer", "-p")

    def wait(self, pattern: str, patience_s: float = PATIENCE_S) -> str:
        """The text once the pattern is in it."""
        start = time.monotonic()
        while not re.search(pattern, text := self.text(), re.DOTALL):
            assert time.monotonic() - start < patience_s, f"{pattern} is not in:\n{text}"
            time.sleep(0.05)
        return text

    def prompts(self, n: int) -> str:
        """The text once the program waits for the n-th line."""
        return self.wait(r"(?:^|\n)>(?: .*?\n>)" + f"{{{n - 1}}}$")

    def close(self) -> None:
        self._run("kill-server")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--columns", type=int, default=80)
    parser.add_argument("--program", default="kvtuner-gguf")
    options = parser.parse_args()
    with TemporaryDirectory() as folder:
        session = f"{folder}/king.session"
        chat = f"{options.program} chat {options.model} --temp 0"
        screen = Screen(options.columns, chat)
        try:
            screen.prompts(1)
            screen.type("What is the capital of France?")
            screen.prompts(2)
            screen.type("Tell me a very long story about a king.")
            screen.wait(r"king\.\n.*\w+ \w+ \w+ \w+ \w+")
            start = time.monotonic()
            screen.keys("C-c")
            screen.prompts(3)
            print(f"Ctrl-C in an answer: {time.monotonic() - start:.2f} s")
            screen.keys("Up")  # the story's line, edited to another question
            screen.wait(r"\n> Tell me a very long story about a king\.$")
            screen.keys("Up", "C-a", "C-k")
            screen.type("What is the capital of Italy?")
            screen.prompts(4)
            screen.paste("Here are two lines,\nof which this is the second. Say yes.")
            screen.keys("Enter")
            screen.prompts(5)
            for n, command in enumerate(("/stats", "/plan", f"/save {session}", "/regen", "/nonsense", "/help"), 6):
                screen.type(command)
                screen.prompts(n)
            print(screen.text())
            screen.paste("word " * 6000)
            screen.keys("Enter")
            time.sleep(1.0)  # it is reading
            start = time.monotonic()
            screen.keys("C-c")
            screen.prompts(12)
            print(f"Ctrl-C in a long prompt: {time.monotonic() - start:.2f} s")
            screen.type("/exit")
        finally:
            screen.close()
        screen = Screen(options.columns, chat)
        try:
            screen.prompts(1)
            screen.type(f"/load {session}")
            screen.prompts(2)
            screen.type("Which two countries did I ask about?")
            screen.prompts(3)
            screen.type("/stats")
            print("-" * options.columns + "\n" + screen.prompts(4))
        finally:
            screen.close()


if __name__ == "__main__":
    main()
