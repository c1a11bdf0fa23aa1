"""What an app author relies on, on the default small model: Llama with a plan, and llama_cpp.Llama after our import."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from kvtuner_gguf import Llama, Pair, Plan, PlanError
from kvtuner_gguf.cli import main
from kvtuner_gguf.codecs import codec
from kvtuner_gguf.gguf_file import write_plan

pytestmark = [pytest.mark.native, pytest.mark.model]

PAIRS = tuple(Pair("q8_0", "q4_0") if il % 3 else Pair("q5_1", "q8_0") for il in range(30))
N_VALUES = 256 * 3 * 64  # of one side of a layer at 256 tokens


@pytest.fixture(scope="module")
def planned(smol, tmp_path_factory) -> Path:
    return write_plan(smol, Plan(PAIRS), tmp_path_factory.mktemp("model") / "planned.gguf")


@pytest.fixture
def open_llama():
    opened = []

    def make(*args, **kwargs) -> Llama:
        opened.append(Llama(*map(str, args), n_ctx=256, n_threads=2, verbose=False, **kwargs))
        return opened[-1]

    yield make
    for llm in opened:
        llm.close()


def test_llama_obeys_the_file_and_tells_what_it_costs(planned, open_llama):
    llm = open_llama(planned)
    assert llm.plan.pairs == PAIRS and llm.plan_notes == []
    assert llm.kv_bytes == sum(codec(t).row_bytes(N_VALUES) for p in PAIRS for t in (p.type_k, p.type_v))
    reply = llm.create_chat_completion([{"role": "user", "content": "Name a colour."}], max_tokens=8, temperature=0)
    assert reply["choices"][0]["message"]["content"].strip()


def test_plan_argument_wins_over_the_file(planned, smol, tmp_path, open_llama):
    other = Plan.uniform(Pair("q4_0", "q5_0"), 30)
    other.save(tmp_path / "plan.json")
    assert open_llama(planned, plan=other).plan.pairs == other.pairs
    assert open_llama(smol, plan=tmp_path / "plan.json").plan.pairs == other.pairs
    assert open_llama(planned, plan=False).plan.pairs == (Pair("f16", "f16"),) * 30


def test_an_explicit_type_makes_its_side_uniform(planned, open_llama):
    llm = open_llama(planned, type_k="q4_1")
    assert set(llm.plan.type_k) == {"q4_1"} and llm.plan.type_v == tuple(p.type_v for p in PAIRS)


def test_a_plan_of_another_model_is_refused(smol, open_llama):
    with pytest.raises(PlanError, match="has 4 layers, the model has 30"):
        open_llama(smol, plan=Plan.uniform(Pair("q8_0", "q8_0"), 4))


def test_saved_state_goes_on_exactly(planned, open_llama):
    llm = open_llama(planned)
    llm.eval(llm.tokenize(b"The tide comes in twice a day because"))
    state = llm.save_state()
    first = _continue(llm)
    llm.load_state(state)
    assert _continue(llm) == first


def _continue(llm: Llama) -> list[int]:
    tokens = []
    for _ in range(12):
        llm.eval([llm.token_eos() if not tokens else tokens[-1]])
        tokens.append(llm.sample(temp=0.0))
    return tokens


def test_a_long_chat_shifts_its_context(planned, open_llama):
    """llama-cpp-python's own handling of a full context goes through with a mixture of types."""
    llm = open_llama(planned)
    llm.eval(llm.tokenize(b"one two three four five six seven eight nine ten " * 22)[:250])
    llm._ctx.kv_cache_seq_rm(0, 10, 110)
    llm._ctx.kv_cache_seq_shift(0, 110, 250, -100)
    llm.n_tokens -= 100
    llm.eval(llm.tokenize(b"eleven", add_bos=False))
    assert llm.sample(temp=0.0) >= 0


def test_llama_cpp_obeys_the_plan_after_our_import(planned):
    assert first_pairs("import kvtuner_gguf, llama_cpp", planned) == "[('q5_1', 'q8_0'), ('q8_0', 'q4_0')]"


def first_pairs(imports: str, model: Path) -> str:
    """The types of the first two layers in a program of its own that has llama_cpp's Llama open the model."""
    code = (
        f"import sys\n{imports}\n"
        "llm = llama_cpp.Llama(sys.argv[1], n_ctx=256, flash_attn=True, verbose=False)\n"
        "from kvtuner_gguf import native\n"
        "print([(l.type_k, l.type_v) for l in native.ctx_layers(llm._model.model, llm._ctx.ctx)][:2])\n"
        "llm.close()\n"
    )
    command = [sys.executable, "-c", code, str(model)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_chat_answers_one_prompt_and_names_its_memory(planned):
    result = CliRunner().invoke(
        main, ["chat", "-m", str(planned), "-c", "512", "-p", "Say hello.", "-n", "8", "--temp", "0"]
    )
    assert result.exit_code == 0, result.output
    assert "K/V cache:" in result.stderr and "2 pairs: q5_1/q8_0, q8_0/q4_0" in result.stderr
    assert result.stdout.strip()


def test_chat_reads_lines_until_exit(planned, monkeypatch):
    lines = iter(["Say hello.", "/reset", "/exit", "never read"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    result = CliRunner().invoke(main, ["chat", "-m", str(planned), "-c", "512", "-n", "8", "--temp", "0"])
    assert result.exit_code == 0 and "(forgotten)" in result.stdout
    assert next(lines) == "never read"


def test_a_context_out_of_reach_is_an_error_that_names_it(planned):
    result = CliRunner().invoke(main, ["chat", "-m", str(planned), "-c", "2000000000", "-p", "x"])
    assert result.exit_code == 1 and "2000000000" in result.output
