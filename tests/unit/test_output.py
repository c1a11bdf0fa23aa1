"""Where a command may write: nothing that is read, nothing that would be lost, and nowhere that a write would fail."""

from __future__ import annotations

import os
import shutil
import stat
from collections import namedtuple
from pathlib import Path

import pytest
from click.testing import CliRunner
from small_gguf import PLAN, fault, make_model

from kvtuner_gguf import Plan, output, target
from kvtuner_gguf.cli import main
from kvtuner_gguf.gguf_file import read_plan, write_plan
from kvtuner_gguf.gguf_header import read_header

posix = pytest.mark.skipif(os.name == "nt", reason="needs POSIX modes, links and devices")


@pytest.fixture
def model(tmp_path):
    return write_plan(make_model(tmp_path / "model.gguf"), PLAN)


@pytest.fixture
def plan_file(tmp_path):
    PLAN.save(tmp_path / "plan.json")
    return tmp_path / "plan.json"


def run(*args: object):
    return CliRunner().invoke(main, [str(a) for a in args], catch_exceptions=False)


def commands(model: Path, plan_file: Path) -> dict[str, list[object]]:
    return {"export": ["export", model], "apply": ["apply", model, plan_file], "strip": ["strip", model]}


@pytest.mark.parametrize("force", [[], ["--force"]])
@pytest.mark.parametrize("name", ["export", "apply", "strip"])
@pytest.mark.parametrize("way", ["itself", "hard link", "dotted"])
def test_a_model_that_is_read_is_never_the_output(name, way, force, model, plan_file, tmp_path):
    other = {
        "itself": model,
        "hard link": tmp_path / "link.gguf",
        "dotted": tmp_path / ".." / tmp_path.name / "model.gguf",
    }[way]
    if way == "hard link":
        os.link(model, other)
    before = model.read_bytes()
    result = run(*commands(model, plan_file)[name], "-o", other, *force)
    assert result.exit_code == 1 and "is read" in result.output and model.read_bytes() == before


def test_a_sidecar_that_is_read_is_never_the_output(model, plan_file):
    before = plan_file.read_bytes()
    assert run("apply", model, plan_file, "-o", plan_file, "--force").exit_code == 1
    assert plan_file.read_bytes() == before


@pytest.mark.parametrize("name", ["export", "apply", "strip"])
@pytest.mark.parametrize("content", [b"notes", b'{"mine": 1}', b'{"type_k": 3}', "model"], ids=str)
def test_another_file_is_replaced_by_force_only(name, content, model, plan_file, tmp_path):
    other = tmp_path / "other.json"
    if content == "model":
        other = make_model(tmp_path / "other.gguf", n_layer=4)
    else:
        other.write_bytes(content)
    before = other.read_bytes()
    result = run(*commands(model, plan_file)[name], "-o", other)
    assert result.exit_code == 1 and other.read_bytes() == before
    forced = run(*commands(model, plan_file)[name], "-o", other, "--force")
    if name == "export" and content == "model":  # no sidecar takes a model's place, whatever is said
        assert forced.exit_code == 1 and "GGUF model" in forced.output and other.read_bytes() == before
    else:
        assert "--force" in result.output and forced.exit_code == 0 and other.read_bytes() != before


def test_what_is_the_same_is_replaced(model, plan_file, tmp_path):
    copy = tmp_path / "copy.gguf"
    for _ in range(2):  # the second time over the first one's
        assert run("strip", model, "-o", copy).exit_code == 0
        assert run("export", model, "-o", tmp_path / "out.json").exit_code == 0
    assert read_plan(copy) is None
    assert run("apply", model, plan_file, "-o", copy).exit_code == 0 and read_plan(copy) == PLAN


@pytest.mark.parametrize("change", ["metadata", "first", "last"])
def test_a_model_that_differs_anywhere_that_is_looked_at_is_another(change, model, tmp_path):
    other = tmp_path / "other.gguf"
    data = bytearray(model.read_bytes())
    tensors = read_header(model).tensors
    at = {
        "metadata": data.index(b"test.u8") + 11,
        "first": tensors[0].offset,
        "last": tensors[-1].offset + tensors[-1].n_bytes - 1,
    }[change]
    data[at] ^= 1
    other.write_bytes(data)
    fault(lambda: output.copy(model, other), other, "not the same model", "--force")
    assert output.copy(model, other, force=True).path == other


def test_an_empty_file_is_replaced(model, tmp_path):
    (tmp_path / "new.json").touch()
    assert run("export", model, "-o", tmp_path / "new.json").exit_code == 0


@posix
def test_a_device_is_no_output(model):
    for path in (Path("/dev/null"), Path("/dev/full")):
        fault(lambda path=path: output.sidecar(path), path, "device")
        assert not stat.S_ISREG(path.stat().st_mode)


@posix
@pytest.mark.parametrize("kind", ["copy", "sidecar"])
def test_a_link_is_no_output(kind, model, tmp_path):
    link = tmp_path / "link.json"
    link.symlink_to(tmp_path / "there.json")
    make = (lambda: output.copy(model, link)) if kind == "copy" else (lambda: output.sidecar(link, force=True))
    fault(make, link, "symbolic link", "-o")


@posix
@pytest.mark.parametrize("name", ["sha256-" + "0a" * 32, "0b" * 32, "0c" * 20])
def test_a_blob_of_a_store_is_never_written(name, model, tmp_path):
    (tmp_path / "blobs").mkdir()
    blob = shutil.copy(model, tmp_path / "blobs" / name)
    link = tmp_path / "hub.gguf"
    link.symlink_to(blob)
    before = blob.read_bytes()
    for path in (link, blob):
        message = fault(lambda path=path: output.in_place(path), path, "store", "-o")
        assert "Give that path" not in message
        fault(lambda path=path: write_plan(path, None), path, "store", "-o")
    assert blob.read_bytes() == before and run("strip", link, "-o", tmp_path / "new.gguf").exit_code == 0


@posix
def test_a_read_only_file_is_refused(model, plan_file):
    for path, make in (
        (model, lambda: output.in_place(model)),
        (plan_file, lambda: output.sidecar(plan_file, force=True)),
    ):
        path.chmod(0o444)
        fault(make, path, "read-only", "-o")


def test_a_folder_that_is_not_there_is_named(model, tmp_path):
    for path in (tmp_path / "none" / "x.gguf", tmp_path / "none" / "x.json", model / "x.json"):
        fault(lambda path=path: output.output(model, path), path, "-o")


def test_a_folder_without_room_is_named(model, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: namedtuple("Usage", "free")(5 << 20))
    monkeypatch.setattr(output, "_SPARE_BYTES", 7 << 20)
    for make in (
        lambda: output.in_place(model),
        lambda: output.copy(model, tmp_path / "x.gguf"),
        lambda: output.sidecar(tmp_path / "x.json"),
    ):
        fault(make, tmp_path, "5 MiB free", "-o")
    assert sorted(os.listdir(tmp_path)) == ["model.gguf"]


def test_a_folder_that_cannot_be_written_is_tried(model, tmp_path, monkeypatch):
    def fail(**_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(target.tempfile, "TemporaryFile", fail)
    for make in (
        lambda: output.in_place(model),
        lambda: output.output(model, tmp_path / "x.gguf"),
        lambda: output.output(model, tmp_path / "x.json"),
    ):
        fault(make, tmp_path, "Permission denied", "-o")


@posix
def test_a_file_that_is_larger_than_this_process_may_write_is_refused(model, monkeypatch):
    import resource

    monkeypatch.setattr(resource, "getrlimit", lambda _: (1000, 1000))
    fault(lambda: output.in_place(model), model, "File too large", "-o")


@posix
def test_other_names_of_a_file_are_told_of(model, plan_file, tmp_path):
    os.link(model, tmp_path / "second.gguf")
    result = run("strip", model)
    assert result.exit_code == 0 and "2 names (hard links)" in result.output
    assert read_plan(tmp_path / "second.gguf") == PLAN and read_plan(model) is None


def test_a_split_model_is_not_written_where_it_cannot_be_loaded(tmp_path):
    shards = [make_model(tmp_path / f"big-{i + 1:05}-of-00003.gguf", split=(i, 3)) for i in range(3)]
    (tmp_path / "else").mkdir()
    for path in (tmp_path / "else" / shards[0].name, tmp_path / "tuned-00001-of-00003.gguf"):
        fault(lambda path=path: output.copy(shards[0], path), path, "other 2", "plan.json")
        assert not path.exists()
    fault(lambda: output.copy(shards[0], tmp_path / "new.gguf"), "-00001-of-00003.gguf")
    fault(lambda: output.copy(shards[0], shards[1], force=True), "is read here")
    for shard in shards[1:]:
        shutil.copy(shard, tmp_path / "else")
    assert output.copy(shards[0], tmp_path / "else" / shards[0].name).write(PLAN) == tmp_path / "else" / shards[0].name
    make_model(tmp_path / "else" / shards[2].name, split=(1, 3))  # another shard in the third one's place
    fault(lambda: output.copy(shards[0], tmp_path / "else" / shards[0].name), shards[2].name)


def test_a_failure_at_the_end_tells_what_to_run(model, tmp_path, monkeypatch):
    to = output.sidecar(tmp_path / "x.json")
    monkeypatch.setattr(Plan, "save", lambda self, path: write_plan(tmp_path / "none.gguf", self))
    fault(lambda: to.write(PLAN, "Run: again -o ELSEWHERE."), "none.gguf", "again -o ELSEWHERE")


def test_a_model_is_not_replaced_by_a_sidecar(model):
    fault(lambda: PLAN.save(model), model, "GGUF model")
    assert read_plan(model) == PLAN


@posix
def test_names_that_are_no_utf_8_work(tmp_path, plan_file):
    model = make_model(tmp_path / os.fsdecode(b"mod\xe8le.gguf"))
    copy, sidecar = tmp_path / os.fsdecode(b"\xff.gguf"), tmp_path / os.fsdecode(b"\xfe.json")
    for args in (
        ["apply", model, plan_file],
        ["export", model, "-o", sidecar],
        ["strip", model, "-o", copy],
        ["strip", model],
    ):
        result = run(*args)
        assert result.exit_code == 0, result.output
    assert Plan.load(sidecar) == PLAN and read_plan(copy) is None and read_plan(model) is None
    assert r"\xff.gguf" in run("strip", copy).output


def test_a_calibration_whose_place_is_gone_at_the_end_tells_what_writes_it_without_measuring(
    model, tmp_path, monkeypatch
):
    from kvtuner_gguf.calibrate import pipeline

    folder = tmp_path / "a folder"
    folder.mkdir()

    def measured(options, progress):
        folder.rmdir()
        return type("Outcome", (), {"plan": PLAN})

    monkeypatch.setattr(pipeline, "calibrate", measured)
    result = run("calibrate", model, "--chunks", 3, "-o", folder / "x.json")
    assert result.exit_code == 1 and result.output.startswith(f"Error: {folder / 'x.json'}: not written")
    assert f"kvtuner-gguf calibrate {model} --chunks 3 -o '{folder / 'x.json'}' -o ELSEWHERE" in result.output
