"""kvt.h, called as no one should: null pointers, layers that do not exist, buffers too small. An error code and its
text, no crash."""

import ctypes
import hashlib
import subprocess
import sys
from pathlib import Path

import pytest
from running import uniform

from kvtuner_gguf import native
from kvtuner_gguf.errors import CodecError, NativeError
from kvtuner_gguf.reading import sha256_of

pytestmark = pytest.mark.native

ROOT = Path(__file__).resolve().parents[2]
E_ARG, E_TYPE, E_NONE = -1, -2, -3
NULL = None
F16 = (ctypes.c_char_p * 4)(*[b"f16"] * 4)


@pytest.fixture
def session(load, tiny):
    """A model with a note on its plan."""
    return load(tiny("llama"), overrides={"kvtuner.type_k.0": "q9", "kvtuner.type_k.1": "q8_0"})


def fails(code, have, text):
    """The call gave this code, and an error that says this."""
    assert have == code
    assert text in native.last_error()


def test_the_build_says_which_it_is():
    build_id = native.library().kvt_build_id().decode()
    assert build_id and build_id.isprintable()


def test_the_build_is_of_these_sources():
    """Another kernel is another build: a calibration must not go on with what the one before measured."""
    series = subprocess.run(
        [sys.executable, ROOT / "patches/series", "id"], capture_output=True, text=True, check=True
    ).stdout.strip()
    sources = [p for p in (ROOT / "native").rglob("*") if p.suffix in (".h", ".cpp", ".cuh", ".cu", ".cmake")]
    hashes = [sha256_of(path) for path in sorted(sources, key=str)]
    assert native.build_id() == hashlib.sha256("".join([series, *hashes]).encode()).hexdigest()[:12]


def test_a_library_of_another_version_is_named(monkeypatch):
    monkeypatch.setitem(native._SIGNATURES, "kvt_no_such_function", (None, []))
    with pytest.raises(NativeError, match="has no kvt_no_such_function.*Install kvtuner-gguf again"):
        native.library.__wrapped__()


def test_codecs_refuse_what_is_missing():
    lib, x, row = native.library(), (ctypes.c_float * 32)(), (ctypes.c_uint8 * 34)()
    fails(E_TYPE, lib.kvt_row_bytes(NULL, 32), "'(null)' is not the name of a cache type")
    fails(E_TYPE, lib.kvt_row_bytes(b"q9", 32), "'q9' is not the name of a cache type")
    fails(E_ARG, lib.kvt_row_bytes(b"q8_0", 31), "q8_0: a row of 31 values")
    for n_values in (0, -32, 2**40, 2**62, 2**63 - 1):
        fails(E_ARG, lib.kvt_row_bytes(b"f32", n_values), f"f32: a row of {n_values} values")
    for call, source, target in ((lib.kvt_encode, x, row), (lib.kvt_decode, row, x)):
        fails(E_TYPE, call(NULL, source, 1, 32, target), "'(null)'")
        fails(E_ARG, call(b"q8_0", NULL, 1, 32, target), "must not be null")
        fails(E_ARG, call(b"q8_0", source, 1, 32, NULL), "must not be null")
        fails(E_ARG, call(b"q8_0", source, -1, 32, target), "n_rows not negative")
        fails(E_ARG, call(b"q8_0", source, 1, 33, target), "q8_0: a row of 33 values")
        assert call(b"q8_0", source, 0, 32, target) == 0
    assert lib.kvt_type_name(-1) is None
    assert lib.kvt_type_name(1000) is None


def test_a_model_that_is_missing_is_an_error():
    lib = native.library()
    fails(E_ARG, lib.kvt_model_n_layer(NULL), "model is null")
    fails(E_ARG, lib.kvt_model_set_plan(NULL, F16, F16, 4), "must not be null")
    fails(E_ARG, lib.kvt_model_clear_plan(NULL), "model is null")
    fails(E_ARG, lib.kvt_model_plan_layer(NULL, 0, NULL, NULL), "model is null")
    fails(E_ARG, lib.kvt_model_set_plan_weights(NULL, b""), "must not be null")
    fails(E_ARG, lib.kvt_model_fingerprint(NULL, NULL), "must not be null")
    assert lib.kvt_model_weights_hash(NULL) == b""
    assert lib.kvt_model_plan_source(NULL) == b"none"
    assert lib.kvt_model_plan_notes(NULL, NULL, 0) == 0


def test_a_plan_that_is_not_whole_is_an_error(session):
    lib = native.library()
    fails(E_ARG, lib.kvt_model_set_plan(session.model, NULL, F16, 4), "must not be null")
    fails(E_ARG, lib.kvt_model_set_plan(session.model, F16, NULL, 4), "must not be null")
    for n_layer in (-1, 0, 3, 5, 2**31 - 1):
        fails(
            E_ARG,
            lib.kvt_model_set_plan(session.model, F16, F16, n_layer),
            f"plan has {n_layer} layers, the model has 4",
        )
    holes = (ctypes.c_char_p * 4)(b"f16", None, b"f16", b"f16")
    fails(E_ARG, lib.kvt_model_set_plan(session.model, F16, holes, 4), "layer 1: the V type is null")
    assert native.plan_source(session.model) == "override"


def test_an_unknown_type_is_named(session):
    for name in ("q4_9", "Q8_0", "q6_K", "x" * 10_000, "\x1b[2J"):
        shown = name.replace("\x1b", "?")[:40]
        with pytest.raises(CodecError) as error:
            native.set_plan(session.model, ["f16"] * 4, ["f16", "f16", name, "f16"])
        assert f"layer 2: '{shown}" in str(error.value) and len(str(error.value)) < 120


def test_a_layer_that_does_not_exist_is_an_error(session):
    lib = native.library()
    for il in (-1, 4, 2**31 - 1, -(2**31)):
        fails(E_ARG, lib.kvt_model_plan_layer(session.model, il, NULL, NULL), f"layer {il} is not one of it")
    session.set_plan(None)
    fails(E_NONE, lib.kvt_model_plan_layer(session.model, 0, NULL, NULL), "no plan is in force")
    with session.context(256) as ctx:
        for il in (-1, 4, 2**31 - 1, -(2**31)):
            code = lib.kvt_ctx_layer(ctx.ctx, il, native.LayerStruct())
            fails(E_NONE, code, f"layer {il} has no KV of its own in this context")


def test_the_names_of_a_plan_may_be_left_out_and_a_layer_not(session):
    lib = native.library()
    assert lib.kvt_model_plan_layer(session.model, 0, NULL, NULL) == 0
    with session.context(256) as ctx:
        fails(E_ARG, lib.kvt_ctx_layer(ctx.ctx, 0, NULL), "layer must not be null")


def test_a_context_that_is_missing_is_an_error():
    lib = native.library()
    fails(E_ARG, lib.kvt_ctx_layer(NULL, 0, native.LayerStruct()), "must not be null")
    fails(E_ARG, lib.kvt_ctx_holds(NULL, 0, 0), "ctx is null")
    assert lib.kvt_ctx_buffer_bytes(NULL) == 0
    assert lib.kvt_ctx_notes(NULL, NULL, 0) == 0


def test_notes_never_leave_their_buffer(session):
    lib = native.library()
    session_notes = "\n".join(native.plan_notes(session.model)) + "\n"
    assert "q9" in session_notes
    session.set_plan(uniform("q8_0/q4_0", 4))
    with session.context(256, flash_attn=False) as ctx:
        (note,) = native.ctx_notes(ctx.ctx)
        for size in (-(2**31), -1, 0, 1, 10, len(note) + 1, len(note) + 2, 1000):
            buf = ctypes.create_string_buffer(b"#" * 1000, 1001)
            assert lib.kvt_ctx_notes(ctx.ctx, buf, size) == len(note) + 1
            written = (note + "\n").encode()[: max(size - 1, 0)] + b"\0" if size > 0 else b""
            assert buf.raw[:1000] == written.ljust(1000, b"#")
        assert lib.kvt_ctx_notes(ctx.ctx, NULL, 1000) == len(note) + 1


def test_a_tap_that_is_missing_does_nothing():
    lib = native.library()
    assert lib.kvt_tap_new(native.TapCallback(), NULL, 8) is None
    assert "need a callback" in native.last_error()
    callback = native.TapCallback(lambda node, user: None)
    for n_q_max in (0, -1):
        assert lib.kvt_tap_new(callback, NULL, n_q_max) is None
        assert f"n_q_max > 0, have {n_q_max}" in native.last_error()
    lib.kvt_tap_enable(NULL, True)
    assert lib.kvt_tap_error(NULL) == b""
    lib.kvt_tap_free(NULL)


def test_codes_become_errors_by_their_kind(session):
    lib = native.library()
    with pytest.raises(CodecError, match="'q9' is not the name of a cache type"):
        native.check(lib.kvt_encode(b"q9", NULL, 1, 32, NULL))
    with pytest.raises(NativeError, match="plan has 1 layers, the model has 4"):
        native.check(lib.kvt_model_set_plan(session.model, F16, F16, 1))
    assert native.check(7) == 7
