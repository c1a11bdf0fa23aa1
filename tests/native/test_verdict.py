"""The verdict on tiny models, and how far a measurement goes on."""

from __future__ import annotations

import json

import numpy as np
import pytest
from click.testing import CliRunner
from running import prompt

from kvtuner_gguf import quality
from kvtuner_gguf.calibrate import verdict
from kvtuner_gguf.calibrate.kld import Chunks, log_softmax, make_reference, measure
from kvtuner_gguf.calibrate.runs import Runs
from kvtuner_gguf.calibrate.store import Store
from kvtuner_gguf.calibrate.verdict import PLAN, USUAL, known_grades
from kvtuner_gguf.cli import main
from kvtuner_gguf.gguf_file import write_plan
from kvtuner_gguf.pair import Pair
from kvtuner_gguf.plan import Plan

pytestmark = pytest.mark.native


def run(*args: object, code: int = 0):
    result = CliRunner().invoke(main, [str(a) for a in args])
    assert result.exit_code == code, result.output
    return result


def test_a_measurement_ends_with_the_chunk_that_is_enough(load, tiny, tmp_path):
    session = load(tiny("llama"))
    pairs = [Pair("q4_0", "q4_0")] * session.n_layer
    chunks = Chunks(np.array([prompt(128, seed) for seed in range(4)], np.int32))
    reference = make_reference(session, chunks, tmp_path / "f16")
    whole = measure(session, pairs, reference)
    seen = []
    half = measure(session, pairs, reference, enough=lambda q: seen.append(q) or len(seen) == 2)
    two = make_reference(session, Chunks(chunks.tokens[:2]), tmp_path / "two")
    assert whole.n_positions == 256 and half == seen[-1] == measure(session, pairs, two)
    assert half.n_positions == 128 and half.blocks == measure(session, pairs, two).blocks


def test_a_pair_as_stock_has_it_is_measured_until_it_is_shown_to_be_broken(load, tiny, tmp_path):
    """Beside a text's log-probabilities with others in their place, so that any cache is broken; a plan is measured on
    all of the text."""
    session = load(tiny("llama"))
    chunks = Chunks(np.array([prompt(128, seed) for seed in range(4)], np.int32))
    reference = make_reference(session, chunks, tmp_path / "f16")
    pairs = (Pair("q4_0", "q4_0"),) * session.n_layer
    right = Runs(session, reference, Store(tmp_path / "right").evaluations, "search").of_stock(pairs)
    assert right.n_positions == chunks.n_positions and right.kld_mean < 0.5
    shape = (chunks.n_positions, session.n_vocab)
    wrong = log_softmax(np.random.default_rng(0).normal(0, 20, shape).astype(np.float32))
    reference.path.write_bytes(wrong.astype(np.float16).tobytes())
    runs = Runs(session, reference, Store(tmp_path / "wrong").evaluations, "search")
    assert runs.of_stock(pairs).n_positions == chunks.n_positions / 4 and runs.of_stock(pairs).kld_mean > 0.5
    assert runs.of_plan((Pair("q4_0", "q8_0"),) * session.n_layer).n_positions == chunks.n_positions
    one_side = (Pair("q4_0", "f16"), *(Pair("f16", "f16"),) * (session.n_layer - 1))
    assert runs.of_plan(one_side).n_positions == chunks.n_positions
    priced = Runs(session, reference, Store(tmp_path / "priced").evaluations, "search")
    assert priced.kld(one_side) > 0
    assert [q.n_positions for _, q in priced.evaluations.of("search")] == [chunks.n_positions / 2]


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("".join(f"line {i} of a text, and what it says is {i * i}.\n" for i in range(400)))
    return path


def test_each_usual_pair_has_a_grade_that_its_figures_bear_out(tiny, text, tmp_path):
    """By the text and by the JSON, with the file's own plan first."""
    model, planned = tiny("llama"), tmp_path / "planned.gguf"
    write_plan(model, Plan((Pair("f16", "f16"),) * 4), planned)
    found = json.loads(run("verdict", planned, "-f", text, "-t", 1, "--json").stdout)
    rows = {row["name"]: row for row in found["rows"][1:]}
    assert list(rows) == [PLAN, *map(str, USUAL)]
    assert rows[PLAN]["kld_mean"] < 1e-6 and rows[PLAN]["grade"] == "safe" and found["rows"][0]["grade"] == "safe"
    assert rows["q8_0/q8_0"]["kld_mean"] < rows["q4_0/q4_0"]["kld_mean"]
    for row in rows.values():
        low, high = row["kld_mean"] - 2 * row["kld_se"], row["kld_mean"] + 2 * row["kld_se"]
        assert row["is_clear"] == any(low > a and high < b for a, b in ((-1, 0.01), (0.01, 0.1), (0.1, 99)))
    out = run("verdict", model, "-f", text, "-t", 1).stdout
    assert "q8_0/q8_0, 8.5 bits: safe. " in out and PLAN not in out
    assert "Fewest bits that are safe: " in out and f"kvtuner-gguf calibrate {model}" in out


def test_what_was_graded_stands_beside_what_fits(tiny, text):
    model = tiny("llama", seed=7)
    assert [row["verdict"] for row in json.loads(run("fit", model, "--json").stdout)["rows"]] == [None] * 5
    rows = json.loads(run("verdict", model, "-f", text, "-t", 1, "--json").stdout)["rows"][1:]
    beside = {row["name"]: row["verdict"] for row in json.loads(run("fit", model, "--json").stdout)["rows"]}
    assert beside == {"f16": None, **{row["name"]: row["grade"] for row in rows}}
    assert "kvtuner-gguf verdict" not in run("fit", model).stdout
    run("cache", "--clear", "verdict")
    assert "kvtuner-gguf verdict" in run("fit", model).stdout


def test_a_pair_that_the_model_cannot_take_is_named(tiny, text):
    found = json.loads(run("verdict", tiny("llama", head_dim=80), "-f", text, "-t", 1, "--json").stdout)
    assert len(found["rows"]) == 1 and found["safe"] is None
    assert found["notes"] == [f"{pair}: not every layer of this model can take it" for pair in USUAL]


def test_pairs_that_are_named_are_graded_alone_and_the_others_grades_stay(tiny, text, tmp_path):
    planned = tmp_path / "planned.gguf"
    write_plan(tiny("llama", seed=8), Plan((Pair("f16", "f16"),) * 4), planned)
    everything = json.loads(run("verdict", planned, "-f", text, "-t", 1, "--json").stdout)["rows"]
    rows = json.loads(run("verdict", planned, "q4_0", "f16/q8_0", "-f", text, "-t", 1, "--json").stdout)["rows"]
    assert [row["name"] for row in rows] == ["f16 (noise floor)", "q4_0/q4_0", "f16/q8_0"]
    assert rows[1]["kld_mean"] == next(row["kld_mean"] for row in everything if row["name"] == "q4_0/q4_0")
    grades = known_grades(planned)
    assert set(grades) == {"f16/q8_0", *map(str, USUAL)} and grades["q4_0/q4_0"] == rows[1]["grade"]
    result = run("verdict", tiny("llama", head_dim=80), "q8_0", "q4_0/f16", "-f", text, code=1)
    assert "q8_0/q8_0: not every layer of this model can take it" in result.output


def test_what_a_glance_shows_to_be_broken_is_said_at_once_and_not_measured_further(tiny, text, monkeypatch):
    """By a bound that lies between what this model loses by two pairs; what is below it is measured as ever."""
    model = tiny("llama", seed=9)
    whole = {
        row["name"]: row for row in json.loads(run("verdict", model, "-f", text, "-t", 1, "--json").stdout)["rows"]
    }
    bound = (whole["q8_0/q4_0"]["kld_mean"] + whole["q4_0/q4_0"]["kld_mean"]) / 2
    assert whole["q8_0/q4_0"]["kld_mean"] < bound < whole["q4_0/q4_0"]["kld_mean"]
    for module in (quality, verdict):
        monkeypatch.setattr(module, "BROKEN", bound)
    monkeypatch.setattr(verdict, "_BEYOND_DOUBT", 0)
    result = run("verdict", model, "-f", text, "-t", 1, "--json")
    rows = {row["name"]: row for row in json.loads(result.stdout)["rows"]}
    assert list(rows) == list(whole)
    assert "q4_0/q4_0: broken (" in result.stderr and "q8_0/q8_0: broken" not in result.stderr
    assert rows["q4_0/q4_0"]["n_positions"] == 256 and rows["q4_0/q4_0"]["grade"] == "broken"
    assert rows["q8_0/q8_0"]["kld_mean"] == whole["q8_0/q8_0"]["kld_mean"]
    alone = json.loads(run("verdict", model, "q4_0", "-f", text, "-t", 1, "--json").stdout)
    assert alone["n_positions"] == 256 and alone["rows"][1] == rows["q4_0/q4_0"]
