"""What can be known before the first stage is said before it."""

from __future__ import annotations

import math
import shutil
from collections import namedtuple
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from kvtuner_gguf import Geometry
from kvtuner_gguf.arguments import Memory
from kvtuner_gguf.calibrate.checks import cheapest_bytes, check_can_plan, check_room, check_text
from kvtuner_gguf.calibrate.goals import WithinBits, WithinBytes, WithinKld
from kvtuner_gguf.cli import main
from kvtuner_gguf.errors import CalibrationError

# three layers at 64 tokens: two with 128 values of K and V each, one with none; the second cannot be quantized
GEOMETRY = Geometry((8192, 0, 8192), (8192, 0, 4096), 64)
TYPES = {0: (("f16", "q8_0", "q4_0"), ("f16", "q8_0")), 2: (("f16",), ())}
CHEAPEST = 8192 // 32 * 18 + 8192 // 32 * 34 + 2 * 8192 + 2 * 4096


def test_the_cheapest_plan_worked_by_hand():
    assert cheapest_bytes(GEOMETRY, TYPES) == CHEAPEST


def test_a_goal_below_the_cheapest_plan_names_what_is_needed():
    WithinBytes(CHEAPEST).check(GEOMETRY, CHEAPEST)
    WithinKld(1e-9).check(GEOMETRY, CHEAPEST)
    with pytest.raises(CalibrationError, match=f"goal of {CHEAPEST - 1} bytes.*the cheapest plan needs {CHEAPEST} "):
        WithinBytes(CHEAPEST - 1).check(GEOMETRY, CHEAPEST)
    with pytest.raises(CalibrationError, match="the cheapest plan needs"):
        WithinBits(2).at(GEOMETRY).check(GEOMETRY, CHEAPEST)


def test_a_model_without_a_cache_has_nothing_to_plan():
    check_can_plan(Path("m.gguf"), GEOMETRY)
    with pytest.raises(CalibrationError, match="nothing to plan"):
        check_can_plan(Path("m.gguf"), Geometry((0, 0), (0, 0), 64))


@pytest.mark.parametrize("value", [0, -1, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("goal", [WithinBits, WithinBytes, WithinKld])
def test_a_goal_that_is_no_number_above_0_is_refused(goal, value):
    with pytest.raises(CalibrationError, match="a number above 0"):
        goal(value)


def test_a_huge_goal_is_one_that_everything_meets():
    assert WithinBits(1e308).at(GEOMETRY).allows(GEOMETRY.n_values * 4)


@pytest.mark.parametrize("text", ["9" * 400, "1e400", "9" * 40 + "T" * 2, "nan", "inf"])
def test_a_memory_that_is_no_size_is_named(text):
    with pytest.raises(click.BadParameter) as caught:
        Memory().convert(text, None, None)
    assert len(str(caught.value)) < 150


def test_a_text_with_fewer_bytes_than_tokens_is_refused_at_once(tmp_path):
    text = tmp_path / "short.txt"
    text.write_bytes(b"x" * 1000)
    check_text(text, 1010)  # a tokenizer may add some of its own
    check_text(None, 10_000)
    with pytest.raises(CalibrationError, match="1000 bytes.*need 5000"):
        check_text(text, 5000)


def test_a_fault_in_a_short_text_is_said_before_its_length(tmp_path):
    text = tmp_path / "short.jsonl"
    text.write_text('\n\n{"text": "a river"}\n\n{"txt": 1}\n')
    with pytest.raises(CalibrationError, match="line 5: "):
        check_text(text, 5000)


def test_a_cache_folder_without_room_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: namedtuple("Usage", "free")(3 << 20))
    check_room(tmp_path, 3 << 20)
    with pytest.raises(CalibrationError, match=rf"{tmp_path}: no space: 3 MiB free.*4 MiB.*--chunks.*XDG_CACHE_HOME"):
        check_room(tmp_path, (3 << 20) + 1)


@pytest.mark.parametrize(
    "goal",
    [
        ("--bits", "nan"),
        ("--bits", "inf"),
        ("--bits", "0"),
        ("--max-kld", "nan"),
        ("--max-kld", "-1"),
        ("--max-kld", "inf"),
    ],
)
def test_the_commands_refuse_such_goals(goal, tmp_path):
    model = tmp_path / "m.gguf"
    model.write_bytes(b"GGUF")
    for command in ("calibrate", "solve"):
        result = CliRunner().invoke(main, [command, str(model), *goal])
        assert result.exit_code == 1 and result.output.startswith("Error: goal") and "above 0" in result.output
