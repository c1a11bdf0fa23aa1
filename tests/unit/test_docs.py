"""The pages do not drift: links lead somewhere, what is generated is current, what is told of the code is so."""

from __future__ import annotations

import ast
import fnmatch
import importlib
import json
import re
from functools import cache
from itertools import product
from pathlib import Path

import cli_docs
import file_map
import numpy as np
import picture
import pytest

from kvtuner_gguf.codecs import CODECS
from kvtuner_gguf.plan import Plan

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "tests").rglob("*.md")])
DOCS = {page.name: page.read_text() for page in PAGES}


def anchors(page: Path) -> set[str]:
    """The fragments that GitHub gives the headings of a page."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    titles = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```|`[^`\n]*`", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"[a-z]+:", link):
            path, _, anchor = link.partition("#")
            to = (page.parent / path).resolve() if path else page
            if not to.exists() or (anchor and anchor not in anchors(to)):
                broken.append(link)
    assert broken == []


@pytest.mark.parametrize(
    "page", [page for page in PAGES if "```python" in page.read_text()], ids=lambda page: page.name
)
def test_python_takes_names_that_are_public(page):
    for code in re.findall(r"```python\n(.+?)```", page.read_text(), flags=re.DOTALL):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom):
                assert {alias.name for alias in node.names} <= {*importlib.import_module(str(node.module)).__all__}


@cache
def file_names() -> set[str]:
    return {path.name for top in ("tests", *file_map.FOLDERS) for path in (ROOT / top).rglob("*")}


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=lambda page: page.name)
def test_files_that_are_named_are_there(page):
    """In `code`: paths from the top of the repository, and bare names of files of code. * stands for any of them."""
    tops = [path.name for path in ROOT.iterdir() if path.is_dir() and path.name not in ("build", "dist")]
    named = re.findall(r"(?<!`)`([\w./*-]+)`", page.read_text())
    paths = [name for name in named if "/" in name and name.split("/")[0] in tops]
    bare = [name for name in named if "/" not in name and Path(name).suffix in file_map.CODE and name != "llama.cpp"]
    lost = [name for name in paths if not any(ROOT.glob(name.rstrip("/")))]
    lost += [name for name in bare if not fnmatch.filter(file_names(), name)]
    assert lost == []


def test_the_page_of_the_commands_is_what_help_says():
    assert cli_docs.PAGE.read_text() == cli_docs.page(), "Run tools/pages.py."


def test_the_picture_shows_the_tables():
    assert picture.PICTURE.read_text() == picture.picture(picture.PAGE.read_text()), "Run tools/pages.py."


def test_the_map_is_current():
    page = file_map.PAGE.read_text()
    assert file_map.mapped(page) == page, "Run tools/pages.py."


def test_every_file_says_what_it_is_for():
    code = [path for top in file_map.FOLDERS for path in (ROOT / top).rglob("*") if path.suffix in file_map.CODE]
    assert [path.name for path in code if path.read_text().strip() and not file_map.purpose(path)] == []


def test_the_first_page_is_short_and_begins_with_two_commands():
    text = DOCS["README.md"]
    assert len(text.splitlines()) <= 120
    first, second = re.findall(r"```bash\n(.+?)\n```", text)[:2]
    assert first.startswith("python3 -m venv .venv && CMAKE_ARGS=") and first.endswith("kvtuner-gguf demo")
    assert second == ".venv/bin/pytest"


def test_the_limits_name_the_types_with_their_bits():
    head, _, bits = re.findall(r"^\|(.+)\|$", DOCS["limits.md"], flags=re.MULTILINE)[:3]
    cells = [[cell.strip() for cell in row.split("|")][1:] for row in (head, bits)]
    assert {name: float(b) for name, b in zip(*cells)} == {c.name: c.bits_per_value for c in CODECS.values()}


def test_the_limits_name_the_architectures_that_take_no_plan():
    """The names are written as their makers do: Qwen4-exp is LLM_ARCH_QWEN4EXP."""
    (line,) = re.findall(r"^- (.+) have attention of their own", DOCS["limits.md"], flags=re.MULTILINE)
    named = {re.sub(r"[^a-z0-9]", "", name.lower()) for name in re.split(r",| and ", line)}
    assert named == {arch.lower().replace("_", "") for arch in refused()}


def refused() -> set[str]:
    table = (ROOT / "native/llama/kvt-arch.h").read_text()
    return set(re.findall(r"LLM_ARCH_(\w+), +KVT_ARCH_OWN_ATTENTION", table))


def test_the_sidecar_on_the_page_can_be_read():
    (text,) = re.findall(r"```json\n(.+?)```", DOCS["file-format.md"], flags=re.DOTALL)
    assert json.loads(Plan.from_json(text).to_json()) == json.loads(text)


def test_the_example_adds_up():
    """docs/how-it-works.md: four squared errors, four runs, the prices, and the best of all plans."""
    text = DOCS["how-it-works.md"].split("**An example by hand**")[1].split("\n## ")[0]
    rows = [
        [float(x) for x in row.split("|")]
        for row in re.findall(r"^\| layer \d, \w \| (.+) \|$", text, flags=re.MULTILINE)
    ]
    prices, floor, bits = np.array(rows[4:]), 0.004, np.array([8.5, 4.5, 2.25])
    for (*squared, kld, x), price in zip(rows[:4], rows[4:]):
        assert x == pytest.approx((kld - floor) / squared[2])
        assert price == pytest.approx([x * e for e in squared])
    plans = list(product(range(3), repeat=4))
    within = [plan for plan in plans if bits[list(plan)].sum() <= 18]
    kld = {plan: floor + prices[range(4), plan].sum() for plan in within}
    assert min(kld, key=kld.__getitem__) == (0, 1, 2, 2) and len(plans) == 81
    assert kld[0, 1, 2, 2] == pytest.approx(0.01225) and kld[1, 1, 1, 1] == pytest.approx(0.0256)
