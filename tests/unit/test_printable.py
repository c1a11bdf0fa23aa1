"""The text of others reaches no terminal as it is: not in an error, a note, a table, or JSON."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner
from gguf_bytes import gguf, string, u32

from kvtuner_gguf import Pair, Plan, PlanError
from kvtuner_gguf.cli import main
from kvtuner_gguf.errors import MOST_CHARACTERS, KvtunerError
from kvtuner_gguf.printable import json_printable, printable
from kvtuner_gguf.report import table

EVIL = "\x1b]0;owned\x07\x1b[2J\u202egnp.exe\u2066\u2028\x85\ud800\udce8\r\n"
SAFE = r"\x1b]0;owned\x07\x1b[2J\u202egnp.exe\u2066\u2028\x85\ud800\xe8\x0d\x0a"


def test_what_acts_on_a_terminal_is_shown_escaped():
    assert printable(EVIL) == SAFE
    printable(EVIL).encode()


@pytest.mark.parametrize("text", ["Модель ü 模型 🦙 👩‍🚀", "C:\\models\\m.gguf", "12\u00a0%", "नमस्ते", "می\u200cخواهم"])  # noqa: RUF001
def test_what_a_person_writes_stays(text):
    assert printable(text) == text


def test_what_is_printable_can_be_stored_in_a_plan():
    """A text's file name, whatever it holds."""
    name = printable(EVIL)
    assert Plan((Pair("q8_0", "q4_0"),), calibration={"text": name}).calibration["text"] == name


def test_a_long_text_loses_its_middle():
    text = printable("a" * 5000 + "b" * 5000, 101)
    assert len(text) <= 101 and text.startswith("aaa") and text.endswith("bbb") and "..." in text


def test_characters_can_be_kept():
    assert printable("a\n\tb\x1b", keep="\n\t") == "a\n\tb\\x1b"


def test_an_error_is_one_printable_line_of_bounded_length():
    assert str(PlanError(EVIL)) == SAFE
    assert len(str(KvtunerError("x" * 100_000))) <= MOST_CHARACTERS


def test_a_table_is_printable():
    assert "\x1b" not in table(("a", "b"), [(EVIL, "1")]) and SAFE in table(("a", "b"), [(EVIL, "1")])


def test_json_says_the_same_and_is_printable():
    value = {"text": "a\u202eb\x9b", "name": "m\udce8"}
    text = json_printable(json.dumps(value, indent=2, ensure_ascii=False))
    assert json.loads(text) == value and printable(text, keep="\n") == text
    text.encode()


@pytest.mark.parametrize("command", ["export", "strip"])
def test_a_hostile_file_and_its_name_reach_no_output_raw(tmp_path, command):
    model = tmp_path / "\x1b[31m\u202e.gguf"
    model.write_bytes(gguf(string("general.architecture", EVIL.encode(errors="replace").decode()), u32("split.no", 1)))
    result = CliRunner().invoke(main, [command, str(model)])
    assert result.exit_code == 1 and "\x1b" not in result.output and "\u202e" not in result.output, result.output
    assert r"\x1b[31m\u202e.gguf" in result.output


def test_a_hostile_plan_is_exported_as_the_same_json_and_printable(tmp_path):
    plan = Plan((Pair("q8_0", "q4_0"),), calibration={"text": "a\u202eb"})
    text = json_printable(plan.to_json())
    assert "\u202e" not in text and Plan.from_json(text) == plan
