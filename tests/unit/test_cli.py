"""The command line: every command has help and stands in the README; bad input names the value and the cure."""

from __future__ import annotations

from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from kvtuner_gguf import Pair, Plan
from kvtuner_gguf.arguments import Memory
from kvtuner_gguf.cli import main

README = Path(__file__).resolve().parents[2] / "README.md"
COMMANDS = sorted(main.commands)


def run(*args: object):
    return CliRunner().invoke(main, [str(a) for a in args])


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_has_help_and_stands_in_the_readme(name):
    command = main.commands[name]
    result = run(name, "--help")
    assert result.exit_code == 0 and command.help
    assert f"`kvtuner-gguf {name}" in README.read_text()
    undocumented = [p.name for p in command.params if isinstance(p, click.Option) and not p.help]
    assert not undocumented


def test_all_commands_are_there():
    assert {"calibrate", "show", "evaluate", "apply", "strip", "export", "chat", "demo"} <= set(COMMANDS)


@pytest.mark.parametrize(("text", "n_bytes"), [("96M", 96 << 20), ("1.5GiB", 3 << 29), ("300000000", 300_000_000), ("2 kB", 2048)])
def test_memory_is_read_in_powers_of_1024(text, n_bytes):
    assert Memory().convert(text, None, None) == n_bytes


@pytest.mark.parametrize("text", ["much", "1.2.3G", "-5M", ""])
def test_a_bad_memory_is_named(text):
    with pytest.raises(click.BadParameter, match="is not a size"):
        Memory().convert(text, None, None)


def test_a_missing_model_is_named():
    result = run("calibrate", "no-such.gguf")
    assert result.exit_code == 2 and "no-such.gguf" in result.output


def test_two_goals_are_refused(tmp_path):
    model = tmp_path / "m.gguf"
    model.write_bytes(b"GGUF")
    result = run("calibrate", model, "--bits", 5, "--memory", "96M")
    assert result.exit_code == 2 and "one goal" in result.output


def test_a_file_that_is_no_model_is_an_error_without_traceback(tmp_path):
    model = tmp_path / "m.gguf"
    model.write_bytes(b"not a model at all")
    for args in (("export", model), ("strip", model), ("apply", model, _sidecar(tmp_path))):
        result = run(*args)
        assert result.exit_code == 1 and result.output.startswith("Error: ") and "m.gguf" in result.output, result.output


def test_an_unknown_type_lists_the_known_ones(tmp_path):
    model = tmp_path / "m.gguf"
    model.write_bytes(b"GGUF")
    result = run("calibrate", model, "--types", "q8_0,q9_9")
    assert result.exit_code == 1 and "'q9_9'" in result.output and "iq4_nl" in result.output


def _sidecar(folder: Path) -> Path:
    path = folder / "plan.json"
    Plan((Pair("q8_0", "q4_0"),)).save(path)
    return path


def test_runs_of_conditioned_layers_are_named():
    from kvtuner_gguf.report import conditions_text

    layers = [(il, il != 2, il in (0, 5)) for il in (0, 1, 2, 3, 5)]
    assert conditions_text(layers) == "mean in layers 0-1,3,5, scale in layers 0,5"
    assert conditions_text([(0, False, False)]) == ""
