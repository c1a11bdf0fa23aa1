"""Vectors and bases of K from a file: obeyed, switched off by overrides, and ignored with one note where they are
faulty."""

import struct
from functools import partial

import numpy as np
import pytest
from gguf_bytes import F32, I8, U32, array, entry, strings, text, u32, with_entries
from running import N_TOKENS, feed, mixture, prompt, uniform, vectors
from test_cond import all_vectors, conditioned, in_force

from kvtuner_gguf import native
from kvtuner_gguf.errors import NativeError, PlanError
from kvtuner_gguf.gguf_file import read_plan, write_plan
from kvtuner_gguf.kvectors import KVectors
from kvtuner_gguf.pair import Pair
from kvtuner_gguf.plan import Plan

pytestmark = pytest.mark.native


def planned(tiny, tmp_path, pairs, k_vectors, arch="llama", name="planned.gguf"):
    return write_plan(tiny(arch), Plan(tuple(pairs), k_vectors=tuple(k_vectors)), tmp_path / name)


def test_the_file_carries_the_vectors(load, tiny, tmp_path):
    pairs = [*mixture(4)[:3], Pair("k2_64", "q4_0")]
    k_vectors = [vectors(0), KVectors(), vectors(2, mean=False), vectors(3, scale=False, basis=True)]
    path = planned(tiny, tmp_path, pairs, k_vectors)
    assert read_plan(path).k_vectors == tuple(k_vectors)
    session = load(path)
    assert native.plan_notes(session.model) == []
    with session.context(256) as ctx:
        assert conditioned(ctx) == [(True, True), (False, False), (False, True), (True, False)]
        assert [layer.k_basis for layer in ctx.layers()] == [False, False, False, True]
        have = feed(ctx, prompt(N_TOKENS))
    other = load(tiny("llama"))
    other.set_plan(pairs, k_vectors)
    with other.context(256) as ctx:
        assert np.array_equal(have, feed(ctx, prompt(N_TOKENS)))


@pytest.mark.parametrize(
    ("overrides", "want"),
    [
        ({"kvtuner.enabled": False}, (False, False)),
        ({"kvtuner.k_mean": False}, (False, True)),
        ({"kvtuner.k_scale": False}, (True, False)),
        ({"kvtuner.k_mean": False, "kvtuner.k_scale": False}, (False, False)),
        ({"kvtuner.k_mean": True}, (True, True)),
        ({"kvtuner.type_k.0": "q5_1"}, (True, True)),
        ({"kvtuner.k_basis": False}, (True, True)),
    ],
)
def test_overrides_switch_it_off(load, tiny, tmp_path, overrides, want):
    session = load(planned(tiny, tmp_path, uniform("q8_0", 4), [vectors(il) for il in range(4)]), overrides=overrides)
    assert native.plan_notes(session.model) == []
    with session.context(256) as ctx:
        assert conditioned(ctx) == [want] * 4


def test_an_override_that_is_no_bool_is_ignored(load, tiny, tmp_path):
    session = load(
        planned(tiny, tmp_path, uniform("q8_0", 4), [vectors(il) for il in range(4)]),
        overrides={"kvtuner.k_mean": "off"},
    )
    assert native.plan_notes(session.model) == ["override kvtuner.k_mean is not a bool: it is ignored"]
    with session.context(256) as ctx:
        assert conditioned(ctx) == [(True, True)] * 4


def test_llama_takes_them_from_a_sidecar(tiny, tmp_path):
    from kvtuner_gguf.llama import Llama

    plan = Plan(tuple(uniform("q8_0", 4)), k_vectors=tuple(vectors(il) for il in range(4)))
    plan.save(tmp_path / "plan.json")
    llm = Llama(str(tiny("llama")), plan=tmp_path / "plan.json", n_ctx=256, verbose=False)
    assert [(layer.k_mean, layer.k_scale) for layer in llm.layers] == [(True, True)] * 4
    assert llm.plan.pairs == plan.pairs and llm.plan_notes == []
    llm.close()


MEAN, SCALE, BASIS, ROW_SCALE = (f"kvtuner.k_{name}" for name in ("mean", "scale", "basis", "basis_scale"))
N = 4 * 128


def floats(key, values):
    return array(key, F32, len(values), struct.pack(f"<{len(values)}f", *values))


def counts(key, values, kind=U32):
    return array(f"{key}.n_values", kind, len(values), struct.pack(f"<{len(values)}I", *values))


def small_ints(key, values):
    return array(key, I8, len(values), bytes(v & 0xFF for v in values))


ROWS = [*(127 * np.eye(64, dtype=int)).reshape(-1).tolist()] * 8  # two heads of each of four layers


def good():
    return {
        **{key: floats(key, [1.0] * N) for key in (MEAN, SCALE, ROW_SCALE)},
        **{f"{key}.n_values": counts(key, [128] * 4) for key in (MEAN, SCALE, ROW_SCALE)},
        BASIS: small_ints(BASIS, ROWS),
        f"{BASIS}.n_values": counts(BASIS, [2 * 64 * 64] * 4),
    }


def spoiled(key, value, at=130):
    return {key: floats(key, [value if i == at else 1.0 for i in range(N)])}


# what is wrong -> (entries in place of the good ones, None = left out; what the note says)
FAULTS = {
    "mean text": ({MEAN: entry(MEAN, 8, text(b"0"))}, "kvtuner.k_mean is not an array of f32"),
    "mean one number": ({MEAN: entry(MEAN, F32, struct.pack("<f", 1))}, "kvtuner.k_mean is not an array of f32"),
    "mean f64": ({MEAN: array(MEAN, 12, N, bytes(8 * N))}, "kvtuner.k_mean is not an array of f32"),
    "scale u32": ({SCALE: array(SCALE, U32, N, bytes(4 * N))}, "kvtuner.k_scale is not an array of f32"),
    "scale strings": ({SCALE: array(SCALE, 8, 1, text(b"1"))}, "kvtuner.k_scale is not an array of f32"),
    "mean missing": ({MEAN: None}, "kvtuner.k_mean is missing"),
    "scale's counts missing": ({f"{SCALE}.n_values": None}, "kvtuner.k_scale.n_values is missing"),
    "counts i32": ({f"{MEAN}.n_values": counts(MEAN, [128] * 4, 5)}, "kvtuner.k_mean.n_values is not an array of u32"),
    "counts of 3 layers": (
        {f"{MEAN}.n_values": counts(MEAN, [128] * 3)},
        "kvtuner.k_mean.n_values has 3 entries, the model has 4 layers",
    ),
    "no counts": (
        {f"{MEAN}.n_values": counts(MEAN, [])},
        "kvtuner.k_mean.n_values has 0 entries, the model has 4 layers",
    ),
    "mean short": (
        {MEAN: floats(MEAN, [0.0] * (N - 1))},
        "kvtuner.k_mean has 511 values, kvtuner.k_mean.n_values adds up to 512",
    ),
    "mean empty": ({MEAN: floats(MEAN, [])}, "kvtuner.k_mean has 0 values"),
    "counts huge": ({f"{SCALE}.n_values": counts(SCALE, [2**32 - 1] * 4)}, "adds up to 17179869180"),
    "a head too few": (
        {f"{MEAN}.n_values": counts(MEAN, [64, 192, 128, 128])},
        "layer 0: mean of K has 64 values, the layer's K has 128",
    ),
    "nan": (spoiled(MEAN, np.nan), "layer 1: mean of K in channel 2 is nan, need a finite number"),
    "inf": (spoiled(MEAN, np.inf), "layer 1: mean of K in channel 2 is inf, need a finite number"),
    "scale nan": (spoiled(SCALE, np.nan), "layer 1: scale of K in channel 2 is nan, need a finite number"),
    "scale 0": (spoiled(SCALE, 0.0), "layer 1: scale of K in channel 2 is 0, need 0.0001 to 10000"),
    "scale negative": (spoiled(SCALE, -1.0, 511), "layer 3: scale of K in channel 127 is -1, need 0.0001 to 10000"),
    "one bit of an exponent": (
        spoiled(MEAN, 2.8e38),
        "layer 1: mean of K in channel 2 is 2.8e+38, need -65504 to 65504",
    ),
    "mean beyond f16": (spoiled(MEAN, -65536.0), "layer 1: mean of K in channel 2 is -65536, need -65504 to 65504"),
    "scale of a wide head": (
        {SCALE: floats(SCALE, [1e-4, 1e4] * (N // 2))},
        "layer 0: scale of K in head 0 is 0.0001 to 10000, need a factor of 1e6 at most",
    ),
    "scale denormal": (spoiled(SCALE, 1e-40), "layer 1: scale of K in channel 2 is"),
    "basis of floats": ({BASIS: floats(BASIS, [1.0] * len(ROWS))}, "kvtuner.k_basis is not an array of i8"),
    "basis without its scales": (
        {ROW_SCALE: None, f"{ROW_SCALE}.n_values": None},
        "layer 0: basis of K has 8192 values and 0 scales, need 8192 and 128",
    ),
    "basis of another head size": (
        {f"{BASIS}.n_values": counts(BASIS, [4096, 12288, 8192, 8192])},
        "layer 0: basis of K has 4096 values and 128 scales, need 8192 and 128",
    ),
    "a row of zeros": (
        {BASIS: small_ints(BASIS, [0 if 64 <= i < 128 else v for i, v in enumerate(ROWS)])},
        "layer 0: basis of K in head 0 is singular",
    ),
    "two rows alike": (
        {BASIS: small_ints(BASIS, [*ROWS[:-64], *ROWS[-128:-64]])},
        "layer 3: basis of K in head 1 is singular",
    ),
    "row scale 0": (
        {ROW_SCALE: floats(ROW_SCALE, [0.0 if i == 130 else 1.0 for i in range(N)])},
        "layer 1: scale of row 2 of K's basis is 0, need 1e-06 to 1e+06",
    ),
}


TYPES = {"k": b"k3_64", "v": b"q8_0"}


@pytest.fixture
def file_with(tiny, tmp_path):
    """file_with(changes) -> a planned model with the good entries, some replaced or left out."""

    def write(changes):
        types = [
            u32("kvtuner.schema_version", 1),
            *(strings(f"kvtuner.type_{side}", [t] * 4) for side, t in TYPES.items()),
        ]
        entries = [e for e in (good() | changes).values() if e is not None]
        return with_entries(tiny("llama"), tmp_path / "model.gguf", types + entries)

    return write


def test_the_good_entries_are_vectors(load, file_with):
    session = load(file_with({}))
    assert native.plan_notes(session.model) == []
    with session.context(256) as ctx:
        assert in_force(ctx) == [(True, False, True, 0)] * 4


@pytest.mark.parametrize("case", FAULTS)
def test_faulty_vectors_are_ignored_with_one_note(load, file_with, case):
    changes, want = FAULTS[case]
    path = file_with(changes)
    session = load(path)
    (note,) = native.plan_notes(session.model)
    assert want in note and note.endswith(": K is not conditioned. Calibrate again") and note.isprintable()
    with session.context(256) as ctx:
        assert in_force(ctx) == [(False, False, False, 64)] * 4
        assert [(layer.type_k, layer.type_v) for layer in ctx.layers()] == [("k3_64", "q8_0")] * 4
        assert np.isfinite(feed(ctx, prompt(8))).all()
    if case not in (
        "counts i32",
        "mean f64",
        "a head too few",
        "scale of a wide head",
        "basis of floats",
        "a row of zeros",
        "two rows alike",
    ):  # to Python numbers are numbers, and it does not know the heads, nor inverts a matrix
        with pytest.raises(PlanError):
            read_plan(path)


def test_a_layer_without_k_takes_none(load, tiny, tmp_path):
    session = load(planned(tiny, tmp_path, mixture(6), [vectors(il, 1) for il in range(6)], arch="hybrid"))
    (note,) = native.plan_notes(session.model)
    assert note.startswith("layer 0: mean of K has 64 values, the layer's K has 0")
    with session.context(256) as ctx:
        assert conditioned(ctx) == [(False, False)] * 2


# ---- kvt.h


def test_the_setter_refuses_what_does_not_fit(load, tiny):
    session = load(tiny("llama"))
    lib = native.library()
    with pytest.raises(NativeError, match="no plan is in force. Set the types first"):
        native.set_k_vectors(session.model, 0, [0.0] * 128, ())
    session.set_plan(uniform("q8_0", 4))
    for il in (-1, 4, 2**31 - 1):
        with pytest.raises(NativeError, match=f"layer {il} is not one of it"):
            native.set_k_vectors(session.model, il, [0.0] * 128, ())
    wrong = partial(native.set_k_vectors, session.model, 2)
    with pytest.raises(NativeError, match="layer 2: mean of K has 64 values, the layer's K has 128"):
        wrong([0.0] * 64, ())
    with pytest.raises(NativeError, match="layer 2: scale of K in channel 5 is 0, need"):
        wrong((), [1.0] * 5 + [0.0] + [1.0] * 122)
    with pytest.raises(NativeError, match="128 means of K, 64 scales"):
        wrong([0.0] * 128, [1.0] * 64)
    assert lib.kvt_model_set_k_vectors(None, 0, None, None, 0) == -1
    assert lib.kvt_ctx_k_cond(None, 0) == -1 and "ctx is null" in native.last_error()
    with session.context(256) as ctx:
        assert conditioned(ctx) == [(False, False)] * 4
        assert lib.kvt_ctx_k_cond(ctx.ctx, 7) == -3


def test_contexts_keep_the_vectors_they_were_made_under(load, tiny):
    session = load(tiny("llama"))
    pairs, k_vectors = uniform("q8_0", 4), all_vectors(session, (2, 64))
    session.set_plan(pairs, k_vectors)
    with session.context(256) as old:
        session.set_plan(pairs)
        with session.context(256) as new:
            session.set_plan(None)
            assert conditioned(old) == [(True, True)] * 4 and conditioned(new) == [(False, False)] * 4
            assert not np.array_equal(feed(old, prompt(8)), feed(new, prompt(8)))


def test_clearing_the_data_keeps_the_vectors(load, tiny):
    from llama_cpp import llama_cpp

    session = load(tiny("llama"))
    session.set_plan(uniform("q8_0", 4), all_vectors(session, (2, 64)))
    with session.context(256) as ctx:
        want = feed(ctx, prompt(32))
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(ctx.ctx), True)
        assert np.array_equal(feed(ctx, prompt(32)), want)


@pytest.mark.parametrize(
    ("arch", "arguments", "want"),
    [
        ("llama", {}, (64, False)),
        ("llama", {"rope_dim": 32}, (32, False)),
        ("qwen2", {}, (64, True)),
        ("gemma3", {}, (64, True)),
        ("refact", {}, (0, False)),
    ],
)
def test_the_pairs_of_rope_are_told(load, tiny, arch, arguments, want):
    session = load(tiny(arch, **arguments))
    have = native.rope(session.model, 0)
    assert have == want or have[0] == want[0] == 0
    with pytest.raises(NativeError, match="layer 99 is not one of the model"):
        native.rope(session.model, 99)
