"""The report of a calibration: a page that needs nothing else."""

from __future__ import annotations

import json
import shutil
from html.parser import HTMLParser

import pytest
from click.testing import CliRunner
from gguf import GGUFValueType
from models import small_text

from kvtuner_gguf import Plan
from kvtuner_gguf.cli import main
from kvtuner_gguf.pair import Pair

pytestmark = pytest.mark.native

ARGUMENTS = ("--chunks", 2, "--trials", 12, "-t", 1, "-c", 1024, "--bits", 6)


class Page(HTMLParser):
    """Texts of cells and titles, and whatever points out of the page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.cells, self.titles, self.links, self.inside = [], [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.inside = tag
        self.links += [value for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag):
        self.inside = ""

    def handle_data(self, data):
        {"td": self.cells, "h1": self.titles, "h2": self.titles}.get(self.inside, []).append(data)


def run(*args: object, code: int = 0):
    result = CliRunner().invoke(main, [str(a) for a in args], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result


@pytest.fixture
def model(short_chunks, tiny, tmp_path):
    return shutil.copyfile(tiny("llama"), tmp_path / "a <b> & c.gguf")


def test_a_report_shows_what_the_command_prints_and_needs_nothing_else(model, tmp_path):
    text, report = small_text(tmp_path / "text.txt"), tmp_path / "report.html"
    found = json.loads(run("calibrate", model, *ARGUMENTS, "-f", text, "--report", report, "--json").stdout)
    html = report.read_text()
    page = Page(html)
    assert page.links == [] and page.titles[0] == "K/V cache plan of a <b> & c.gguf" and len(page.titles) == 6
    for row in found["comparison"]["rows"]:
        assert row["name"] in page.cells and any(cell.startswith(f"{row['kld_mean']:.5f}") for cell in page.cells)
    assert "Tasks" not in page.titles
    drawn = html.split("Plotly.newPlot(")[1:]
    assert len(drawn) == 4
    for side in ("type_k", "type_v"):
        assert json.dumps(found["plan"][side], separators=(",", ":")) in drawn[1].replace('", "', '","')
    again = run("calibrate", model, *ARGUMENTS, "-f", text, "--report", report)  # replaced: it is one of ours
    assert f"report: {report}" in again.stderr and Page(report.read_text()).cells == page.cells


def test_what_is_drawn_is_what_was_measured(model):
    from kvtuner_gguf.calibrate.results import Sensitivity
    from kvtuner_gguf.page import geometries, memory, sensitivity, types

    plan = Plan((Pair("q8_0", "q4_0"), Pair("f16", "q2_64"), Pair("q4_0", "q4_0"), Pair("q8_0", "f16")))
    (drawn,) = types(plan).data
    assert [tuple(side) for side in drawn.text] == [plan.type_v, plan.type_k]
    assert tuple(drawn.z[1]) == (8.5, 16, 4.5, 8.5)
    shapes = geometries(model)
    by_name = {line.name: line for line in memory(shapes, plan).data}
    assert by_name["plan"].x == tuple(shape.n_ctx for shape in shapes)
    assert by_name["plan"].y[0] * 2**20 == shapes[0].bytes(plan.pairs)
    assert by_name["f16"].y[0] == pytest.approx(by_name["q8_0/q8_0"].y[0] * 16 / 8.5)
    rows = [Sensitivity(il, side, "q4_0", 4.5, 10.0 ** -(il + 1)) for il in (0, 2) for side in ("k", "v")]
    (heat,) = sensitivity(rows).data
    assert heat.x == (0, 2) and heat.y == ("K q4_0", "V q4_0") and tuple(heat.z[0]) == (-1.0, -3.0)


def test_a_report_is_refused_before_anything_is_measured(model, own_cache, tmp_path, monkeypatch):
    precious = tmp_path / "index.html"
    precious.write_text("<p>mine</p>")
    for report, why in (
        (precious, "exists, and is no report"),
        (tmp_path / "none" / "r.html", "No such file or directory"),
        (model, "is a file that is read here"),
    ):
        assert why in run("calibrate", model, *ARGUMENTS, "--report", report, code=1).output
    assert precious.read_text() == "<p>mine</p>"
    monkeypatch.setattr("kvtuner_gguf.page.find_spec", lambda name: None)
    output = run("calibrate", model, *ARGUMENTS, "--report", tmp_path / "r.html", code=1).output
    assert "pip install 'kvtuner-gguf[report]'" in output and not own_cache.exists()


TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}"


def test_tasks_are_in_the_report_if_they_were_asked(short_chunks, tiny, tmp_path):
    """And looked at before anything is measured."""
    with_template = tiny("llama", extra=[("tokenizer.chat_template", GGUFValueType.STRING, TEMPLATE)])
    model, report = shutil.copyfile(with_template, tmp_path / "model.gguf"), tmp_path / "report.html"
    tasks = tmp_path / "tasks.jsonl"
    tasks.write_text('{"prompt": "Hello", "regex": ".*", "area": "any", "max_tokens": 4}\n' * 2)
    arguments = (*ARGUMENTS, "-f", small_text(tmp_path / "text.txt"), "--report", report)
    assert "none.jsonl" in run("calibrate", model, *arguments, "--tasks", tmp_path / "none.jsonl", code=1).output
    assert not report.exists()
    found = json.loads(run("calibrate", model, *arguments, "--tasks", tasks, "--json").stdout)
    names = [row["name"] for row in found["tasks"]["rows"]]
    assert names == ["f16", "f16 (noise floor)", "plan"]
    page = Page(report.read_text())
    assert "Tasks" in page.titles and page.cells.count("100.0 +-0.0 %") == len(names)
