"""gguf_file and gguf_header: a broken file is named, costs little to refuse, and stays as it is."""

import os
import random
import struct
import time
from contextlib import suppress

import pytest
from gguf_bytes import ARRAY, STRING, U8, U32, array, entry, gguf, string, strings, tensor, text, u32
from small_gguf import PLAN, fault, make_model, our_metadata, unchanged

from kvtuner_gguf.errors import PlanError
from kvtuner_gguf.gguf_file import read_plan, weights_hash, write_plan
from kvtuner_gguf.gguf_header import read_header

BASE = (string("general.architecture", "llama"), u32("llama.block_count", 3))
HUGE = 1 << 62
BROKEN = {
    "empty": (b"", ["starts with b''"]),
    "text": (b"hello world", ["b'hell'", "need b'GGUF'"]),
    "magic only": (b"GGUF", ["cut off", "of 4"]),
    "version 1": (gguf(*BASE, version=1), ["version 1", "need 2 or 3"]),
    "version 0": (gguf(*BASE, version=0), ["big-endian"]),
    "version 4": (gguf(*BASE, version=4), ["version 4", "need 2 or 3"]),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), ["big-endian", "0x3000000"]),
    "many keys": (gguf(*BASE, n_kv=HUGE), [HUGE, "metadata keys"]),
    "many tensors": (gguf(*BASE, n_tensors=HUGE), [HUGE, "tensors"]),
    "few keys more": (gguf(*BASE, n_kv=4), ["metadata"]),
    "few tensors more": (gguf(*BASE, n_tensors=4), ["cut off", "tensor 1"]),
    "long key": (gguf(struct.pack("<Q", HUGE)), ["metadata key 0", HUGE]),
    "long string": (gguf(entry("a.block_count", STRING, struct.pack("<Q", 2**64 - 1))), ["'a.block_count'", 2**64 - 1]),
    "skipped long string": (gguf(entry("k", STRING, struct.pack("<Q", 2**64 - 1))), ["'k'", 2**64 - 1]),
    "long array": (gguf(array("k", U32, HUGE, b"")), ["'k'", 4 * HUGE]),
    "long array of strings": (gguf(array("k", STRING, HUGE, b"")), ["'k'", 8 * HUGE]),
    "array of arrays": (gguf(array("k", ARRAY, 1, array("", ARRAY, 1, b""))), ["'k'", "array of type 9"]),
    "value type 13": (gguf(entry("k", 13, b"")), ["'k'", "13"]),
    "array of type 99": (gguf(array("k", 99, 1, b"")), ["'k'", "99"]),
    "key twice": (gguf(*BASE, BASE[1]), ["'llama.block_count' stands twice"]),
    "key not UTF-8": (gguf(text(b"\xff\xfe") + bytes(12)), ["metadata key 0", "UTF-8"]),
    "plan not UTF-8": (gguf(strings("kvtuner.type_k", [b"q8\xff"])), ["'kvtuner.type_k'", "UTF-8"]),
    "alignment 0": (gguf(u32("general.alignment", 0)), ["general.alignment", "got 0"]),
    "alignment 33": (gguf(u32("general.alignment", 33)), ["general.alignment", "got 33"]),
    "alignment 2^31": (gguf(u32("general.alignment", 1 << 31)), ["general.alignment", 1 << 31]),
    "alignment text": (gguf(string("general.alignment", "x")), ["got 'x'"]),
    "block_count text": (gguf(BASE[0], string("llama.block_count", "3")), ["got '3'"]),
    "split.no text": (gguf(*BASE, string("split.no", "3")), ["split.no", "got '3'"]),
    "5 dimensions": (gguf(*BASE, tensors=[tensor(shape=(1,) * 5)]), ["tensor 'a'", "5 dimensions"]),
    "tensor twice": (gguf(*BASE, tensors=[tensor(), tensor()], data=bytes(128)), ["tensor 'a' stands twice"]),
    "tensor cut off": (gguf(*BASE, tensors=[tensor()], data=bytes(127)), ["cut off", "tensor 'a'"]),
    "tensor beyond": (gguf(*BASE, tensors=[tensor(offset=2**64 - 1)], data=bytes(128)), ["cut off", "tensor 'a'"]),
    "tensor huge": (gguf(*BASE, tensors=[tensor(shape=(2**63,) * 4)], data=bytes(128)), ["cut off", "tensor 'a'"]),
    "long name": (gguf(*BASE, tensors=[struct.pack("<Q", HUGE)]), ["tensor 0", HUGE]),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_named(name, tmp_path):
    data, parts = BROKEN[name]
    path = tmp_path / "broken.gguf"
    path.write_bytes(data)
    for call in (read_header, our_metadata, read_plan, weights_hash, lambda p: write_plan(p, PLAN)):
        fault(lambda call=call: call(path), path, *parts)
    unchanged(path, data, ["broken.gguf"])


def test_a_file_that_is_no_file_is_named(tmp_path):
    fault(lambda: read_header(tmp_path / "none.gguf"), "none.gguf", "No such file")
    fault(lambda: write_plan(tmp_path, PLAN), tmp_path, "folder")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        fault(lambda: read_plan(tmp_path / "pipe"), "pipe", "device")


@pytest.mark.parametrize(
    ("kv", "parts"),
    [
        ((BASE[1],), ["block_count"]),
        ((BASE[0],), ["llama.block_count"]),
        ((BASE[0], u32("llama.block_count", 0)), ["llama.block_count"]),
    ],
)
def test_a_file_without_layers_takes_no_plan(kv, parts, tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(gguf(*kv))
    fault(lambda: write_plan(path, PLAN), path, *parts)


def test_a_faulty_plan_in_a_file_is_named_and_can_be_replaced(tmp_path):
    path = tmp_path / "model.gguf"
    sides = [strings(f"kvtuner.type_{side}", ["q8_0", "q8_0", "q9"]) for side in "kv"]
    path.write_bytes(gguf(*BASE, u32("kvtuner.schema_version", 1), *sides))
    fault(lambda: read_plan(path), path, "type_k: layer 2", "q9")
    write_plan(path, PLAN)
    assert read_plan(path) == PLAN
    path.write_bytes(gguf(*BASE, u32("kvtuner.schema_version", 1), u32("kvtuner.type_k", 1)))
    fault(lambda: read_plan(path), path, "type_k", "got 1")
    path.write_bytes(gguf(*BASE, u32("kvtuner.schema_version", 2), *sides))
    fault(lambda: read_plan(path), path, "schema_version", "got 2")
    path.write_bytes(gguf(BASE[0], u32("llama.block_count", 4), u32("kvtuner.schema_version", 1), *sides))
    fault(lambda: read_plan(path), path)


def test_a_tensor_type_of_the_future_can_be_written_but_not_hashed(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(gguf(*BASE, tensors=[tensor(kind=99)], data=bytes(128)))
    assert read_plan(write_plan(path, PLAN)) == PLAN
    fault(lambda: weights_hash(path), path, "'a'", "type")


def test_names_from_a_file_do_not_reach_the_terminal_raw(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(gguf(*BASE, tensors=[tensor(name="\x1b[2J" + "x" * 5000)]))
    message = fault(lambda: read_header(path), "\\x1b")
    assert "\x1b" not in message and len(message) < 400


def test_a_truncation_anywhere_is_a_plan_error(tmp_path):
    model = make_model(tmp_path / "model.gguf")
    data, end = model.read_bytes(), read_header(model).tensors[-1]
    for size in range(0, end.offset + end.n_bytes, 3):
        model.write_bytes(data[:size])
        with pytest.raises(PlanError):
            read_header(model)


def test_damage_is_a_plan_error_or_nothing(tmp_path):
    model = make_model(tmp_path / "model.gguf")
    rng, data = random.Random(0), model.read_bytes()
    header = read_header(model).data_offset
    for _ in range(400):
        broken = bytearray(data)
        for _ in range(rng.randint(1, 4)):
            broken[rng.randrange(header)] = rng.choice((0, 1, 8, 9, 127, 128, 255, rng.randrange(256)))
        model.write_bytes(broken)
        with suppress(PlanError):
            read_header(model, prefix="")


def test_a_hostile_header_costs_little(tmp_path):
    path = tmp_path / "model.gguf"
    cases = [
        gguf(array("k", STRING, 1 << 20, b""), data=bytes(8 << 20)),  # empty strings
        gguf(array("kvtuner.x", U8, 1 << 24, b""), data=bytes(1 << 24)),
        gguf(n_kv=1 << 20, data=bytes(13 << 20)),  # empty keys
    ]
    for data in cases:
        path.write_bytes(data)
        start = time.process_time()
        with suppress(PlanError):
            read_header(path)
        assert time.process_time() - start < 5
