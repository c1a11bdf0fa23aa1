"""The commands end to end on tiny models: calibrate, show, evaluate, export, apply, strip."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from io import StringIO
from pathlib import Path

import pytest
from click.testing import CliRunner
from models import small_text

from kvtuner_gguf import Plan
from kvtuner_gguf.cli import main
from kvtuner_gguf.gguf_file import read_plan
from kvtuner_gguf.gguf_header import read_header

pytestmark = [pytest.mark.native, pytest.mark.usefixtures("short_chunks")]


@pytest.fixture
def text(tmp_path) -> Path:
    return small_text(tmp_path / "text.txt")


def copy_of(model: Path, folder: Path) -> Path:
    path = folder / "model.gguf"
    shutil.copyfile(model, path)
    return path


def run(*args: object, code: int = 0):
    result = CliRunner().invoke(main, [str(a) for a in args], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result


def calibrate(model: Path, *args: object, code: int = 0):
    return run("calibrate", model, "--chunks", 2, "--trials", 12, "-t", 1, "-c", 1024, *args, code=code)


def tensor_bytes(path: Path) -> list[bytes]:
    header, data = read_header(path), path.read_bytes()
    return [data[t.offset : t.offset + t.n_bytes] for t in header.tensors]


@pytest.mark.parametrize("arch", ["llama", "gemma3", "gemma4", "hybrid", "mla"])
def test_calibrate_writes_a_plan_that_the_run_time_obeys(arch, tiny, tmp_path, text):
    model = copy_of(tiny(arch), tmp_path)
    before = tensor_bytes(model)
    result = json.loads(calibrate(model, "-f", text, "--bits", 6.0, "--json").stdout)
    plan = read_plan(model)
    assert json.loads(plan.to_json()) == result["plan"]
    assert plan.bits_per_value <= 6.0 and plan.quality.n_positions == 3 * 128
    assert tensor_bytes(model) == before
    shown = json.loads(run("show", model, "-c", 1024, "--json").stdout)
    assert shown["source"] == "file" and shown["notes"] == []
    allocated = [(layer["type_k"], layer["type_v"]) for layer in shown["layers"]]
    assert allocated == [(p.type_k, p.type_v) for p in plan.pairs]
    names = [row["name"] for row in result["comparison"]["rows"]]
    assert names[0] == "f16 (noise floor)" and "plan" in names and any("best uniform" in n for n in names)


def test_what_is_written_is_never_worse_than_the_best_uniform_pair(tiny, tmp_path, text):
    """Where the plan loses on held-out text, the uniform pair is written instead, and the program says so."""
    model = copy_of(tiny("llama"), tmp_path)
    result = json.loads(calibrate(model, "-f", text, "--json").stdout)
    plan = read_plan(model)
    lost, beside = result["verdict"] == "lost", result["beside_best_uniform"]
    assert lost == (beside["ratio"] - 2 * beside["ratio_se"] > 1)
    assert (plan.quality == plan.rival_quality and len(set(plan.pairs)) == 1) if lost else plan.quality.kld_se > 0


def test_the_model_can_write_its_own_text(tiny, tmp_path):
    model = copy_of(tiny("llama"), tmp_path)
    calibrate(model)
    assert read_plan(model).calibration["text"] == "written by the model"


def test_the_same_seed_gives_the_same_plan(tiny, tmp_path, text):
    plans = []
    for name in ("a", "b"):
        calibrate(tiny("llama"), "-f", text, "--seed", 7, "-o", tmp_path / f"{name}.json")
        plans.append(Plan.load(tmp_path / f"{name}.json"))
    assert plans[0] == plans[1]


def test_paper_method_stays_with_its_types(tiny, tmp_path, text):
    model = copy_of(tiny("llama"), tmp_path)
    calibrate(model, "-f", text, "--method", "paper", "--bits", 6.5)
    plan = read_plan(model)
    assert plan.calibration["method"] == "paper"
    assert {t for p in plan.pairs for t in (p.type_k, p.type_v)} <= {"q8_0", "q4_0", "q2_64"}


@pytest.mark.parametrize(("head_dim", "kinds"), [(64, {"t2_64", "t3_64"}), (96, {"q2_32", "q3_32"})])
def test_low_bits_take_the_best_types_that_the_heads_allow(tiny, tmp_path, text, head_dim, kinds):
    out = tmp_path / "plan.json"
    calibrate(tiny("llama", head_dim=head_dim), "-f", text, "--bits", 3.25, "-o", out)
    plan = Plan.load(out)
    assert plan.bits_per_value <= 3.25
    low = {t for p in plan.pairs for t in (p.type_k, p.type_v) if t[:2] in ("q2", "q3", "t2", "t3")}
    assert low and low <= kinds


def test_types_that_are_named_are_taken_as_they_are(tiny, tmp_path, text):
    out = tmp_path / "plan.json"
    calibrate(tiny("llama"), "-f", text, "--bits", 3.0, "--types", "q3_32,q2_32,q2_64", "-o", out)
    assert {t for p in Plan.load(out).pairs for t in (p.type_k, p.type_v)} <= {"q3_32", "q2_32", "q2_64"}


def test_k_is_conditioned_where_that_was_measured_to_help(tiny, tmp_path, text):
    model = copy_of(tiny("qwen2", k_outlier=40.0, outlier_layers=(0, 2)), tmp_path)
    result = json.loads(calibrate(model, "-f", text, "--bits", 6.0, "--json").stdout)
    plan = read_plan(model)
    assert plan.k_vectors[0].mean and plan.k_vectors[2].mean
    assert plan.bits_per_value <= 6.0
    rows = {row["name"]: row for row in result["comparison"]["rows"]}
    assert rows["plan"]["kld_mean"] < 0.7 * rows["plan, K not conditioned"]["kld_mean"]
    assert rows["plan"]["bytes"] - rows["plan, K not conditioned"]["bytes"] == plan.vector_bytes > 0
    shown = json.loads(run("show", model, "-c", 1024, "--json").stdout)
    assert shown["notes"] == [] and [(layer["k_mean"], layer["k_scale"]) for layer in shown["layers"]] == [
        (bool(v.mean), bool(v.scale)) for v in plan.k_vectors
    ]
    assert next(m for m in shown["memory"] if m["name"] == "plan")["bytes"] == rows["plan"]["bytes"]
    assert "K conditioned: mean in layers 0" in run("show", model).output
    evaluated = json.loads(run("evaluate", "-m", model, "-f", text, "--chunks", 2, "-t", 1, "--json", "file").stdout)[
        "rows"
    ][1]
    assert evaluated["kld_mean"] < rows["plan, K not conditioned"]["kld_mean"]


@pytest.mark.parametrize(
    ("options", "mean", "scale"),
    [
        (["--no-k-mean"], False, True),
        (["--no-k-scale"], True, False),
        (["--no-k-mean", "--no-k-scale"], False, False),
        (["--method", "paper", "--bits", 6.5], False, False),
    ],
)
def test_conditioning_can_be_left_out(tiny, tmp_path, text, options, mean, scale):
    model = tiny("qwen2", k_outlier=40.0, outlier_layers=(0, 2))
    calibrate(model, "-f", text, *options, "-o", tmp_path / "plan.json")
    plan = Plan.load(tmp_path / "plan.json")
    assert mean or not plan.k_mean
    assert scale or not plan.k_scale


def test_memory_goal_is_kept_at_the_context(tiny, tmp_path, text):
    model = copy_of(tiny("llama"), tmp_path)
    calibrate(model, "-f", text, "--memory", "640K")
    shown = json.loads(run("show", model, "-c", 1024, "--json").stdout)
    assert next(m["bytes"] for m in shown["memory"] if m["name"] == "plan") <= 640 * 1024


def test_kld_goal_gives_less_memory_for_a_looser_one(tiny, tmp_path, text):
    bits = []
    for goal in (0.0005, 0.02):
        out = tmp_path / f"{goal}.json"
        calibrate(tiny("llama"), "-f", text, "--max-kld", goal, "-o", out)
        bits.append(Plan.load(out).bits_per_value)
    assert bits[0] > bits[1]


def test_a_goal_out_of_reach_names_what_is_needed(tiny, text):
    out = calibrate(tiny("llama"), "-f", text, "--bits", 2, code=1).output
    assert "Error: goal of" in out and "the cheapest plan needs" in out
    out = calibrate(tiny("llama"), "-f", text, "--max-kld", "1e-12", code=1).output
    assert "the best plan tried has" in out


def test_a_text_too_short_names_the_tokens(tiny, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("too short " * 20)
    assert "need 1280" in calibrate(tiny("llama"), "-f", short, code=1).output


def test_what_was_measured_is_not_measured_again(tiny, tmp_path, text, monkeypatch):
    from kvtuner_gguf.calibrate import jobs

    measured = []
    real = jobs.measure

    def stopped(session, pairs, reference, **kwargs):
        if len(measured) == 5:
            raise KeyboardInterrupt
        measured.append(ran(pairs, kwargs))
        return real(session, pairs, reference, **kwargs)

    def ran(pairs, kwargs):
        """What a run was of: the same pairs are measured with K conditioned, and without as rivals."""
        return pairs and (pairs, tuple(kwargs.get("k_vectors", ())))

    monkeypatch.setattr(jobs, "measure", stopped)
    args = [
        "calibrate",
        str(tiny("llama")),
        "-f",
        str(text),
        "--chunks",
        "2",
        "--trials",
        "12",
        "-t",
        "1",
        "-c",
        "1024",
    ]
    stopped_at = CliRunner().invoke(main, [*args, "-o", str(tmp_path / "a.json")])
    assert stopped_at.exit_code != 0 and "the same command goes on with it" in stopped_at.stderr
    assert "all of it: about" in stopped_at.stderr.split("[1/10]")[0]
    monkeypatch.setattr(jobs, "measure", lambda s, p, r, **k: (measured.append(ran(p, k)), real(s, p, r, **k))[1])
    again = run(*args, "-o", tmp_path / "a.json")
    assert "going on with what was measured before" in again.stderr and "all of it" not in again.stderr
    search = measured[: -(1 + 1)]
    first, later = measured[:5], search[5:]
    assert not {p for p in first if p} & {p for p in later[: 12 - 5] if p}
    monkeypatch.setattr(jobs, "measure", real)
    assert "going on" not in run(*args, "--fresh", "-o", tmp_path / "b.json").stderr
    assert Plan.load(tmp_path / "a.json") == Plan.load(tmp_path / "b.json")


def test_another_goal_reuses_what_was_measured(tiny, tmp_path, text, monkeypatch):
    """On a file that has its plan by now: text, errors and the runs of equal plans are there."""
    from kvtuner_gguf.calibrate import jobs
    from kvtuner_gguf.calibrate import measured as measured_model

    model = copy_of(tiny("llama"), tmp_path)
    calibrate(model, "-f", text, "--bits", 6.0)
    measured = []
    real = jobs.measure
    monkeypatch.setattr(jobs, "measure", lambda s, p, r, **k: (measured.append(p), real(s, p, r, **k))[1])
    monkeypatch.setattr(measured_model, "error_table", None)
    calibrate(model, "-f", text, "--bits", 6.0)
    assert [p for p in measured if p is not None] == []
    calibrate(model, "-f", text, "--bits", 7.0)
    assert read_plan(model).bits_per_value <= 7.0


def test_solve_plans_for_another_goal_without_a_run(tiny, tmp_path, text, monkeypatch):
    from kvtuner_gguf.calibrate import jobs

    model = copy_of(tiny("llama"), tmp_path)
    same = ("--chunks", 2, "-c", 1024, "-f", text)
    untouched = run("solve", model, *same, code=1).output
    assert "not measured" in untouched and "kvtuner-gguf calibrate" in untouched
    calibrate(model, "-f", text, "--bits", 6.0, "-o", tmp_path / "six.json")

    def no_run(*args: object, **kwargs: object) -> None:
        raise AssertionError("solve measured a plan")

    monkeypatch.setattr(jobs, "measure", no_run)
    result = json.loads(run("solve", model, *same, "--bits", 4.6, "-o", tmp_path / "less.json", "--json").stdout)
    plan = Plan.load(tmp_path / "less.json")
    assert 4.0 < plan.bits_per_value <= 4.6 and plan.quality is None
    assert read_plan(model) is None
    sizes, klds = [p["n_bytes"] for p in result["front"]], [p["kld"] for p in result["front"]]
    assert sizes == sorted(sizes) and klds == sorted(klds, reverse=True) and len(sizes) > 3
    assert klds[-1] < result["kld"] < klds[0]
    table = list(csv.DictReader(StringIO(run("solve", model, *same, "--bits", 4.6, "--csv", "sensitivities").stdout)))
    assert [list(row.values()) for row in table] == [list(map(str, s.values())) for s in result["sensitivities"]]
    adds = {(s["il"], s["side"], s["type"]): s["kld"] for s in result["sensitivities"]}
    assert {key[:2] for key in adds} == {(il, side) for il in range(4) for side in "kv"}
    assert all(0 < adds[il, side, "q8_0"] < adds[il, side, "q4_0"] for il in range(4) for side in "kv")
    sides = [(il, side, t) for il, p in enumerate(plan.pairs) for side, t in (("k", p.type_k), ("v", p.type_v))]
    total = sum(adds.get(side, 0) for side in sides)
    assert 0 <= result["kld"] - total < result["kld"]
    assert run("solve", model, *same, "--bits", 4.6, "--csv", "front").stdout.startswith("bits_per_value,n_bytes,kld\n")
    within = json.loads(run("solve", model, *same, "--max-kld", result["kld"], "--json").stdout)
    assert within["plan"]["bits_per_value"] < 6 and within["kld"] <= result["kld"]
    monkeypatch.undo()
    assert "less.json" in run("evaluate", "-m", model, tmp_path / "less.json", *same, "-t", 1).output


@pytest.mark.parametrize("goal", [("--bits", 6.0), ("--max-kld", 0.02)])
def test_what_is_found_on_a_copy_is_shown_on_the_model_too(tiny, tmp_path, own_cache, text, monkeypatch, goal):
    """A KLD that is asked for is searched on the model itself, whose noise floor is its own."""
    from kvtuner_gguf.calibrate import measured, weights
    from kvtuner_gguf.runtime import Session

    model, seen, on_copy = tmp_path / "q4_1.gguf", [], goal[0] == "--bits"
    with Session(tiny("llama")) as session:
        session.save_as(model, "q4_1")
    real = measured.make_reference
    monkeypatch.setattr(weights, "GAIN", 0.0)
    monkeypatch.setattr(
        measured,
        "make_reference",
        lambda session, chunks, path, *rest: (
            seen.append((path.stem, session.path == model)) or real(session, chunks, path, *rest)
        ),
    )
    result = json.loads(calibrate(model, "-f", text, *goal, "-o", tmp_path / "plan.json", "--json").stdout)
    own = [("heldout", True)]
    assert seen == ([("search", False), ("heldout", False), *own] if on_copy else [("search", True), *own])
    floor, plan, *_ = result["comparison"]["rows"]
    of_own = result["comparison"]["own_weights"]
    assert [row["name"] for row in of_own] == (
        ["own weights, f16 (noise floor)", "own weights, plan"] if on_copy else []
    )
    kind, made = result["comparison"]["weights"], result["plan"]
    assert kind in ({"bf16", "f16"} if on_copy else {None}) and made.get("calibration.proof_weights") == kind
    if on_copy:
        assert of_own[1]["bytes"] == plan["bytes"] and of_own[1]["n_positions"] == plan["n_positions"] / 2
        shown = run("show", model, "--plan", tmp_path / "plan.json", "-c", 1024).output
        assert f"(weights in {kind})" in shown
        # the copy's activations are not rounded to 8 bits
        assert of_own[1]["kld_mean"] != plan["kld_mean"] > 0 and of_own[0]["kld_mean"] != floor["kld_mean"]
    solved = json.loads(run("solve", model, "--chunks", 2, "-c", 1024, "-f", text, "--bits", 5.5, "--json").stdout)
    assert solved["plan"]["bits_per_value"] <= 5.5
    assert own_cache.is_dir() and not list(own_cache.rglob("*.gguf"))


def test_a_killed_run_leaves_the_old_file(tiny, tmp_path, text):
    model = copy_of(tiny("llama"), tmp_path)
    before = model.read_bytes()
    command = [
        sys.executable,
        "-m",
        "kvtuner_gguf.cli",
        "calibrate",
        str(model),
        "-f",
        str(text),
        "--chunks",
        "2",
        "-t",
        "1",
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=dict(os.environ))
    time.sleep(2.5)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert model.read_bytes() == before or read_plan(model) is not None


def test_export_strip_apply_round_trip(tiny, tmp_path):
    model = copy_of(tiny("llama"), tmp_path)
    original, sidecar = model.read_bytes(), tmp_path / "plan.json"
    plan = Plan.uniform(next(iter(Plan.from_json('{"schema_version":1,"type_k":["q8_0"],"type_v":["q4_0"]}').pairs)), 4)
    plan.save(sidecar)
    run("apply", model, sidecar)
    assert read_plan(model) == plan
    run("export", model, "-o", tmp_path / "again.json")
    assert Plan.load(tmp_path / "again.json") == plan
    run("strip", model)
    assert model.read_bytes() == original
    assert "holds no plan" in run("export", model, code=1).output


def test_evaluate_prints_a_row_for_each_plan(tiny, tmp_path, text):
    model, sidecar = tiny("llama"), tmp_path / "plan.json"
    Plan.from_json(
        '{"schema_version":1,"type_k":["q8_0","q4_0","q8_0","f16"],"type_v":["q4_0","q4_0","q8_0","f16"]}'
    ).save(sidecar)
    out = run(
        "evaluate",
        "-m",
        model,
        "-f",
        text,
        "--chunks",
        2,
        "-t",
        1,
        "--json",
        sidecar,
        "q8_0",
        "-ctk",
        "q4_0",
        "-ctv",
        "q4_0",
        "q4_0/q8_0",
    ).stdout
    rows = {row["name"]: row["kld_mean"] for row in json.loads(out)["rows"]}
    assert list(rows)[1:] == [str(sidecar), "q8_0", "q4_0/q8_0", "q4_0/q4_0"]
    assert rows["q8_0"] < rows["q4_0/q4_0"]


def test_evaluate_refuses_a_plan_of_another_model(tiny, tmp_path, text):
    sidecar = tmp_path / "plan.json"
    Plan.from_json('{"schema_version":1,"type_k":["q8_0"],"type_v":["q4_0"]}').save(sidecar)
    out = run("evaluate", "-m", tiny("llama"), "-f", text, "--chunks", 2, sidecar, code=1).output
    assert "has 1 layers, the model has 4" in out


def test_show_names_a_faulty_plan(tiny):
    from gguf import GGUFValueType

    model = tiny("llama", extra=(("kvtuner.type_k", GGUFValueType.UINT32, 3),))
    shown = json.loads(run("show", model, "-c", 256, "--json").stdout)
    assert shown["source"] == "none" and len(shown["notes"]) == 1
    assert {layer["type_k"] for layer in shown["layers"]} == {"f16"}


def test_a_program_gets_what_the_command_prints(tiny, tmp_path, text):
    """The API and the command are one: the same options, the same plan, and the KLD that evaluate measures."""
    from kvtuner_gguf import api

    model = copy_of(tiny("llama"), tmp_path)
    options = api.Options(model, api.WithinBits(6.0), n_ctx=1024, text=text, n_chunk=2, n_trials=12, n_threads=1)
    outcome = api.calibrate(options)
    run("calibrate", model, "-f", text, "--chunks", 2, "--trials", 12, "-t", 1, "-c", 1024, "-o", tmp_path / "a.json")
    assert api.read_plan(tmp_path / "a.json") == outcome.plan
    solved = api.solve(dataclasses.replace(options, goal=api.WithinBits(5.0)))
    assert 0 < solved.plan.bits_per_value <= 5.0 and solved.front
    table = api.evaluate(model, {"plan": outcome.plan}, n_ctx=1024, text=text, n_chunk=2, n_threads=1)
    assert [row.name for row in table.rows] == ["f16 (noise floor)", "plan"]
