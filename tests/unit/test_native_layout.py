"""The layers of native/: a folder for each target it is linked into, and what a file there may include."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

NATIVE = Path(__file__).resolve().parents[2] / "native"
FILES = sorted(p for p in NATIVE.glob("*/*") if p.suffix in (".h", ".cpp", ".cuh", ".cu"))
HEADERS = {p.name: p for p in FILES if p.suffix in (".h", ".cuh")}
GENERATED = {"kvt-fattn-pairs.h"}  # by kvt-cuda.cmake


def includes(path: Path) -> set[str]:
    """Our own headers that a file includes."""
    return set(re.findall(r'#include "(kvt[\w.-]*)"', path.read_text())) - GENERATED


def test_no_two_headers_have_one_name():
    assert len(HEADERS) == sum(p.suffix in (".h", ".cuh") for p in FILES)


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_a_file_includes_its_own_library_and_ggml_base_alone(path):
    folders = {HEADERS[name].parent.name for name in includes(path)}
    assert folders <= {path.parent.name, "ggml-base"}


def test_headers_include_each_other_in_no_circle():
    above: dict[str, set[str]] = {name: includes(path) for name, path in HEADERS.items()}
    while leaves := {name for name, below in above.items() if not below & above.keys()}:
        above = {name: below for name, below in above.items() if name not in leaves}
    assert above == {}


def test_a_plan_knows_no_cache():
    assert not includes(NATIVE / "llama/kvt-plan.cpp") & {"kvt-cache.h", "kvt-cond.h", "kvt-layer.h"}


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_the_first_line_says_what_a_file_is_for(path):
    assert re.match(rf"// {re.escape(path.name)} - \w", path.read_text())
