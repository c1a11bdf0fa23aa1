"""A sidecar that lies beside its model, and what is said of a plan where it is published."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
from click.testing import CliRunner

from kvtuner_gguf import Llama
from kvtuner_gguf.cli import main
from kvtuner_gguf.errors import PlanError
from kvtuner_gguf.gguf_file import weights_hash, write_plan, write_plan_alone
from kvtuner_gguf.pair import Pair
from kvtuner_gguf.plan import Plan
from kvtuner_gguf.quality import Quality

pytestmark = pytest.mark.native

PLAN = Plan((Pair("q8_0", "q4_0"),) * 3 + (Pair("f16", "q8_0"),))


def run(*args: object, code: int = 0):
    result = CliRunner().invoke(main, [str(a) for a in args])
    assert result.exit_code == code, result.output
    return result


@pytest.fixture
def model(tiny, tmp_path):
    path = tmp_path / "model.gguf"
    shutil.copy(tiny("llama"), path)
    return path


@pytest.fixture
def beside(model):
    path = model.with_name("model.gguf.kvtuner.json")
    PLAN.save(path)
    return path


def allocated(model, **options: object) -> tuple[Pair, ...]:
    llm = Llama(str(model), n_ctx=256, n_threads=1, verbose=False, **options)
    try:
        return llm.plan.pairs
    finally:
        llm.close()


def test_a_plan_beside_a_model_is_obeyed_by_every_way_in(model, beside):
    """By our class, by the commands, and by a program that imports llama_cpp alone."""
    assert allocated(model) == PLAN.pairs
    shown = json.loads(run("show", model, "--json").stdout)
    assert shown["source"] == "sidecar" and [(x["type_k"], x["type_v"]) for x in shown["layers"]] == [
        (p.type_k, p.type_v) for p in PLAN.pairs
    ]
    assert json.loads(run("fit", model, "--json").stdout)["rows"][-1]["name"] == "plan"
    code = (
        "import sys, llama_cpp\nllm = llama_cpp.Llama(sys.argv[1], n_ctx=256, n_threads=1, verbose=False)\n"
        "from kvtuner_gguf import native\n"
        "print(*(f'{l.type_k}/{l.type_v}' for l in native.ctx_layers(llm._model.model, llm._ctx.ctx)))\nllm.close()"
    )
    command = [sys.executable, "-c", code, str(model)]
    stranger = subprocess.run(command, capture_output=True, text=True, check=True)
    assert stranger.stdout.split() == [str(pair) for pair in PLAN.pairs]
    beside.write_text("{}")
    faulty = subprocess.run(command, capture_output=True, text=True, check=True)
    assert faulty.stdout.split() == ["f16/f16"] * 4 and f"kvtuner-gguf: {beside}" in faulty.stderr


def test_a_vocabulary_that_is_loaded_alone_looks_for_no_plan(model, beside):
    code = (
        "import sys, llama_cpp\nllm = llama_cpp.Llama(sys.argv[1], vocab_only=True, verbose=False)\n"
        "print(len(llm.tokenize(b'a word')) > 0)\nllm.close()"
    )
    alone = subprocess.run([sys.executable, "-c", code, str(model)], capture_output=True, text=True, check=True)
    assert alone.stdout == "True\n" and "kvtuner-gguf:" not in alone.stderr


def test_what_is_nearer_comes_first(model, beside, tmp_path):
    """Word of the caller, then the file, then what lies beside it."""
    given, in_file = (Plan((Pair(name, "q8_0"),) * 4) for name in ("q4_0", "q5_1"))
    assert allocated(model, plan=given) == given.pairs
    assert allocated(model, plan=False) == (Pair("f16", "f16"),) * 4
    assert allocated(model, kv_overrides={"kvtuner.enabled": False}) == (Pair("f16", "f16"),) * 4
    write_plan(model, in_file)
    assert allocated(model) == in_file.pairs
    run("strip", model)
    assert allocated(model) == PLAN.pairs


def test_a_faulty_one_is_an_error_that_names_it(model, beside):
    beside.write_text('{"type_k": 1}')
    with pytest.raises(PlanError, match=r"model\.gguf\.kvtuner\.json"):
        allocated(model)
    assert "model.gguf.kvtuner.json" in run("show", model, code=1).output
    Plan((Pair("q8_0", "q8_0"),) * 5).save(beside)
    with pytest.raises(PlanError, match="5 layers, the model has 4"):
        allocated(model)


def test_apply_tells_of_other_weights(model, tmp_path):
    sidecar = tmp_path / "plan.json"
    Plan(PLAN.pairs, calibration={"weights": "deadbeefdeadbeef"}).save(sidecar)
    assert "was calibrated on other weights (deadbeefdeadbeef" in run("apply", model, sidecar).stderr
    Plan(PLAN.pairs, calibration={"weights": weights_hash(model)}).save(sidecar)
    assert "other weights" not in run("apply", model, sidecar).output


def test_a_card_says_what_was_measured_and_how_to_use_it(model, tmp_path):
    quality, rival = (
        Quality(0.0025, 0.036, 0.97, 3072, 0.0004, 0.005),
        Quality(0.0034, 0.053, 0.967, 3072, 0.0004, 0.005),
    )
    calibration = {"text": "a|b", "tokens": 2048, "proof_weights": "bf16", "weights": weights_hash(model)}
    plan = Plan(PLAN.pairs, 8.2, quality, Pair("q6_32", "q5_0"), rival, 8.3, calibration)
    write_plan(model, plan)
    card = run("export", model, "--card", "-c", "4k").stdout
    assert "| this plan | 8.20 | 0.00250 +-0.00040 | 0.036 | 97.0 +-0.5 % |" in card
    assert "| q6_32/q5_0, the best uniform pair | 8.30 | 0.00340 +-0.00040 | 0.053 | 96.7 +-0.5 % |" in card
    assert "over 3072 positions, with a copy of the model in bf16" in card
    assert "| 0-2 | q8_0 | q4_0 |\n| 3 | f16 | q8_0 |" in card and r"| text | a\|b |" in card
    shown = json.loads(run("show", model, "-c", "4k", "--json").stdout)
    assert f"at 4096 tokens {shown['memory'][0]['bytes'] / 2**20:.1f} MiB in place of" in card
    assert "kvtuner-gguf apply model.gguf model.gguf.kvtuner.json" in card and "Note:" not in card
    assert "--card is printed" in run("export", model, "--card", "-o", tmp_path / "x", code=2).output


def test_a_card_of_a_plan_that_was_never_measured(model):
    write_plan(model, PLAN)
    card = run("export", model, "--card").stdout
    assert "KLD" not in card and "How it was made" not in card and "## Layers" in card


def test_the_environment_names_a_plan_for_programs_that_read_no_json(model, load, tmp_path, monkeypatch):
    """It comes before the file's, as a given plan does; what it names in vain is told, and the file's is used."""
    alone, of_file = tmp_path / "plan.gguf", Plan((Pair("q8_0", "q8_0"),) * 4)
    write_plan_alone(PLAN, alone)
    write_plan(model, of_file)
    for path, source, pairs in ((alone, "environment", PLAN.pairs), (model, "environment", of_file.pairs)):
        monkeypatch.setenv("KVTUNER_GGUF_PLAN", str(path))
        session = load(model)
        assert (session.plan_source, session.plan_notes) == (source, [])
        with session.context(256) as ctx:
            assert tuple(Pair(layer.type_k, layer.type_v) for layer in ctx.layers()) == pairs
    for path in (tmp_path / "none.gguf", tmp_path):
        monkeypatch.setenv("KVTUNER_GGUF_PLAN", str(path))
        session = load(model)
        assert session.plan_source == "file" and "which is no GGUF with a plan" in session.plan_notes[0]
