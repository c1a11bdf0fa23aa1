"""The command line: every command has help and stands in the README; bad input names the value and the cure."""

from __future__ import annotations

import os
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from kvtuner_gguf import Pair, Plan
from kvtuner_gguf.arguments import Memory
from kvtuner_gguf.cli import main
from kvtuner_gguf.errors import PlanError

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
    assert {"calibrate", "show", "evaluate", "verdict", "apply", "strip", "export", "chat", "demo"} <= set(COMMANDS)


MODEL_FIRST = [name for name in COMMANDS if "model" in {p.name for p in main.commands[name].params}]


@pytest.mark.parametrize("name", MODEL_FIRST)
@pytest.mark.parametrize("form", ["M", "-m M", "--model M", "--model=M", "-mM", "-c 64 -m M"])
def test_the_model_is_an_argument_or_an_option(name, form, tmp_path, monkeypatch):
    """A file that is there, wherever it stands: what is wrong with it is said, and nothing of the command line."""
    (tmp_path / "M").write_text("no model")
    (tmp_path / "P.json").write_text("no plan")
    monkeypatch.chdir(tmp_path)
    others = {"apply": ["P.json"], "evaluate": ["q8_0"], "chat": ["-p", "-mX"]}.get(name, [])
    if "-c" in form and "n_ctx" not in {p.name for p in main.commands[name].params}:
        form = "-m M"
    result = run(name, *others, *form.split()) if "-" in form else run(name, form, *others)
    assert result.exit_code == 1 and "Usage" not in result.output, result.output
    assert run(name, *others, "M", "-m", "M").exit_code == 2 or name in ("evaluate", "verdict")
    assert "Missing argument 'MODEL'" in run(name).output


@pytest.mark.parametrize(
    ("text", "n_bytes"), [("96M", 96 << 20), ("1.5GiB", 3 << 29), ("300000000", 300_000_000), ("2 kB", 2048)]
)
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
        assert result.exit_code == 1 and result.output.startswith("Error: ") and "m.gguf" in result.output, (
            result.output
        )


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

    layers = [(il, il != 2, il in (0, 5), il == 3) for il in (0, 1, 2, 3, 5)]
    assert conditions_text(layers) == "mean in layers 0-1,3,5, scale in layers 0,5, basis in layers 3"
    assert conditions_text([(0, False, False, False)]) == ""


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF")
    return path


NO_GOALS = [("--bits", x) for x in ("nan", "inf", "-inf", "0", "-4", "6 bits", "")] + [
    *(("--max-kld", x) for x in ("nan", "inf", "0", "-1", "x")),
    *(("--memory", x) for x in ("1e400", "9" * 400, "9" * 40 + "T", "0", "0.0K", "-1", "nan", "inf", ".", "1.2.3")),
    *(("--types", x) for x in ("", ",", " , ")),
    *(("-c", x) for x in ("0", "63", "-1", "1e3", "")),
    *(("--chunks", x) for x in ("0", "1", "1001", "-5", "9" * 40)),
    *(("--seed", x) for x in ("-1", str(2**31), "x")),
]


@pytest.mark.parametrize("command", ["calibrate", "solve"])
@pytest.mark.parametrize(("option", "value"), NO_GOALS, ids=lambda x: x[:12])
def test_an_odd_value_is_refused_before_any_work(model, command, option, value):
    result = run(command, model, option, value)
    assert result.exit_code in (1, 2) and option.strip("-").replace("-", "_") in result.output.replace("-", "_"), (
        result.output
    )
    assert isinstance(result.exception, SystemExit) and "Error: " in result.output
    assert len(result.output) < 1200


@pytest.mark.parametrize("value", ["nan", "inf", "-1", ""])
def test_an_odd_temperature_is_refused(model, value):
    assert run("chat", "-m", model, "--temp", value).exit_code == 2


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with a name")
@pytest.mark.parametrize(
    "args",
    [
        ("show", "P"),
        ("strip", "P"),
        ("export", "P"),
        ("apply", "P", "S"),
        ("apply", "M", "P"),
        ("show", "M", "--plan", "P"),
        ("chat", "-m", "P"),
        ("evaluate", "-m", "P", "q8_0"),
        ("evaluate", "-m", "M", "P.json"),
    ],
)
def test_a_pipe_that_nobody_writes_to_is_refused_and_not_waited_for(model, tmp_path, args):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    os.mkfifo(tmp_path / "pipe.json")
    files = {"P": pipe, "P.json": tmp_path / "pipe.json", "M": model, "S": _sidecar(tmp_path)}
    result = run(*(files.get(a, a) for a in args))
    assert result.exit_code == 1 and "pipe" in result.output and "Check the path" in result.output, result.output


def test_a_sidecar_of_many_levels_is_an_error():
    for depth in (*range(300, 1000, 7), 10**5):
        with pytest.raises(PlanError, match="type_k: got|not JSON"):  # either too deep to show, or to read
            Plan.from_json('{"schema_version": 1, "type_k": ' + "[" * depth + "]" * depth + ', "type_v": ["f16"]}')


@pytest.mark.parametrize(
    ("typed", "offered"), [("cal", "calibrate"), ("fit --me", "--memory"), ("calibrate --me", "--method")]
)
def test_the_shell_completes_commands_and_options(typed, offered):
    words = f"kvtuner-gguf {typed}"
    env = {"_KVTUNER_GGUF_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1)}
    result = CliRunner().invoke(main, prog_name="kvtuner-gguf", env=env)
    assert f"plain,{offered}" in result.stdout.splitlines()
