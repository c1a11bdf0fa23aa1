"""Expected answers: what counts as one, and what is no answer that can be expected."""

from __future__ import annotations

import pytest

from kvtuner_gguf.errors import TaskError
from kvtuner_gguf.tasks.answer import Answer, json_in, number_in


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("5 * 3 = 15, so 15 are left.\n#### 18", 18),
        ("#### 18\nI have checked 3 of them.", 18),
        ("#### 4\nNo, wait. #### 1,250.50", 1250.5),
        ("thus \\boxed{-42} of 50", -42),
        ("He pays $70,000 in 2 years, that is 70000.", 70000),
        ("a half, .5", 0.5),
        ("none", None),
        ("", None),
    ],
)
def test_a_number_is_the_marked_one_or_the_last(text, number):
    assert number_in(text) == number


def test_numbers_are_compared_by_value():
    assert Answer("number", "1,250").is_in("that makes 1250.00")
    assert Answer("number", 1250).is_in("#### 1250")
    assert not Answer("number", 1250).is_in("1251") and not Answer("number", 0).is_in("nothing")


@pytest.mark.parametrize(
    ("text", "choice"),
    [
        ("B", "B"),
        ("(B) since A is wrong", "B"),
        ("A is tempting, but the answer is C.", "C"),
        ("Answer: **D**", "D"),
        ("I'd say B", "B"),
        ("The answer is B, no, the answer is D", "D"),
        ("Bad", None),
        ("A's fault", None),
    ],
)
def test_a_choice_is_the_one_that_is_called_the_answer_or_the_first(text, choice):
    right = [c for c in "ABCD" if Answer("choice", c, ("A", "B", "C", "D")).is_in(text)]
    assert right == ([choice] if choice else [])


def test_exact_and_regex():
    assert Answer("exact", "Paris").is_in(" Paris\n") and not Answer("exact", "Paris").is_in("Paris.")
    assert Answer("regex", r"\bheron-\d+").is_in("it is heron-12.") and not Answer("regex", "^heron").is_in("a heron")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('{"a": 1}', {"a": 1}),
        ('<tool_call>\n{"name": "f", "arguments": {"x": [1]}}\n</tool_call>', {"name": "f", "arguments": {"x": [1]}}),
        ('```json\n[1, 2]\n``` and {"a": 2}', [1, 2]),
        ('Sure {as you like}: {"a": 3}', {"a": 3}),
    ],
)
def test_the_first_json_value_of_a_text_is_read(text, value):
    assert json_in(text) == (True, value)


@pytest.mark.parametrize("text", ["", '{"a": 1', "no", "{" * 5000, "[" * 200_000])
def test_a_text_without_json_has_none(text):
    assert json_in(text) == (False, None)


def test_json_has_the_expected_values_and_is_valid():
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    expected = {"name": "f", "arguments": {"n": 3, "on": True}}
    answer = Answer("json", expected)
    assert answer.is_in('{"arguments": {"on": true, "n": 3.0, "more": 1}, "name": "f"}')
    assert not answer.is_in('{"arguments": {"on": 1, "n": 3}, "name": "f"}')
    assert not answer.is_in('{"name": "f"}') and not answer.is_in("[1]")
    assert Answer("json", None, (), schema).is_in('{"n": 4}')
    assert not Answer("json", None, (), schema).is_in('{"n": "4"}')
    assert not Answer("json", {"n": 4}, (), schema).is_in('{"n": 5}')
    assert Answer("json", [1, {"a": 2}]).is_in('[1, {"a": 2}]') and not Answer("json", [1]).is_in("[1, 2]")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("date", "x"), "'date' is not known"),
        (("number", "many"), "need a number"),
        (("number", True), "need a number"),
        (("number", "1e999"), "need a number"),
        (("exact", 3), "need a text"),
        (("choice", "E", ("A", "B")), "'E' is none of the choices"),
        (("regex", "("), "regex"),
        (("json", None, (), {"type": "colour"}), "schema"),
        (("json", None, (), [1]), "need a JSON object"),
    ],
)
def test_what_cannot_be_expected_is_named(arguments, said):
    with pytest.raises(TaskError, match=said):
        Answer(*arguments)
