"""Tasks asked of tiny models: batches, shared starts and records change no answer."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner
from gguf import GGUFValueType
from running import mixture, prompt, vectors

from kvtuner_gguf.cli import main
from kvtuner_gguf.errors import TaskError
from kvtuner_gguf.plan import Plan
from kvtuner_gguf.tasks import ask
from kvtuner_gguf.tasks.ask import Group, Prompt, groups_of, write_answers

pytestmark = pytest.mark.native


def test_prompts_with_a_long_start_in_common_are_together():
    start = tuple(range(300))
    prompts = [Prompt(str(i), (*(start if i % 2 else (i,)), i), 4) for i in range(6)] + [Prompt("no", start, 4)]
    shared, single = groups_of(prompts)
    assert {p.id for p in shared.prompts} == {"1", "3", "5", "no"} and shared.n_prefix == 299
    assert {p.id for p in single.prompts} == {"0", "2", "4"} and single.n_prefix == 0
    assert shared.n_ctx == 512 and single.n_ctx == 256


@pytest.mark.parametrize("kind", ["llama", "gemma3", "gemma4", "hybrid"])
@pytest.mark.parametrize("planned", [False, True])
def test_answers_are_those_of_one_prompt_at_a_time(load, tiny, kind, planned):
    """Five prompts of unlike length and end, in two sequences at once and a third that holds their start."""
    session = load(tiny(kind))
    k_vectors = tuple(vectors(il) for il in range(session.n_layer)) if kind == "llama" else ()
    plan = Plan(tuple(mixture(session.n_layer)), k_vectors=k_vectors) if planned else None
    start = prompt(70)
    prompts = [Prompt(str(i), (*start, *prompt(3 + 20 * i, seed=i + 1)[1:]), 9 - i) for i in range(5)]
    alone, together = {}, {}
    for one in prompts:
        write_answers(session, plan, Group((one,), 0), 1, lambda p, t: alone.update({p.id: list(t)}))
    write_answers(session, plan, Group(tuple(prompts), len(start)), 2, lambda p, t: together.update({p.id: list(t)}))
    assert together == alone and {len(t) for t in alone.values()} <= set(range(1, 10))
    assert max(map(len, alone.values())) > 4


TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


@pytest.fixture
def model(tiny):
    return tiny("llama", extra=[("tokenizer.chat_template", GGUFValueType.STRING, TEMPLATE)])


N = 60  # tokens of an answer


@pytest.fixture
def tasks(tmp_path):
    path = tmp_path / "tasks.jsonl"
    lines = [
        {"id": f"t{i}", "area": "ab"[i % 2], "prompt": f"{i} and {i}?", "regex": ".", "max_tokens": N} for i in range(5)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def run(*args: object, code: int = 0):
    result = CliRunner().invoke(main, [str(a) for a in args])
    assert result.exit_code == code, result.output
    return result


def test_a_prompt_ends_where_the_answer_starts(load, model):
    session = load(model)
    tokens = session.prompt_tokens([{"role": "user", "content": "yes"}])
    (end,) = session.tokenize("</s>", add_special=False, parse_special=True)
    start = session.tokenize("user: yes")
    assert tokens == [*start, end, *session.tokenize("assistant:", add_special=False)]


def test_text_comes_back_from_tokens(load, model):
    session = load(model)
    text = "some words\nand a line that is longer than the first buffer for it, by quite a bit, is it not"
    assert session.detokenize(session.tokenize(text, add_special=False)).strip() == text
    assert session.detokenize([]) == ""


def test_the_command_prints_what_flipped_and_asks_nothing_twice(model, tasks, own_cache, monkeypatch):
    command = ("evaluate", "q8_0/q8_0", "q4_0/q4_0", "-m", model, "--tasks", tasks, "-t", 1, "-c", 256)
    rows = json.loads(run(*command, "--json").stdout)["rows"]
    assert [r["name"] for r in rows] == ["f16", "f16 (noise floor)", "q8_0/q8_0", "q4_0/q4_0"]
    assert [a["id"] for a in rows[0]["answers"]] == ["t0", "t1", "t2", "t3", "t4"]
    assert rows[0]["changed"] == rows[1]["changed"] == 0 and rows[0]["n"] == 5
    assert rows[2]["bits_per_value"] == 8.5
    text = run(*command).stdout
    assert "5 tasks of tasks.jsonl, greedy" in text and "a (3)  b (2)" in text

    def no_run(*args, **options):
        raise AssertionError("asked again")

    monkeypatch.setattr("kvtuner_gguf.tasks.evaluate.write_answers", no_run)
    assert json.loads(run(*command, "--json").stdout)["rows"] == rows
    assert isinstance(CliRunner().invoke(main, [*map(str, command), "--fresh"]).exception, AssertionError)


def test_an_interrupted_run_goes_on(model, tasks, own_cache, monkeypatch):
    """Answers that were written before are kept, and the others are the same as in one go."""
    command = ("evaluate", "q8_0/q8_0", "-m", model, "--tasks", tasks, "-t", 1, "--json")
    whole = json.loads(run(*command).stdout)["rows"]
    asked = []
    real = ask.write_answers

    def stopping(session, plan, group, n_slots, done, **options):
        asked.append(len(group.prompts))

        def until(p, tokens):
            done(p, tokens)
            if len(asked) == 1:
                raise KeyboardInterrupt

        real(session, plan, group, n_slots, until, **options)

    monkeypatch.setattr("kvtuner_gguf.tasks.evaluate.write_answers", stopping)
    run(*command, "--fresh", code=1)
    assert json.loads(run(*command).stdout)["rows"] == whole
    assert asked[:2] == [5, 4]


def test_tasks_that_do_not_fit_are_named_before_a_run(model, tiny, tasks, own_cache):
    out = run("evaluate", "q8_0", "-m", tiny("gpt2", n_ctx=64), "--tasks", tasks, "-c", 64, code=1).output
    assert "task 't0': " in out and "tokens and 60 of the answer, the model has 64 positions" in out
    assert "need a number of tokens" in run("evaluate", "q8_0", "-m", model, "--tasks", "long:x", code=1).output
    out = run("evaluate", "q8_0", "-m", model, "--tasks", tasks, "-f", tasks, code=2).output
    assert "leave -f and --chunks out" in out
    assert "--fresh is for --tasks" in run("evaluate", "q8_0", "-m", model, "--fresh", code=2).output


def test_tasks_beyond_what_a_model_was_trained_on_are_noted(model, tasks, own_cache):
    lines = [json.dumps({"id": f"big{i}", "prompt": "x" * 4090, "number": 1, "max_tokens": 8}) for i in range(2)]
    tasks.write_text("\n".join(lines))
    out = run("evaluate", "q8_0", "-m", model, "--tasks", tasks, "-t", 1).stdout
    assert "note: task 'big0' and 1 others: beyond the 4096 tokens that the model was trained on" in out


def test_a_model_without_a_template_reads_a_prompt_as_it_is(load, tiny):
    session = load(tiny("llama"))
    assert session.prompt_tokens([{"role": "user", "content": "ab"}]) == session.tokenize("ab")
    with pytest.raises(Exception, match="need a chat template"):
        session.prompt_tokens([{"role": "system", "content": "x"}, {"role": "user", "content": "ab"}])


def test_a_plan_of_a_group_that_the_run_time_leaves_is_refused(load, tiny):
    session = load(tiny("llama", head_dim=80))
    plan = Plan(tuple(mixture(session.n_layer)))
    with pytest.raises(TaskError, match="left the plan"):
        write_answers(session, plan, Group((Prompt("a", (1, 2), 2),), 0), 1, lambda p, t: None)
