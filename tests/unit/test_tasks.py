"""Files of tasks, our own set, and what answers come to."""

from __future__ import annotations

import json
import math

import pytest

from kvtuner_gguf.errors import TaskError
from kvtuner_gguf.report import tasks_json, tasks_text
from kvtuner_gguf.tasks.answer import Answer
from kvtuner_gguf.tasks.made import N_EACH, is_made, made_tasks
from kvtuner_gguf.tasks.score import Accuracy, Answered, Flips, TaskComparison, TaskRow
from kvtuner_gguf.tasks.task import read_tasks


@pytest.fixture
def file(tmp_path):
    def write(*lines):
        path = tmp_path / "tasks.jsonl"
        path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
        return path

    return write


def test_a_file_of_tasks_is_read(file):
    one, two, three = read_tasks(
        file(
            {"prompt": "2 + 2?", "number": 4},
            "",
            {"id": "b", "area": "x", "system": "Be brief.", "prompt": "Which?", "choice": "B", "max_tokens": 8},
            {"id": "c", "messages": [{"role": "user", "content": "Call f."}], "tools": [{"name": "f"}], "schema": {}},
        )
    )
    assert (one.id, one.max_tokens, one.messages) == ("line 1", 512, ({"role": "user", "content": "2 + 2?"},))
    assert [m["role"] for m in two.messages] == ["system", "user"]
    assert (two.id, two.area, two.max_tokens, two.answer.among) == ("b", "x", 8, ("A", "B", "C", "D"))
    assert three.tools == ({"name": "f"},) and three.answer.kind == "json"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 1: is no JSON"),
        ("[1]", "line 1: got \\[1\\], need a JSON object"),
        ({"prompt": "x"}, "need one expected answer"),
        ({"prompt": "x", "exact": "a", "number": 1}, "got exact, number"),
        ({"prompt": "x", "numbr": 1}, "'numbr' is not known"),
        ({"number": 1}, 'need either "prompt" or "messages"'),
        ({"prompt": 3, "number": 1}, "prompt: got 3, need a text"),
        ({"messages": [], "number": 1}, "messages: got"),
        ({"messages": [{"role": "assistant", "content": "x"}], "number": 1}, "the last is of 'assistant'"),
        ({"prompt": "x", "number": 1, "max_tokens": 0}, "max_tokens: got 0"),
        ({"prompt": "x", "number": 1, "tools": ["f"]}, "tools: got"),
        ({"prompt": "x", "choice": "E"}, "'E' is none of the choices"),
    ],
)
def test_a_line_that_is_no_task_is_named(file, line, said):
    with pytest.raises(TaskError, match=said):
        read_tasks(file(line))


def test_a_file_without_tasks_and_ids_that_stand_twice_are_refused(file, tmp_path):
    with pytest.raises(TaskError, match="holds no task"):
        read_tasks(file(""))
    with pytest.raises(TaskError, match="id 'a' stands there twice"):
        read_tasks(file({"id": "a", "prompt": "x", "number": 1}, {"id": "a", "prompt": "y", "number": 1}))
    with pytest.raises(TaskError, match="cannot be read"):
        read_tasks(tmp_path / "none.jsonl")


def words(text: str) -> int:
    return len(text.split())


def content(task) -> str:
    return task.messages[0]["content"]


def test_our_set_is_of_its_length_and_its_seed():
    tasks = made_tasks("long:2000", 0, words)
    assert {t.area for t in tasks} == {"needle", "copy", "json", "tools"} and len(tasks) == 4 * N_EACH
    assert all(1600 < words(content(t)) < 2100 for t in tasks)
    assert tasks == made_tasks("long:2000", 0, words) and tasks != made_tasks("long:2000", 1, words)
    assert {t.area for t in made_tasks("short", 0, words)} == {"arithmetic", "needle", "copy", "json", "tools"}


def test_our_set_has_its_answers_in_its_prompts():
    """Each can be answered by who reads it: what is expected stands in the prompt, once, or follows from it."""
    for task in made_tasks("long:1500", 3, words):
        text = content(task)
        if task.area == "copy":
            assert task.answer.is_in(text) and text.count(task.answer.expected.strip("\\b")) == 1
        elif task.area == "needle":
            assert len([w for w in text.split() if task.answer.is_in(w)]) == 1
        elif task.area == "json":
            order = task.answer.expected
            line = next(x for x in text.splitlines() if order["customer"] in x and x.startswith("Order"))
            assert f"{order['crates']} crates of {order['good']} to the {order['place']}" in line
            assert ("not paid" in line) != order["paid"]
            assert task.answer.is_in(json.dumps(order)) and not task.answer.is_in(json.dumps({**order, "crates": 0}))
        else:
            assert f'"name": "{task.answer.expected["name"]}"' in text
            assert all(json.dumps(v) in text.rsplit("\n", 1)[1] for v in task.answer.expected["arguments"].values())
    for task in made_tasks("short", 3, words):
        assert task.area != "arithmetic" or task.answer.expected > 0


def test_tasks_of_a_document_have_its_start_in_common():
    tasks = [t for t in made_tasks("long:2000", 0, words) if t.area != "tools"]
    start = content(tasks[0])[: content(tasks[0]).rindex("\n\n")]
    assert len(start) > 8000 and all(content(t).startswith(start) for t in tasks)


@pytest.mark.parametrize("spec", ["long:", "long:x", "long:100", "long:1e4", "long:99999999999"])
def test_a_length_that_is_none_is_named(spec):
    assert is_made(spec)
    with pytest.raises(TaskError, match="need a number of tokens"):
        made_tasks(spec, 0, words)


def answered(right: str, text: str = "") -> tuple[Answered, ...]:
    """One task for each letter: + right, - wrong."""
    return tuple(Answered(str(i), "ab"[i % 2], f"{r}{text}", r == "+") for i, r in enumerate(right))


def test_accuracy_and_its_error():
    accuracy = Accuracy.of([True, True, True, False])
    assert (accuracy.share, accuracy.n) == (0.75, 4) and accuracy.se == pytest.approx(math.sqrt(0.75 * 0.25 / 4))


def test_flips_are_counted_either_way():
    flips = Flips.of(answered("++--+"), answered("+-++-"))
    assert (flips.lost, flips.gained, flips.changed, flips.n) == (2, 2, 4, 4) and flips.p_value == 1
    assert Flips.of(answered("----------"), answered("++++++++++")).p_value == pytest.approx(2 / 2**10)
    assert Flips.of(answered("+-", "x"), answered("+-")).changed == 2
    assert Flips.of(answered("+-"), answered("+-")).p_value == 1


def test_json_may_be_valid_and_wrong():
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    answer = Answer("json", {"n": 3}, (), schema)
    assert [(answer.is_in(t), answer.is_valid(t)) for t in ('so: {"n": 3}', '{"n": 4}', '{"n": "3"}', "3")] == [
        (True, True),
        (False, True),
        (False, False),
        (False, False),
    ]
    assert Answer("json", {"n": 3}).is_valid('{"m": 4}') is True and Answer("exact", "3").is_valid('{"n": 3}') is None
    answers = (Answered("a", "", "", False, True), Answered("b", "", "", False, False), Answered("c", "", "", True))
    row = TaskRow("f16", 16.0, 4 << 20, answers)
    assert row.valid is not None and (row.valid.share, row.valid.n) == (0.5, 2)
    comparison = TaskComparison("t.jsonl", 8192, (row, row))
    assert "valid JSON" in tasks_text(comparison) and "of 2 answers that were to be JSON" in tasks_text(comparison)
    assert tasks_json(comparison)["rows"][0]["valid"]["share"] == 0.5


def test_the_table_and_its_json():
    f16, other = answered("++-+"), answered("+--+")
    rows = (TaskRow("f16", 16.0, 4 << 20, f16), TaskRow("q4_0/q4_0", 4.5, 1 << 20, other))
    comparison = TaskComparison("t.jsonl", 8192, rows, ("a note",))
    text = tasks_text(comparison)
    assert (
        text.splitlines()[3].split()[:3] == ["q4_0/q4_0", "4.50", "1.0"]
        and "1 + 0  1.00" in text
        and "50.0 +-25.0 %" in text
    )
    assert "4 tasks of t.jsonl" in text and "a (2)" in text and "note: a note" in text
    assert "valid JSON" not in text
    row = tasks_json(comparison)["rows"][1]
    assert (row["lost"], row["gained"], row["share"], row["areas"]["b"]["share"]) == (1, 0, 0.5, 0.5)
    assert row["answers"][1] == {"id": "1", "area": "b", "text": "-", "right": False, "valid": None}
    json.dumps(tasks_json(comparison), allow_nan=False)
