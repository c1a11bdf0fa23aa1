"""A record reads as it was written, or it is as one that is not there."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import stat
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest

from kvtuner_gguf import Pair
from kvtuner_gguf.calibrate import records
from kvtuner_gguf.calibrate.records import (
    append_line,
    load_arrays,
    load_json,
    read_lines,
    save_arrays,
    save_json,
    write_record,
)
from kvtuner_gguf.calibrate.results import Conditions, ErrorTable
from kvtuner_gguf.calibrate.samples import Capture
from kvtuner_gguf.calibrate.store import Evaluations, Store
from kvtuner_gguf.calibrate.text import Text
from kvtuner_gguf.errors import CalibrationError
from kvtuner_gguf.kvectors import KVectors
from kvtuner_gguf.quality import Quality

posix = pytest.mark.skipif(os.name == "nt", reason="needs POSIX modes")
TABLE = ErrorTable((Pair("q8_0", "q8_0"),), (0, 2), {"key_error": np.array([[0.1], [1 / 3]])})
KINDS = [
    Text("a.txt", "0" * 64, np.arange(7, dtype=np.int32), np.arange(3, dtype=np.int32)),
    Conditions((KVectors(), KVectors((0.5,), (2.0,))), {1: {"none": 0.1, "mean": 0.05}}),
    Conditions((KVectors((), (2.0,), b"\x81", (0.5,)), KVectors()), {0: {"none": 0.1, "klt": 0.05}}),
    TABLE,
]


def same(a: object, b: object) -> bool:
    if isinstance(a, np.ndarray):
        return np.array_equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return all(map(same, vars(a).values(), vars(b).values())) if isinstance(a, ErrorTable | Text) else a == b


def pickled(path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, name="x", sha256="y", calibration=np.zeros(3), heldout=np.array([object()], dtype=object))


def damaged(data: bytes, rng: random.Random) -> bytes:
    """The bytes with a bit flipped, cut off, without a piece, with one twice, or with others at their end."""
    at, n = rng.randrange(len(data)), rng.randrange(1, 200)
    way = rng.randrange(5)
    if way == 0:
        return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
    return [data[:at], data[:at] + data[at + n :], data[: at + n] + data[at:], data + rng.randbytes(n)][way - 1]


@pytest.mark.parametrize("record", KINDS, ids=lambda r: type(r).__name__)
def test_a_damaged_record_is_an_error_of_one_kind_or_reads_as_it_was(record, tmp_path):
    path, rng = tmp_path / "record", random.Random(0)
    record.save(path)
    data = path.read_bytes()
    assert same(type(record).load(path), record)
    for _ in range(150):
        path.write_bytes(damaged(data, rng))
        try:
            found = type(record).load(path)
        except CalibrationError:
            continue
        assert same(found, record)  # a space in JSON says nothing


@pytest.mark.parametrize("record", KINDS, ids=lambda r: type(r).__name__)
@pytest.mark.parametrize(
    "make",
    [
        lambda path: path.mkdir(),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"[" * 100_000),
        lambda path: path.write_bytes(b'{"record": 1e999999, "sha256": ' + b"9" * 10_000 + b"}"),
        lambda path: pickled(path),
        lambda path: save_json(path, "Another", {"il": [0]}),
        lambda path: path.symlink_to(path),
    ],
    ids=["folder", "empty", "nested", "huge numbers", "pickle", "another record", "loop"],
)
def test_what_is_no_record_is_an_error_of_one_kind(record, make, tmp_path):
    path = tmp_path / "record"
    try:
        make(path)
    except (NotImplementedError, OSError):
        pytest.skip("this system has no links")
    with pytest.raises(CalibrationError):
        type(record).load(path)


def test_a_record_that_does_not_read_is_made_again(tmp_path):
    record, made = KINDS[0], []

    def make() -> Text:
        made.append(1)
        return record

    for n_made, data in ((1, None), (1, None), (2, b"PK\x03\x04 cut"), (2, None)):
        if data is not None:
            (tmp_path / "text.npz").write_bytes(data)
        assert same(Store(tmp_path).get(Text, "text.npz", make), record)
        assert len(made) == n_made


@pytest.mark.parametrize("data", [None, b"PK\x03\x04 cut"])
def test_where_records_are_only_read_a_damaged_one_was_not_measured(data, tmp_path):
    if data is not None:
        (tmp_path / "text.npz").write_bytes(data)
    with pytest.raises(CalibrationError, match="was not measured.*kvtuner-gguf calibrate m.gguf"):
        Store(tmp_path, read_only_of=Path("m.gguf")).get(Text, "text.npz", lambda: pytest.fail("measured"))


def test_a_damaged_sample_of_a_capture_is_named(tmp_path):
    save_arrays(tmp_path / "l000_s00.npz", q=np.zeros(3))
    with (tmp_path / "l000_s00.npz").open("r+b") as file:
        file.truncate(100)
    with pytest.raises(CalibrationError, match="l000_s00.npz: damaged"):
        Capture(tmp_path, 1, (0,), 1).sample(0, 0)


@posix
@pytest.mark.parametrize(
    "make",
    [
        lambda p: (p / "deep").mkdir(parents=True),
        lambda p: p.symlink_to(p),
        lambda p: os.mkfifo(p),
        lambda p: p.symlink_to("/dev/full"),
    ],
    ids=["folder", "loop", "pipe", "device"],
)
def test_what_stands_in_a_records_place_goes(make, tmp_path):
    for name in ("text.npz", "lines"):
        make(tmp_path / name)
    assert same(Store(tmp_path).get(Text, "text.npz", lambda: KINDS[0]), KINDS[0])
    assert read_lines(tmp_path / "lines") == []
    append_line(tmp_path / "lines", {"a": 1})
    assert same(Text.load(tmp_path / "text.npz"), KINDS[0]) and read_lines(tmp_path / "lines") == [{"a": 1}]


@posix
def test_records_are_their_owners_alone(tmp_path):
    KINDS[1].save(tmp_path / "new" / "folder" / "a.json")
    append_line(tmp_path / "lines", {"a": 1})
    modes = [
        stat.S_IMODE(p.stat().st_mode)
        for p in (tmp_path / "new" / "folder", tmp_path / "new" / "folder" / "a.json", tmp_path / "lines")
    ]
    assert modes == [0o700, 0o600, 0o600]


def test_a_record_without_room_is_an_error_with_the_folder_and_its_cure(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    for write in (
        lambda: KINDS[1].save(tmp_path / "a.json"),
        lambda: append_line(tmp_path / "lines", {"a": 1}),
        lambda: KINDS[0].save(tmp_path / "a.npz"),
    ):
        with pytest.raises(CalibrationError, match=rf"no space: \d+ MiB free.*{tmp_path}.*XDG_CACHE_HOME"):
            write()
    assert os.listdir(tmp_path) in ([], ["lines"])


# ---- lines


PAIRS = [(Pair("q8_0", t),) for t in ("q8_0", "q5_0", "q4_0", "f16")]


def quality(i: int) -> Quality:
    return Quality(0.25 * i, 1.5, 0.5, 10)


def filled(path: Path) -> Evaluations:
    cache = Evaluations(path)
    for i, pairs in enumerate(PAIRS):
        cache.get("search", lambda _, i=i: quality(i), pairs)
    return cache


def test_what_was_measured_is_read_again(tmp_path):
    filled(tmp_path / "e.jsonl")
    assert Evaluations(tmp_path / "e.jsonl").of("search") == [(pairs, quality(i)) for i, pairs in enumerate(PAIRS)]


def test_a_cut_line_takes_no_other_with_it(tmp_path):
    path = tmp_path / "e.jsonl"
    filled(path)
    whole = path.read_bytes()
    for cut in range(len(whole.splitlines(keepends=True)[0]) + 1, len(whole), 5):
        path.write_bytes(whole[:cut])
        cache = Evaluations(path)
        n_before = len(cache.of("search"))
        assert n_before in (whole[:cut].count(b"\n"), whole[:cut].count(b"\n") + 1)
        cache.get("search", lambda _: quality(9), (Pair("q4_0", "q4_0"),))
        assert Evaluations(path).of("search") == [
            *cache.of("search")[:n_before],
            ((Pair("q4_0", "q4_0"),), quality(9)),
        ]


def test_lines_that_are_not_as_they_were_written_are_left_out(tmp_path):
    path, rng = tmp_path / "e.jsonl", random.Random(1)
    right = dict(filled(path).of("search"))
    data = path.read_bytes()
    for _ in range(300):
        path.write_bytes(damaged(data, rng))
        assert all(right[pairs] == found for pairs, found in Evaluations(path).of("search"))


@pytest.mark.parametrize(
    "line",
    [b"null", b"[]", b"3", b'"a"', b"{}", b"\xff\xfe", b"[" * 100_000, b'{"seal": "x", "what": 1e999}', b"\0" * 100],
)
def test_a_line_that_is_none_of_ours_is_left_out(line, tmp_path):
    (tmp_path / "lines").write_bytes(line + b"\n")
    append_line(tmp_path / "lines", {"a": 1})
    assert read_lines(tmp_path / "lines") == [{"a": 1}]


def test_lines_in_what_is_no_file_are_none(tmp_path):
    assert read_lines(tmp_path) == [] == read_lines(tmp_path / "none")


def test_arrays_come_back_as_they_were(tmp_path):
    arrays = {"a": np.arange(6, dtype=np.float16).reshape(2, 3), "b": np.array("größe"), "c": np.array(3)}
    save_arrays(tmp_path / "a.npz", **arrays)
    found = load_arrays(tmp_path / "a.npz")
    assert found.keys() == arrays.keys() and all(
        np.array_equal(found[k], v) and found[k].dtype == v.dtype for k, v in arrays.items()
    )
    with np.load(tmp_path / "a.npz") as file:  # numpy reads it, too: the seal stands after the archive
        assert sorted(file.files) == ["a", "b", "c"]


def test_json_is_readable_by_others(tmp_path):
    TABLE.save(tmp_path / "errors.json")
    assert json.loads((tmp_path / "errors.json").read_text())["measures"]["key_error"] == [[0.1], [1 / 3]]
    assert load_json(tmp_path / "errors.json", "ErrorTable", lambda data: data["il"]) == [0, 2]


def test_free_room_is_told_where_a_write_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: namedtuple("Usage", "free")(3 << 20))
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(errno.EDQUOT, "Disk quota exceeded")))
    with pytest.raises(CalibrationError, match="3 MiB free"):
        write_record(tmp_path / "a", b"x")
    assert records.CURE.startswith("Make room")
