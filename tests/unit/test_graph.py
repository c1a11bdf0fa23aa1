"""The floors of the program: nothing imports what lies above it, and docs/architecture.md shows who imports whom."""

from __future__ import annotations

import ast

import import_graph
import pytest


@pytest.fixture(scope="module")
def imports() -> dict[str, set[str]]:
    return import_graph.python_graph()


def test_nothing_goes_in_a_circle(imports):
    assert import_graph.circle(imports) == ""


def test_native_code_includes_nothing_in_a_circle():
    assert import_graph.circle(import_graph.native_graph()) == ""


def test_native_folders_include_from_the_floors_below_alone():
    between = import_graph.folders(import_graph.native_graph())
    assert import_graph.climbing(between, import_graph.NATIVE_FLOORS) == []


def test_modules_import_from_the_floors_below_alone(imports):
    assert import_graph.climbing(imports, import_graph.FLOORS) == []


def test_running_a_plan_needs_no_calibration(imports):
    parts = {name for name in imports if name.split(".")[0] in import_graph.PARTS}
    runs = set(imports) - parts - import_graph.MAY_CALIBRATE
    assert len(runs) > 30
    assert {name: to for name in runs if (to := imports[name] & parts)} == {}


def test_the_drawing_is_current():
    page = import_graph.PAGE.read_text()
    assert import_graph.drawn(page) == page, "Run tools/import_graph.py."


def test_imports_are_found_wherever_they_stand(tmp_path, monkeypatch):
    for name, code in {
        "kvtuner_gguf/__init__.py": "__version__ = '0'",
        "kvtuner_gguf/plan.py": "def f():\n    from . import pair, __version__",
        "kvtuner_gguf/pair.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .plan import Plan",
        "calibrate/__init__.py": "",
        "calibrate/kld.py": "import os, kvtuner_gguf.plan\nfrom ..pair import Pair\nfrom . import text",
        "calibrate/text.py": "from kvtuner_gguf.plan import Plan\nfrom kvtuner_gguf.calibrate import kld",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(code)
    monkeypatch.setattr(import_graph, "ROOT", tmp_path)
    graph = import_graph.python_graph()
    assert {name: to for name, to in graph.items() if to} == {
        "plan": {"pair", "__init__"},
        "calibrate.kld": {"plan", "pair", "calibrate.text"},
        "calibrate.text": {"plan", "calibrate.kld"},
    }
    assert import_graph.python_graph(typing=True)["pair"] == {"plan"}
    assert "calibrate.kld -> calibrate.text" in import_graph.circle(graph)
    assert import_graph.needed({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == {"a": {"b"}, "b": {"c"}, "c": set()}
    assert import_graph.climbing({"a": {"b"}, "b": set()}, ("b", "a")) == ["a imports b, which lies no floor below it"]
    assert len(import_graph.climbing({"a": {"c"}, "c": set()}, ("a b",))) == 2


def test_a_calibration_opens_no_context_without_saying_its_plan():
    """What another stage left in force must not be what this one measures."""
    silent = [
        f"{path.name}:{call.lineno}"
        for path in (import_graph.ROOT / "calibrate").glob("*.py")
        for call in ast.walk(import_graph.parsed(path.read_text()))
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr == "context"
        if len(call.args) < 2 and "pairs" not in {keyword.arg for keyword in call.keywords}
    ]
    assert silent == []
