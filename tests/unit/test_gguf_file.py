"""gguf_file: what is not the plan's stays byte for byte, a write that fails costs nothing."""

import errno
import os
import re
import shutil
import stat
import time
from collections import namedtuple

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader, GGUFWriter
from gguf_bytes import gguf, string, strings, u32
from small_gguf import PLAN, fault, make_model, our_metadata, unchanged

from kvtuner_gguf import gguf_file, gguf_header
from kvtuner_gguf.gguf_file import read_plan, weights_hash, write_plan
from kvtuner_gguf.gguf_header import read_header
from kvtuner_gguf.kvectors import KVectors
from kvtuner_gguf.pair import Pair
from kvtuner_gguf.plan import Plan

OTHER = Plan.uniform(Pair("f16", "q5_1"), 3)
O_TMPFILE = getattr(os, "O_TMPFILE", os.O_CREAT)
posix = pytest.mark.skipif(os.name == "nt", reason="needs POSIX modes, links and signals")


@pytest.fixture
def model(tmp_path):
    return make_model(tmp_path / "model.gguf")


def contents(path):
    """All keys but ours with their bytes, and all tensors with theirs, as the gguf package reads them."""
    reader = GGUFReader(path)
    fields = {
        key: b"".join(part.tobytes() for part in field.parts)
        for key, field in reader.fields.items()
        if not key.startswith(("kvtuner.", "GGUF."))
    }
    tensors = {t.name: (t.tensor_type, t.shape.tolist(), t.data.tobytes()) for t in reader.tensors}
    return list(fields.items()), tensors


# ---- a write


@pytest.mark.parametrize(
    "shape", [{}, {"alignment": 64}, {"alignment": 8}, {"n_tensors": 1}, {"n_tensors": 0}, {"last": b"tail"}], ids=str
)
@pytest.mark.parametrize("in_place", [True, False])
def test_write_and_strip_restore_the_file(shape, in_place, tmp_path):
    path = make_model(tmp_path / "model.gguf", **shape)
    original, parts = path.read_bytes(), contents(path)
    written = write_plan(path, PLAN, None if in_place else tmp_path / "planned.gguf")
    assert read_plan(written) == PLAN
    assert contents(written) == parts
    assert (path == written) == in_place and (in_place or path.read_bytes() == original)
    write_plan(written, OTHER)
    assert read_plan(written) == OTHER and contents(written) == parts
    assert sorted(our_metadata(written)) == [
        "kvtuner.checksum",
        "kvtuner.schema_version",
        "kvtuner.type_k",
        "kvtuner.type_v",
    ]
    write_plan(written, None)
    assert written.read_bytes() == original and read_plan(written) is None


def test_a_basis_is_written_as_8_bit_numbers(model):
    basis = KVectors((), (), bytes(range(256)), (0.5,) * 16)
    plan = Plan(PLAN.pairs, k_vectors=(basis, KVectors(), basis))
    write_plan(model, plan)
    assert read_plan(model) == plan
    field = GGUFReader(model).fields["kvtuner.k_basis"]
    assert [t.name for t in field.types] == ["ARRAY", "INT8"]
    assert np.array(field.contents()).astype(np.int8).tobytes() == bytes(range(256)) * 2


def test_tensor_data_is_copied_to_the_last_byte(tmp_path):
    path = make_model(tmp_path / "model.gguf", last=bytes(range(256)) * 3)
    data = path.read_bytes()[read_header(path).data_offset :]
    write_plan(path, PLAN)
    header = read_header(path)
    assert header.data_offset % 32 == 0
    assert path.read_bytes()[header.data_offset :] == data


def test_the_gguf_package_reads_what_was_written(model):
    write_plan(model, PLAN)
    fields = GGUFReader(model).fields
    for key, kind, value in PLAN.to_metadata():
        got = fields[key].contents()
        assert got == (np.float32(value) if kind == "f32" else value), key
        names = {"u32": "UINT32", "f32": "FLOAT32", "str": "STRING", "arr_str": "ARRAY"}
        assert fields[key].types[0].name == names[kind]
    assert list(fields)[-len(PLAN.to_metadata()) :] == [key for key, _, _ in PLAN.to_metadata()]


@pytest.mark.parametrize("block", [8, 9, 23, 64])
def test_what_ends_in_another_block_is_read_alike(block, tmp_path, monkeypatch):
    texts = ["", "a", "b" * 7, "c" * 100, "", "é" * 9]
    model = tmp_path / "model.gguf"
    model.write_bytes(gguf(string("general.architecture", "x"), strings("t", [t.encode() for t in texts]), u32("k", 7)))
    expected = read_header(model)
    assert model.read_bytes()[slice(*expected.keys[-1][1:])] == u32("k", 7)
    monkeypatch.setattr(gguf_header, "_BLOCK", block)
    assert read_header(model) == expected


def test_our_keys_go_from_anywhere_and_only_ours(tmp_path):
    path = make_model(tmp_path / "m.gguf", extra=[("kvtuner.k_mean", "x"), ("kvtuner", "no dot"), ("kvtunerx.y", "z")])
    parts = contents(path)
    write_plan(path, None)
    assert contents(path) == parts and "kvtuner" in dict(parts[0]) and our_metadata(path) == {}


def test_a_plan_that_the_package_wrote_is_read(tmp_path):
    path = tmp_path / "model.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(3)
    add = {"u32": writer.add_uint32, "f32": writer.add_float32, "str": writer.add_string, "arr_str": writer.add_array}
    for key, kind, value in PLAN.to_metadata():
        add[kind](key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert read_plan(path) == PLAN


def test_strip_without_a_plan_writes_nothing(model, monkeypatch):
    monkeypatch.setattr(gguf_file, "atomic_file", None)
    assert write_plan(model, None) == model


@pytest.mark.parametrize("kernel_copies", [True, False])
def test_large_data_is_copied_in_chunks(kernel_copies, model, monkeypatch):
    parts = contents(model)
    monkeypatch.setattr(gguf_file, "_CHUNK", 64)
    if not kernel_copies:
        monkeypatch.delattr(os, "copy_file_range", raising=False)
    write_plan(model, PLAN)
    assert contents(model) == parts


@posix
@pytest.mark.parametrize("mode", [0o600, 0o644, 0o755])
def test_mode_is_kept(mode, model, tmp_path):
    model.chmod(mode)
    copy = write_plan(model, PLAN, tmp_path / "copy.gguf")
    write_plan(model, PLAN)
    assert [stat.S_IMODE(path.stat().st_mode) for path in (model, copy)] == [mode, mode]


def test_version_2_stays_version_2(model):
    data = bytearray(model.read_bytes())
    data[4] = 2
    model.write_bytes(data)
    write_plan(model, PLAN)
    assert model.read_bytes()[4] == 2 and read_plan(model) == PLAN


# ---- a write that fails


@pytest.mark.parametrize(
    "place",
    [(os, "fsync"), (os, "replace"), (os, "chmod"), (gguf_file, "_copy"), (gguf_file, "_check_copy")],
    ids=lambda place: place[1],
)
@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), KeyboardInterrupt()], ids=repr)
def test_an_interrupted_write_leaves_the_old_file(place, error, model, monkeypatch):
    def fail(*_, **__):
        raise error

    original = model.read_bytes()
    monkeypatch.setattr(*place, fail)
    if isinstance(error, OSError):
        fault(lambda: write_plan(model, PLAN), model, "Input/output error", "unchanged")
    else:
        with pytest.raises(type(error)):
            write_plan(model, PLAN)
    monkeypatch.undo()
    unchanged(model, original)


def test_a_full_disk_is_seen_before_the_copy(model, monkeypatch):
    original = model.read_bytes()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: namedtuple("Usage", "free")(len(original) // 2))
    monkeypatch.setattr(gguf_file, "atomic_file", None)
    fault(lambda: write_plan(model, PLAN), model, "0 MiB free", "need 1 MiB", "-o")
    unchanged(model, original)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_fills_up_is_named_with_its_sizes(code, model, monkeypatch):
    def fail(out, data):
        raise OSError(code, os.strerror(code))

    original = model.read_bytes()
    monkeypatch.setattr(gguf_file, "_write", fail)
    fault(lambda: write_plan(model, PLAN), model, "no space", "MiB free", "need 1 MiB", "-o")
    unchanged(model, original)


def test_a_folder_that_cannot_be_written_is_named(model, tmp_path, monkeypatch):
    real = os.open

    def fail(path, flags, *args, **kwargs):
        if flags & os.O_CREAT or flags & O_TMPFILE == O_TMPFILE:
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return real(path, flags, *args, **kwargs)

    original = model.read_bytes()
    monkeypatch.setattr(os, "open", fail)
    fault(lambda: write_plan(model, PLAN), model, "Permission denied", tmp_path, "-o")
    monkeypatch.undo()
    unchanged(model, original)


@posix
def test_a_read_only_file_is_not_replaced(model):
    original = model.read_bytes()
    model.chmod(0o444)
    fault(lambda: write_plan(model, PLAN), model, "read-only", "-o")
    unchanged(model, original)


@posix
def test_a_link_is_not_replaced(model, tmp_path):
    link = tmp_path / "link.gguf"
    link.symlink_to(model)
    original = model.read_bytes()
    fault(lambda: write_plan(link, PLAN), link, os.path.realpath(model), "-o")
    fault(lambda: write_plan(model, PLAN, link), link, os.path.realpath(model), "-o")
    unchanged(model, original, ["link.gguf", "model.gguf"])
    assert read_plan(write_plan(link, PLAN, tmp_path / "copy.gguf")) == PLAN  # reading through a link is fine


def test_another_file_is_not_lost(model, tmp_path):
    other = make_model(tmp_path / "other.gguf", n_tensors=1)
    original = other.read_bytes()
    fault(lambda: write_plan(model, PLAN, other), other, "exists already", "-o")
    fault(lambda: write_plan(model, PLAN, tmp_path, overwrite=True), tmp_path, "exists already")
    assert other.read_bytes() == original
    write_plan(model, PLAN, other, overwrite=True)
    assert contents(other) == contents(model) and read_plan(other) == PLAN
    assert write_plan(model, OTHER, tmp_path / "." / "model.gguf") == model and read_plan(model) == OTHER


def test_a_folder_that_is_not_there_is_named(model, tmp_path):
    for name in ("x.gguf", "model.gguf"):
        fault(lambda name=name: write_plan(model, PLAN, tmp_path / "none" / name), "none", "No such file")


def test_a_source_that_changes_is_noticed(model, monkeypatch):
    real = gguf_file._copy_range

    def change(file, pos, end, out):
        os.utime(model, ns=(1, time.time_ns() + 10**9))
        real(file, pos, end, out)

    monkeypatch.setattr(gguf_file, "_copy_range", change)
    fault(lambda: write_plan(model, PLAN), model, "changed by another program")
    unchanged(model, model.read_bytes())
    assert read_plan(model) is None


def test_a_plan_for_another_model_is_refused(model):
    fault(lambda: write_plan(model, Plan.uniform(Pair("q8_0", "q8_0"), 4)), model, "has 3 layers", "the plan 4")


# ---- split models


@pytest.fixture
def shards(tmp_path):
    return [make_model(tmp_path / f"big-{i + 1:05}-of-00003.gguf", split=(i, 3)) for i in range(3)]


def test_a_split_model_has_its_plan_in_the_first_shard(shards, tmp_path):
    others = [path.read_bytes() for path in shards[1:]]
    write_plan(shards[0], PLAN)
    assert read_plan(shards[0]) == PLAN and [path.read_bytes() for path in shards[1:]] == others
    for call in (lambda: read_plan(shards[1]), lambda: write_plan(shards[2], PLAN)):
        fault(call, "of 3", "Give big-00001-of-00003.gguf")
    fault(lambda: write_plan(shards[0], PLAN, tmp_path / "new.gguf"), "new.gguf", "-00001-of-00003.gguf", "-o")
    assert read_plan(write_plan(shards[0], PLAN, tmp_path / "new-00001-of-00003.gguf")) == PLAN


def test_the_hash_of_a_split_model_needs_all_shards(shards, tmp_path):
    assert len({weights_hash(path) for path in shards}) == 1
    assert weights_hash(shards[0]) == fnv1a(b"".join(sorted(b"".join(table(p)) for p in shards)))
    shards[2].rename(tmp_path / "away.gguf")
    fault(lambda: weights_hash(shards[0]), "big-00003-of-00003.gguf is missing")
    fault(lambda: weights_hash(tmp_path / "away.gguf"), "away.gguf", "-of-00003.gguf")
    fault(lambda: read_plan(tmp_path / "away.gguf"), "shard 3 of 3", "Give NAME-00001-of-00003.gguf")


# ---- the hash


def fnv1a(data):
    digest = 0xCBF29CE484222325
    for byte in data:
        digest = (digest ^ byte) * 0x100000001B3 % 2**64
    return f"{digest:016x}"


def table(path):
    """The hashed text of each tensor, from the gguf package; our test models hold f32, q4_0 and f16."""
    rows = []
    for tensor in sorted(GGUFReader(path).tensors, key=lambda t: t.name):
        dims = ",".join(map(str, [*tensor.shape.tolist(), 1, 1, 1, 1][:4]))
        rows.append(f"{tensor.name}\0{tensor.tensor_type.name.lower()}\0{dims}\n".encode())
    return rows


def test_fnv1a_is_the_published_one():
    assert fnv1a(b"") == "cbf29ce484222325" and fnv1a(b"a") == "af63dc4c8601ec8c"


def test_weights_hash_names_the_tensor_table(model, tmp_path):
    assert table(model)[0] == b"blk.0.ffn.weight\0q4_0\x0064,3,1,1\n"
    assert weights_hash(model) == fnv1a(b"".join(table(model)))
    assert weights_hash(write_plan(model, PLAN, tmp_path / "planned.gguf")) == weights_hash(model)
    assert weights_hash(make_model(tmp_path / "other.gguf", n_tensors=2)) != weights_hash(model)


@pytest.mark.parametrize("kind", [kind for kind in GGMLQuantizationType if kind in gguf_header.TENSOR_TYPES])
def test_the_type_table_is_that_of_ggml(kind):
    name, block_size, type_size = gguf_header.TENSOR_TYPES[kind]
    if kind != GGMLQuantizationType.Q8_1:  # the package still has the 40 bytes it once had
        assert (block_size, type_size) == GGML_QUANT_SIZES[kind]
    assert name == re.sub(r"_k$", "_K", kind.name.lower())  # ggml writes q6_K, but iq4_nl and q8_0
