"""The gate: what tools/lint checks is checked on a commit, too, and copies of code are found."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_each_check_is_a_hook():
    hooks = re.findall(r"entry: tools/lint (?:--fix )?(\w+),", (ROOT / ".pre-commit-config.yaml").read_text())
    assert hooks == list(runpy.run_path(str(ROOT / "tools" / "lint"))["CHECKS"])


def test_code_in_two_places_is_found(tmp_path, monkeypatch):
    pytest.importorskip("pygments")
    import copies

    monkeypatch.chdir(tmp_path)
    body = "\n".join(f"    total += values[{i}] * weights[{i}] - {i}" for i in range(8))
    Path("a.py").write_text(f"def f(values, weights, total):\n{body}\n    return total\n")
    Path("b.py").write_text(f"import os\n\n\ndef g(values, weights, total):\n    # as f\n\n{body}\n    print(total)\n")
    Path("c.cu").write_text("".join(f"int a{i} = {i};\n" for i in range(40)))
    assert copies.copies(["a.py", "b.py", "c.cu"]) == ["b.py:4-14 is like a.py:1-9"]
    Path("c.cu").write_text(2 * Path("c.cu").read_text())
    assert copies.copies(["c.cu"]) == ["c.cu:41-80 is like c.cu:1-40"]
    monkeypatch.setitem(copies.MEANT, frozenset({"c.cu"}), "said twice here")
    assert copies.copies(["c.cu"]) == []
