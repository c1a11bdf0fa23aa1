"""The layers of the program: who may import whom. A stage never imports a stage; what runs a plan never imports what
makes one."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
STAGES = {"text", "capture", "condition", "error", "prune", "cluster", "prices", "nsga2", "weights"}
LEAVES = {
    "printable": set(),
    "errors": {"printable"},
    "atomic": set(),
    "interrupts": set(),
    "arguments": {"values"},
    "cache": {"errors"},
    "room": {"errors"},
    "default_model": {"atomic", "cache", "errors", "reading", "room"},
    "target": {"errors", "room"},
    "terminal": {"errors", "printable"},
    "codecs": {"errors"},
    "reading": {"errors"},
    "native": {"errors", "printable", "reading", "threads"},
    "values": {"errors"},
    "template": {"errors"},
    "uses": {"errors", "native"},
    "words": set(),
    "chat": {"errors", "template"},
    "pair": {"codecs", "errors"},
    "kvectors": {"codecs", "errors", "pair", "values"},
    "geometry": {"codecs", "errors", "kvectors", "pair"},
    "plan": {"atomic", "codecs", "errors", "kvectors", "pair", "quality", "reading", "room", "values"},
    "gguf_header": {"errors", "plan", "reading", "values"},
    "gguf_file": {"atomic", "errors", "gguf_header", "plan", "reading", "room", "target", "values"},
    "identity": {"errors", "gguf_file", "gguf_header", "plan", "reading"},
    "output": {"errors", "gguf_file", "gguf_header", "identity", "plan", "room", "target"},
    "in_force": {"errors", "kvectors", "native", "pair", "plan"},
    "threads": {"errors"},
    "held": {"errors", "native"},
    "llama": {"codecs", "held", "in_force", "native", "pair", "plan", "threads", "uses", "words"},
    "report": {"calibrate.options", "geometry", "pair", "plan", "printable", "quality", "shown"},
    "quality": {"errors", "values"},
    "machine": {"errors"},
    "tap": {"errors", "interrupts", "native"},
}


def imports(path: Path) -> set[str]:
    """Names of our own modules that a file imports, at any depth of its code; those of calibrate with its name."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            full = [*("kvtuner_gguf" for _ in range(node.level)), *filter(None, (node.module or "").split("."))]
            if full[0] == "kvtuner_gguf":
                inner = (
                    [".".join(full[1:])]
                    if full[1:] not in ([], ["calibrate"])
                    else [".".join([*full[1:], a.name]) for a in node.names]
                )
                found |= set(inner)
    return found


@pytest.mark.parametrize("path", sorted((ROOT / "calibrate").glob("*.py")), ids=lambda p: p.stem)
def test_a_stage_imports_no_stage(path):
    if path.stem in ("pipeline", "evaluate", "measured", "methods", "write"):
        return
    assert imports(path) & {f"calibrate.{stage}" for stage in STAGES - {path.stem}} == set()


@pytest.mark.parametrize("path", sorted((ROOT / "kvtuner_gguf").glob("*.py")), ids=lambda p: p.stem)
def test_running_a_plan_needs_no_calibration(path):
    if path.stem not in ("api", "cli", "report"):  # report: for its type hints
        assert not {name for name in imports(path) if name.startswith("calibrate")}


@pytest.mark.parametrize("name", LEAVES)
def test_low_modules_import_only_lower_ones(name):
    assert imports(ROOT / "kvtuner_gguf" / f"{name}.py") <= LEAVES[name] | {"__version__"}
