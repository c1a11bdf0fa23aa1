"""The gate: what tools/lint checks is checked on a commit, too."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_each_check_is_a_hook():
    hooks = re.findall(r"entry: tools/lint (?:--fix )?(\w+),", (ROOT / ".pre-commit-config.yaml").read_text())
    assert hooks == list(runpy.run_path(str(ROOT / "tools" / "lint"))["CHECKS"])
