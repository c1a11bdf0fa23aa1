"""Whatever stands in a file's kvtuner.* keys or in the overrides: the model loads and runs, and a note says what was
wrong.

Only a file that is no GGUF any more fails to load, with an error.
"""

import struct
from functools import partial

import models
import numpy as np
import pytest
from gguf_bytes import (
    ARRAY,
    BOOL,
    F32,
    I32,
    STRING,
    U8,
    U32,
    U64,
    array,
    entry,
    string,
    strings,
    text,
    u32,
    with_entries,
)
from running import feed, prompt

from kvtuner_gguf import native
from kvtuner_gguf.errors import NativeError
from kvtuner_gguf.gguf_file import weights_hash, write_plan
from kvtuner_gguf.gguf_header import read_header
from kvtuner_gguf.pair import Pair
from kvtuner_gguf.plan import Plan

pytestmark = pytest.mark.native

N_LAYER = 4
F16, Q8_0 = ("f16", "f16"), ("q8_0", "q8_0")

VERSION, TYPE_K, TYPE_V = "kvtuner.schema_version", "kvtuner.type_k", "kvtuner.type_v"
WEIGHTS, ENABLED = "kvtuner.calibration.weights", "kvtuner.enabled"
GOOD = {VERSION: u32(VERSION, 1)} | {key: strings(key, [b"q8_0"] * N_LAYER) for key in (TYPE_K, TYPE_V)}


def names(name):
    """A type list with this name in layer 1."""
    return [b"q8_0", name, b"q8_0", b"q8_0"]


# what is wrong -> (entries in place of the good ones, None = left out; what the note says)
IGNORED = {
    "version missing": ({VERSION: None}, "schema_version is missing or not a u32"),
    "version 0": ({VERSION: u32(VERSION, 0)}, "schema_version is 0, this build reads 1"),
    "version 2": ({VERSION: u32(VERSION, 2)}, "schema_version is 2, this build reads 1"),
    "version 2^32-1": ({VERSION: u32(VERSION, 2**32 - 1)}, "schema_version is 4294967295, this build reads 1"),
    "version i32": ({VERSION: entry(VERSION, I32, struct.pack("<i", 1))}, "schema_version is missing or not a u32"),
    "version u64": ({VERSION: entry(VERSION, U64, struct.pack("<Q", 1))}, "schema_version is missing or not a u32"),
    "version f32": ({VERSION: entry(VERSION, F32, struct.pack("<f", 1))}, "schema_version is missing or not a u32"),
    "version text": ({VERSION: string(VERSION, b"1")}, "schema_version is missing or not a u32"),
    "version array": (
        {VERSION: array(VERSION, U32, 1, struct.pack("<I", 1))},
        "schema_version is missing or not a u32",
    ),
    "no type_k": ({TYPE_K: None}, "type_k is missing"),
    "no type_v": ({TYPE_V: None}, "type_v is missing"),
    "type_k text": ({TYPE_K: string(TYPE_K, b"q8_0")}, "type_k is not an array of string"),
    "type_k u32": ({TYPE_K: u32(TYPE_K, 8)}, "type_k is not an array of string"),
    "type_k bool": ({TYPE_K: entry(TYPE_K, BOOL, b"\1")}, "type_k is not an array of string"),
    "type_k numbers": (
        {TYPE_K: array(TYPE_K, U32, 4, struct.pack("<4I", 8, 8, 8, 8))},
        "type_k is not an array of string",
    ),
    "type_k bytes": ({TYPE_K: array(TYPE_K, U8, 4, b"\x08\x08\x08\x08")}, "type_k is not an array of string"),
    "type_k bools": ({TYPE_K: array(TYPE_K, BOOL, 4, b"\1\1\1\1")}, "type_k is not an array of string"),
    "type_v text": ({TYPE_V: string(TYPE_V, b"q8_0,q8_0,q8_0,q8_0")}, "type_v is not an array of string"),
    "type_v floats": (
        {TYPE_V: array(TYPE_V, F32, 4, struct.pack("<4f", 8, 8, 8, 8))},
        "type_v is not an array of string",
    ),
    "type_k short": ({TYPE_K: strings(TYPE_K, [b"q8_0"] * 3)}, "type_k has 3 entries, the model has 4 layers"),
    "type_v long": ({TYPE_V: strings(TYPE_V, [b"q8_0"] * 5)}, "type_v has 5 entries, the model has 4 layers"),
    "type_k empty": ({TYPE_K: strings(TYPE_K, [])}, "type_k has 0 entries, the model has 4 layers"),
    "type_v huge": (
        {TYPE_V: strings(TYPE_V, [b"q8_0"] * 100_000)},
        "type_v has 100000 entries, the model has 4 layers",
    ),
    "both broken": ({TYPE_K: u32(TYPE_K, 8), TYPE_V: None}, "type_k is not an array of string"),
}
# a name in layer 1 -> how the note shows it
UNKNOWN_NAMES = {
    "a type to come": (b"q3_9", "'q3_9'"),
    "upper case": (b"Q8_0", "'Q8_0'"),
    "a blank": (b"q8_0 ", "'q8_0 '"),
    "a type of weights": (b"q6_K", "'q6_K'"),
    "a type of activations": (b"q8_1", "'q8_1'"),
    "an integer type": (b"i32", "'i32'"),
    "a number": (b"8", "'8'"),
    "control characters": (b"\x1b[2J\r\nq8_0\x07", "'?[2J??q8_0?'"),
    "no UTF-8": (b"\xff\xfe\x80q8", "'???q8'"),
    "a format": (b"%s%n%x", "'%s%n%x'"),
    "a megabyte": (b"A" * (1 << 20), "'" + "A" * 40 + "...'"),
}


@pytest.fixture
def file_with(tiny, tmp_path):
    """file_with(changes) -> a model with the good entries, some replaced or left out."""

    def write(changes):
        entries = [e for e in (GOOD | changes).values() if e is not None]
        return with_entries(tiny("llama"), tmp_path / "model.gguf", entries)

    return write


def allocated(session):
    """(K type, V type) of each layer of a context that decodes."""
    with session.context(256) as ctx:
        assert np.isfinite(feed(ctx, prompt(8))).all()
        return [(layer.type_k, layer.type_v) for layer in ctx.layers()]


def notes_of(session):
    """The notes, which are safe to print."""
    notes = native.plan_notes(session.model)
    assert all(note.isprintable() and note.isascii() and len(note) < 400 for note in notes)
    return notes


def test_the_good_entries_are_a_plan(load, file_with):
    session = load(file_with({}))
    assert notes_of(session) == []
    assert allocated(session) == [Q8_0] * N_LAYER


@pytest.mark.parametrize("case", IGNORED)
def test_a_broken_plan_is_ignored_with_a_note(load, file_with, case):
    changes, want = IGNORED[case]
    session = load(file_with(changes))
    (note,) = notes_of(session)
    assert want in note and note.endswith("the plan is ignored")
    assert native.plan_source(session.model) == "none"
    assert allocated(session) == [F16] * N_LAYER


@pytest.mark.parametrize("key", [TYPE_K, TYPE_V])
@pytest.mark.parametrize("case", UNKNOWN_NAMES)
def test_an_unknown_name_is_f16_with_a_note(load, file_with, key, case):
    name, shown = UNKNOWN_NAMES[case]
    session = load(file_with({key: strings(key, names(name))}))
    (note,) = notes_of(session)
    assert f"{key}: layers 1 have the type {shown}, which this build does not know: f16 there" in note
    faulty = ("f16", "q8_0") if key == TYPE_K else ("q8_0", "f16")
    assert allocated(session) == [Q8_0, faulty, Q8_0, Q8_0]


def test_names_that_are_all_unknown_are_f16(load, file_with):
    session = load(file_with({key: strings(key, [b"x", b"x", b"y", b"x"]) for key in (TYPE_K, TYPE_V)}))
    assert [n.split(",")[0] for n in notes_of(session) if "'y'" in n] == [
        f"{k}: layers 2 have the type 'y'" for k in (TYPE_K, TYPE_V)
    ]
    assert allocated(session) == [F16] * N_LAYER


def test_empty_names_are_f16_and_no_fault(load, file_with):
    session = load(file_with({TYPE_K: strings(TYPE_K, [b""] * 4), TYPE_V: strings(TYPE_V, names(b""))}))
    assert notes_of(session) == []
    assert allocated(session) == [("f16", "q8_0"), F16, ("f16", "q8_0"), ("f16", "q8_0")]


@pytest.mark.parametrize("flag", [u32(ENABLED, 0), string(ENABLED, b"false"), array(ENABLED, BOOL, 1, b"\0")])
def test_an_enabled_that_is_no_bool_does_not_count(load, file_with, flag):
    session = load(file_with({ENABLED: flag}))
    assert notes_of(session) == ["kvtuner.enabled is not a bool: it is ignored"]
    assert allocated(session) == [Q8_0] * N_LAYER


def test_figures_of_any_kind_do_not_matter_to_the_run_time(load, file_with):
    faults = {
        key: string(f"kvtuner.{key}", b"\xff") for key in ("bits_per_value", "kld_mean", "rival", "calibration.seed")
    }
    session = load(file_with(faults | {"new": u32("kvtuner.of_a_later_version", 7)}))
    assert notes_of(session) == []
    assert allocated(session) == [Q8_0] * N_LAYER


# ---- the hash of the weights


def test_the_hash_of_the_same_weights_gives_no_note(load, tiny, tmp_path):
    for arch in ("llama", "gemma3", "hybrid", "mla"):
        src = tiny(arch)
        n_layer = load(src).n_layer
        plan = Plan((Pair("q8_0", "q8_0"),) * n_layer, calibration={"weights": weights_hash(src)})
        session = load(write_plan(src, plan, tmp_path / f"{arch}.gguf"))
        assert native.plan_source(session.model) == "file"
        assert notes_of(session) == []


@pytest.mark.parametrize("have", [b"0123456789abcdef", b"", b"\x1b[31m" + b"x" * 1000])
def test_the_hash_of_other_weights_gives_a_note_and_the_plan_is_used(load, tiny, file_with, have):
    session = load(file_with({WEIGHTS: string(WEIGHTS, have)}))
    (note,) = notes_of(session)
    assert "calibrated on other weights" in note and "calibrate again" in note
    assert f"this file has {weights_hash(tiny('llama'))}" in note
    assert allocated(session) == [Q8_0] * N_LAYER


def test_a_hash_that_is_no_text_gives_a_note_and_the_plan_is_used(load, file_with):
    session = load(file_with({WEIGHTS: u32(WEIGHTS, 7)}))
    assert notes_of(session) == ["kvtuner.calibration.weights is not a string: the plan is used, whatever the weights"]
    assert allocated(session) == [Q8_0] * N_LAYER


def test_the_plan_of_a_split_model_is_in_its_first_shard(load, tmp_path, monkeypatch):
    monkeypatch.setattr(models, "GGUFWriter", partial(models.GGUFWriter, split_max_tensors=20))
    models.tiny_llama(tmp_path / "model.gguf")
    first, *others = sorted(tmp_path.iterdir())
    assert len(others) == 1
    plan = Plan((Pair("q8_0", "q8_0"),) * N_LAYER, calibration={"weights": weights_hash(first)})
    session = load(write_plan(first, plan))
    assert native.plan_source(session.model) == "file"
    assert notes_of(session) == []  # the hash is that of both shards
    assert allocated(session) == [Q8_0] * N_LAYER


# ---- overrides


@pytest.mark.parametrize(
    "key",
    [
        "kvtuner.type_k.4",
        "kvtuner.type_v.999999",
        "kvtuner.type_k.99999999999999999999",
        "kvtuner.type_k.-1",
        "kvtuner.type_k.",
        "kvtuner.type_k",
        "kvtuner.type_k.1.0",
        "kvtuner.type_k. 1",
        "kvtuner.type_v.0x1",
        "kvtuner.type_q.1",
        "kvtuner.type",
        "kvtuner.enable",
        "kvtuner.schema_version",
        "kvtuner.",
    ],
)
def test_an_override_of_no_layer_is_ignored_with_a_note(load, tiny, key):
    session = load(tiny("llama"), overrides={key: "q8_0"})
    assert notes_of(session) == [
        f"override {key}: need kvtuner.enabled, kvtuner.k_mean, kvtuner.k_scale, kvtuner.k_basis, "
        "kvtuner.type_k.N or kvtuner.type_v.N with N from 0 to 3: it is ignored"
    ]
    assert allocated(session) == [F16] * N_LAYER


@pytest.mark.parametrize(
    ("value", "shown"), [("q9", "q9"), ("", ""), ("Q4_0", "Q4_0"), ("\x1b[0m", "?[0m"), (True, "(not a string)")]
)
def test_an_override_by_no_type_is_ignored_with_a_note(load, file_with, value, shown):
    session = load(file_with({}), overrides={"kvtuner.type_k.1": value, "kvtuner.type_v.2": "q4_0"})
    assert notes_of(session) == [f"override kvtuner.type_k.1: '{shown}' is not the name of a cache type: it is ignored"]
    assert allocated(session) == [Q8_0, Q8_0, ("q8_0", "q4_0"), Q8_0]


def test_an_override_of_enabled_that_is_no_bool_is_ignored_with_a_note(load, file_with):
    session = load(file_with({}), overrides={"kvtuner.enabled": "false"})
    assert notes_of(session) == ["override kvtuner.enabled is not a bool: it is ignored"]
    assert allocated(session) == [Q8_0] * N_LAYER


def test_a_vocabulary_alone_has_no_plan_and_no_notes(tiny, file_with):
    native.library()
    from llama_cpp import llama_cpp

    params = llama_cpp.llama_model_default_params()
    params.vocab_only = True
    model = llama_cpp.llama_model_load_from_file(str(file_with({})).encode(), params)
    try:
        assert native.plan_source(model) == "none"
        assert native.plan_notes(model) == []
    finally:
        llama_cpp.llama_model_free(model)


# ---- files that are no GGUF any more


NOT_A_GGUF = {
    "array of arrays": array(TYPE_K, ARRAY, 1, struct.pack("<IQ", STRING, 1) + text(b"q8_0")),
    "value type 99": entry(TYPE_K, 99, b"\0" * 8),
    "array of type 99": array(TYPE_K, 99, 4, b"\0" * 64),
    "key twice": GOOD[VERSION] + GOOD[VERSION],
    **{f"text of {n:#x} bytes": entry(TYPE_K, STRING, struct.pack("<Q", n)) for n in (1 << 40, 1 << 63, (1 << 64) - 1)},
    **{f"{n:#x} strings": array(TYPE_K, STRING, n, text(b"q8_0")) for n in (1 << 40, 1 << 60, 1 << 63, (1 << 64) - 1)},
    **{f"{n:#x} numbers": array(TYPE_K, U64, n, b"\0" * 64) for n in (1 << 40, 1 << 61, (1 << 64) - 1)},
    "string of a huge name": array(TYPE_K, STRING, 4, struct.pack("<Q", (1 << 64) - 9) + b"q8_0"),
}


@pytest.mark.parametrize("case", NOT_A_GGUF)
def test_a_file_that_is_no_gguf_fails_with_an_error(load, tiny, tmp_path, case):
    path = with_entries(tiny("llama"), tmp_path / "model.gguf", [NOT_A_GGUF[case], GOOD[TYPE_V]])
    with pytest.raises(NativeError, match="cannot be loaded"):
        load(path)


def test_a_file_cut_off_anywhere_fails_with_an_error(load, file_with, tmp_path):
    path = file_with({})
    data, header = path.read_bytes(), read_header(path)
    ours = [(start, end) for key, start, end in header.keys if key.startswith("kvtuner.")]
    cuts = [(start + end) // 2 for start, end in ours] + [end for _, end in ours] + [*range(ours[0][0], ours[-1][1], 7)]
    cut = tmp_path / "cut.gguf"
    for n in [0, 3, 20, *cuts, header.data_offset, len(data) - 1]:
        cut.write_bytes(data[:n])
        with pytest.raises(NativeError, match="cannot be loaded"):
            load(cut)


def test_a_count_of_keys_that_overflows_fails_with_an_error(load, file_with, tmp_path):
    data = file_with({}).read_bytes()
    for n in (1 << 31, 1 << 62, (1 << 64) - 1):
        (tmp_path / "counts.gguf").write_bytes(data[:16] + struct.pack("<Q", n) + data[24:])
        with pytest.raises(NativeError, match="cannot be loaded"):
            load(tmp_path / "counts.gguf")


@pytest.mark.parametrize("key", ["llama.attention.head_count", "llama.attention.key_length", "llama.embedding_length"])
def test_a_plan_in_a_file_whose_heads_have_no_size_does_no_harm(load, file_with, tmp_path, key):
    path = tmp_path / "nameless.gguf"
    path.write_bytes(file_with({}).read_bytes().replace(text(key), text(key[:-1] + "~")))
    try:
        assert allocated(load(path)) == [Q8_0] * N_LAYER
    except NativeError as e:
        assert "cannot be loaded" in str(e)
