#!/usr/bin/env python3
"""What each file is for: writes the map in docs/architecture.md from the first sentence of each file."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/architecture.md"
BEGIN, END = "<!-- map -->\n", "<!-- /map -->"
FOLDERS = ("kvtuner_gguf", "calibrate", "native", "tools")
CODE = {".py", ".h", ".cpp", ".cu", ".cuh", ".cmake"}


def purpose(path: Path) -> str:
    """The first sentence of a file: of its docstring, or of the comment that it begins with; "" if it has none."""
    text = path.read_text()
    said = _docstring(text) if path.suffix == ".py" else _comment(text)
    said = re.split(r"\.\s+(?=[A-Z`])", " ".join(said.split("\n\n")[0].split()), maxsplit=1)[0].rstrip(".")
    return said.removeprefix(f"{path.name} - ").replace("|", "\\|").replace("<", "\\<")


@cache
def _docstring(code: str) -> str:
    return ast.get_docstring(ast.parse(code)) or ""


def _comment(text: str) -> str:
    """The comment that a file begins with, as far as its first line goes on."""
    lines: list[str] = []
    for line in text.splitlines():
        match = re.match(r"(?://|#(?!pragma|include|if|define))\s?(\S.*)", line)
        if not match or (lines and match[1][0].isupper()):
            break
        lines.append(match[1])
    return " ".join(lines).replace(" (C++, inside libllama only)", "")


def map_of(root: Path = ROOT) -> str:
    """A table for each folder, a row for each file that holds code."""
    out = []
    for top in FOLDERS:
        for folder in sorted({path.parent for path in (root / top).rglob("*") if path.suffix in CODE}):
            rows = [
                f"| `{path.name}` | {said} |"
                for path in sorted(folder.iterdir())
                if path.suffix in CODE and (said := purpose(path))
            ]
            out.append(
                f"**{folder.relative_to(root).as_posix()}/**\n\n| file | what it is for |\n|---|---|\n"
                + "\n".join(rows)
            )
    return "\n\n".join(out) + "\n"


def mapped(page: str) -> str:
    """The page with the map as it is now between its two marks."""
    before, mark, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (mark and end):
        raise SystemExit(f"{PAGE.name}: no lines {BEGIN.strip()} and {END}. Put them where the map shall be.")
    return f"{before}{mark}\n{map_of()}\n{end}{after}"


if __name__ == "__main__":
    PAGE.write_text(mapped(PAGE.read_text()))
