"""What can be known before the first stage is said before it."""

from __future__ import annotations

import math
import shutil
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from kvtuner_gguf import Geometry
from kvtuner_gguf.arguments import Memory
from kvtuner_gguf.calibrate.checks import cheapest_bytes, check_can_plan, check_room, check_text, offered
from kvtuner_gguf.calibrate.goals import WithinBits, WithinBytes, WithinKld
from kvtuner_gguf.calibrate.measured import Measured
from kvtuner_gguf.calibrate.options import PAPER_TYPES, Options
from kvtuner_gguf.calibrate.runs import tag
from kvtuner_gguf.cli import main
from kvtuner_gguf.codecs import CODECS
from kvtuner_gguf.errors import CalibrationError
from kvtuner_gguf.kvectors import KVectors
from kvtuner_gguf.pair import Pair

# three layers at 64 tokens: two with 128 values of K and V each, one with none; the second cannot be quantized
GEOMETRY = Geometry((8192, 0, 8192), (8192, 0, 4096), 64)
TYPES = {0: (("f16", "q8_0", "q4_0"), ("f16", "q8_0")), 2: (("f16",), ())}
CHEAPEST = 8192 // 32 * 18 + 8192 // 32 * 34 + 2 * 8192 + 2 * 4096


def test_the_cheapest_plan_worked_by_hand():
    assert cheapest_bytes(GEOMETRY, TYPES) == CHEAPEST


def test_types_of_groups_are_for_k_in_a_basis_alone():
    every = ("f16", "k4_64", "q3_64", "k3_64", "k2_64")
    types = {0: (every, every), 2: (every, ("f16",)), 3: (("f16",), ())}
    plain = ("f16", "q3_64")
    assert offered(types, ()) == {0: (plain, plain), 2: (plain, ("f16",)), 3: (("f16",), ())}
    assert offered(types, {0}) == {0: (every, plain), 2: (plain, ("f16",)), 3: (("f16",), ())}
    assert offered(types, types) == {0: (every, plain), 2: (every, ("f16",)), 3: (("f16",), ())}


def test_a_basis_counts_where_k_has_a_type_of_groups():
    both = KVectors((0.5,) * 8, (2.0,) * 8, bytes(64), (1.0,) * 8)
    pairs = tuple(map(Pair.parse, ("k3_64/q8_0", "q3_64/q8_0", "f16/q8_0")))
    geometry = Geometry((6400,) * 3, (6400,) * 3, 100)
    cache = geometry.bytes(pairs)
    assert cache == 6400 // 64 * (25 + 26) + 2 * 6400 + 3 * 6400 // 32 * 34
    assert geometry.bytes(pairs, (both,) * 3) == cache + (2 * 8 * 4 + 64 + 8 * 4) + 2 * 8 * 4
    priced = replace(geometry, k_vectors=(both.basis_alone,) * 3)
    assert priced.bytes(pairs) == cache + 64 + 8 * 4 and priced.bytes(pairs, ()) == cache
    assert [
        priced.layer(il).bytes(pairs[il : il + 1]) - geometry.layer(il).bytes(pairs[il : il + 1]) for il in range(3)
    ] == [96, 0, 0]


def test_what_was_measured_says_what_a_search_has_to_pay():
    found = (KVectors((0.5,) * 8, (), bytes(64), (1.0,) * 8), KVectors(), KVectors(scale=(2.0,) * 8))
    measured = Measured(None, found, None)
    assert measured.spent == 2 * 8 * 4
    assert measured.priced(GEOMETRY).k_vectors == (found[0].basis_alone, KVectors(), KVectors())
    assert Measured(None, (), None).priced(GEOMETRY) == GEOMETRY


def test_the_paper_knows_no_conditioning():
    assert Options("m.gguf").conditioning == (True, True, True)
    assert Options("m.gguf", method="paper").conditioning == (False, False, False)
    assert Options("m.gguf", k_basis=False).conditioning == (True, True, False)
    assert Options("m.gguf", method="paper", k_basis=True).conditioning == (False, False, True)
    assert not any(CODECS[name].groups for name in PAPER_TYPES)


def test_records_tell_bases_apart():
    bases = [KVectors((), (), bytes(64), (1.0,) * 8), KVectors((), (), bytes(63) + b"1", (1.0,) * 8)]
    bases += [KVectors((), (), bytes(64), (1.0,) * 7 + (2.0,)), KVectors((), (2.0,) * 8, bytes(64), (1.0,) * 8)]
    assert len({tag((b,)) for b in bases} | {tag(()), tag((bases[0], bases[1]))}) == 6
    assert tag((KVectors(),)) == ""


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
