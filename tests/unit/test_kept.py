"""What is kept in the cache folder: listed with its model, and cleared, but for what is in use."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from kvtuner_gguf.cache import cache_dir, lock
from kvtuner_gguf.cli import main
from kvtuner_gguf.kept import write_about
from kvtuner_gguf.report import _age

pytestmark = pytest.mark.usefixtures("own_cache")


def run(*args: str):
    result = CliRunner().invoke(main, ["cache", *args])
    assert result.exit_code == 0, result.output
    return result


@pytest.fixture
def records(tmp_path):
    """A calibration's, a task's, an old one that says nothing of itself, a fetched model, an RPC client's tensor."""
    base = cache_dir()
    for kind, key in (("calibrate", "aa"), ("tasks", "bb")):
        write_about(base / kind / key, tmp_path / "model.gguf")
        (base / kind / key / "record.json").write_text("x" * 1000)
        (base / kind / f"{key}.lock").touch()
    (base / "calibrate" / "old").mkdir()
    (base / "small.gguf").write_bytes(b"GGUF")
    (base / "ab12.345.part").write_bytes(b"GG")  # of one that was being sent
    (base / "rpc").mkdir()
    (base / "rpc" / "cbf29ce484222325").write_bytes(b"tensor")
    return base


def test_an_empty_cache_is_said():
    assert run().output == "Nothing is kept.\n" and json.loads(run("--json").output) == []


def test_each_is_listed_with_its_model_and_size(records, tmp_path):
    items = {(i["kind"], i["about"]): i["n_bytes"] for i in json.loads(run("--json").output)}
    about = str(tmp_path / "model.gguf")
    assert items == {
        ("calibrate", about): 1001 + len(about),
        ("tasks", about): 1001 + len(about),
        ("calibrate", ""): 0,
        ("model", "small.gguf"): 4,
        ("model", "ab12.345.part"): 2,
        ("rpc", ""): 6,
    }
    assert about in run().output and "just now" in run().output


def test_a_kind_is_cleared_and_the_others_stay(records):
    out = json.loads(run("--clear", "calibrate", "--json").output)
    assert out["freed_bytes"] > 1000 and out["left"] == []
    assert sorted(p.name for p in records.iterdir()) == ["ab12.345.part", "calibrate", "rpc", "small.gguf", "tasks"]
    assert list((records / "calibrate").iterdir()) == []
    run("--clear", "all")
    assert [p for p in records.rglob("*") if p.is_file()] == []


def test_what_is_in_use_stays_and_is_named(records):
    with lock(records / "tasks" / "bb.lock") as ours:
        assert ours
        result = run("--clear", "all")
    assert "in use, and left as it is" in result.output and (records / "tasks/bb/record.json").exists()
    assert not (records / "calibrate/aa").exists()


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0, "just now"), (119, "just now"), (120, "2 minutes ago"), (7300, "2 hours ago"), (9e5, "10 days ago")],
)
def test_an_age_is_in_its_largest_unit(seconds, said):
    assert _age(seconds) == said
