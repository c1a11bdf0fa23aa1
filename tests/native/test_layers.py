"""What a context allocates is what the plan says, layer by layer; every exception is the rules', and has a note."""

import pytest
from gguf import GGUFValueType
from models import _base_keys, _Writer
from running import feed, metadata, mixture, prompt, uniform

from kvtuner_gguf import native
from kvtuner_gguf.codecs import CODECS
from kvtuner_gguf.errors import CodecError, NativeError
from kvtuner_gguf.pair import Pair

pytestmark = pytest.mark.native

NONE = Pair("", "")
# arch -> plan, and the values of K and of V that a cached token has in each layer
PLANS = {
    "llama": (mixture(4), dict.fromkeys(range(4), (128, 128))),
    "gemma3": (mixture(6), dict.fromkeys(range(6), (128, 128))),
    "hybrid": ([NONE, NONE, Pair.parse("q8_0/q4_0"), NONE, Pair.parse("f16/q5_1"), NONE], {2: (64, 64), 4: (64, 64)}),
    "gemma4": ([*mixture(3), NONE, NONE, NONE], dict.fromkeys(range(3), (128, 128))),
    "mla": ([Pair.parse(name) for name in ("q8_0", "f16", "q4_0")], dict.fromkeys(range(3), (192, 0))),
}
every_arch = pytest.mark.parametrize("arch", PLANS)
FLASH_ATTN_CURE = "turn it on (-fa on, flash_attn=True)"


def overrides_of(pairs):
    sides = [(f"kvtuner.type_{side}.{il}", getattr(p, f"type_{side}")) for il, p in enumerate(pairs) for side in "kv"]
    return {key: name for key, name in sides if name}


def planned_session(load, tiny, arch, source):
    """A session of the arch's plan, which comes from there."""
    pairs, _ = PLANS[arch]
    if source == "file":
        return load(tiny(arch, extra=metadata(pairs)))
    if source == "override":
        return load(tiny(arch), overrides=overrides_of(pairs))
    session = load(tiny(arch))
    session.set_plan(pairs)
    return session


def types(ctx):
    """(K type, V type) of the layers that have KV of their own."""
    return [(layer.type_k, layer.type_v) for layer in ctx.layers()]


@every_arch
@pytest.mark.parametrize("source", ["file", "override", "api"])
def test_allocated_is_what_is_planned(load, tiny, arch, source):
    session = planned_session(load, tiny, arch, source)
    pairs, n_values = PLANS[arch]
    assert native.plan_source(session.model) == source
    assert native.plan_layers(session.model) == [(p.type_k, p.type_v) for p in pairs]
    assert native.plan_notes(session.model) == []
    with session.context(512) as ctx:
        want = {il: (pairs[il].type_k, pairs[il].type_v if n_v else "") for il, (_, n_v) in n_values.items()}
        assert {layer.il: (layer.type_k, layer.type_v) for layer in ctx.layers()} == want
        assert ctx.notes() == []


@every_arch
@pytest.mark.parametrize("n_seq_max", [1, 3])
def test_buffers_hold_the_planned_rows_and_nothing_else(load, tiny, arch, n_seq_max):
    session = planned_session(load, tiny, arch, "file")
    pairs, n_values = PLANS[arch]
    with session.context(768, n_seq_max=n_seq_max) as ctx:
        for layer in ctx.layers():
            n_k, n_v = n_values[layer.il]
            assert layer.n_cells == 768
            assert layer.bytes_k == 768 * CODECS[pairs[layer.il].type_k].row_bytes(n_k)
            assert layer.bytes_v == (768 * CODECS[pairs[layer.il].type_v].row_bytes(n_v) if n_v else 0)
        # cells come by 256, so each tensor fills whole units of the buffer's alignment: no padding
        allocated = native.ctx_buffer_bytes(ctx.ctx)
        assert allocated == sum(layer.bytes_k + layer.bytes_v for layer in ctx.layers())
    if n_seq_max == 1:
        assert allocated == session.geometry(768).bytes(tuple(pairs))


def test_a_session_without_tensors_tells_the_same_layers(load, tiny):
    path = tiny("gemma3", extra=metadata(mixture(6)))
    with load(path).context(1024) as real, load(path, no_alloc=True).context(1024) as dry:
        assert dry.layers() == real.layers()
        assert native.ctx_buffer_bytes(dry.ctx) == 0


@pytest.mark.parametrize("swa_full", [False, True])
def test_sliding_window_layers_cost_their_window(load, tiny, swa_full):
    session = load(tiny("gemma3", extra=metadata(mixture(6))))
    with session.context(1024, n_ubatch=128, swa_full=swa_full) as ctx:
        n_window = 1024 if swa_full else 256  # 64 + a batch of 128, rounded up to 256
        assert [layer.n_cells for layer in ctx.layers()] == [n_window, n_window, 1024, n_window, n_window, 1024]
        assert [(p.type_k, p.type_v) for p in mixture(6)] == types(ctx)


@pytest.mark.parametrize("type_k", CODECS)
def test_every_pair_can_be_allocated(load, tiny, type_k):
    session = load(tiny("llama", n_layer=len(CODECS)))
    session.set_plan([Pair(type_k, type_v) for type_v in CODECS])
    with session.context(256) as ctx:
        assert types(ctx) == [(type_k, type_v) for type_v in CODECS]
        told = [note for note in ctx.notes() if f"K {type_k} without a basis" in note]
        assert ctx.notes() == told and len(told) == CODECS[type_k].groups


@pytest.mark.parametrize(("head_dim", "rot_k", "rot_v"), [(64, 64, 64), (96, 0, 0), (128, 128, 64), (192, 64, 64)])
def test_quantized_sides_are_rotated_where_the_head_allows(load, tiny, head_dim, rot_k, rot_v):
    session = load(tiny("llama", head_dim=head_dim))
    session.set_plan([Pair.parse(p) for p in ("q8_0/f16", "f16/q4_0", "q5_1/iq4_nl", "bf16/f32")])
    with session.context(256) as ctx:
        assert [(layer.rot_k, layer.rot_v) for layer in ctx.layers()] == [
            (rot_k, 0),
            (0, rot_v),
            (rot_k, rot_v),
            (0, 0),
        ]


def test_a_layer_without_heads_has_no_cache(load, tmp_path):
    session = load(tiny_deci(tmp_path / "deci.gguf"))
    for pairs in (None, uniform("q8_0/q4_0", 3)):  # a plan need not know
        session.set_plan(pairs)
        with session.context(256) as ctx:
            assert [layer.il for layer in ctx.layers()] == [0, 2]
            assert types(ctx) == ([("q8_0", "q4_0")] * 2 if pairs else [("f16", "f16")] * 2)
            assert ctx.notes() == []
            assert feed(ctx, prompt(8)).std() > 0.1


def tiny_deci(path):
    """Attention in layers 0 2; layer 1 has no heads, for which llama.cpp makes a cache of no values."""
    n_embd, n_ff, head_dim, n_head, n_head_kv = 128, 128, 64, [4, 0, 4], [2, 0, 2]
    keys = _base_keys(n_layer=3, n_embd=n_embd, n_ff=n_ff, n_head=4) | {
        "feed_forward_length": [n_ff] * 3,
        "attention.head_count": n_head,
        "attention.head_count_kv": n_head_kv,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "rope.dimension_count": head_dim,
    }
    w = _Writer(path, "deci", 0, keys)
    w.ends(n_embd)
    for il in range(3):
        if n_head[il]:
            w.attention(f"blk.{il}.", n_embd, n_head[il] * head_dim, n_head_kv[il] * head_dim)
        w.ffn(f"blk.{il}.", n_embd, n_ff)
    return w.save([])


# ---- precedence


@pytest.mark.parametrize("side", ["k", "v"])
@pytest.mark.parametrize("name", ["q5_1", "f32"])
def test_an_explicit_type_makes_its_side_uniform_and_leaves_the_other_planned(load, tiny, side, name):
    session = load(tiny("llama", extra=metadata(mixture(4))))
    with session.context(256, **{f"type_{side}": name}) as ctx:
        for layer, pair in zip(ctx.layers(), mixture(4)):
            assert layer.type_k == (name if side == "k" else pair.type_k)
            assert layer.type_v == (name if side == "v" else pair.type_v)


def test_explicit_types_on_both_sides_leave_nothing_to_the_plan(load, tiny):
    for arch in ("llama", "mla"):  # K and V of MLA are one tensor: both sides or none
        session = load(tiny(arch, extra=metadata(PLANS[arch][0])))
        with session.context(256, type_k="q4_1", type_v="q4_1") as ctx:
            assert types(ctx) == [("q4_1", "" if arch == "mla" else "q4_1")] * session.n_layer


def test_overrides_replace_single_types_of_the_file(load, tiny):
    path = tiny("llama", extra=metadata(uniform("q4_0", 4)))
    session = load(path, overrides={"kvtuner.type_k.1": "q8_0", "kvtuner.type_v.3": "f16"})
    assert native.plan_source(session.model) == "override"
    with session.context(256) as ctx:
        assert types(ctx) == [("q4_0", "q4_0"), ("q8_0", "q4_0"), ("q4_0", "q4_0"), ("q4_0", "f16")]


def test_one_override_alone_leaves_the_rest_at_f16(load, tiny):
    with load(tiny("llama"), overrides={"kvtuner.type_v.2": "q4_0"}).context(256) as ctx:
        assert types(ctx) == [("f16", "f16"), ("f16", "f16"), ("f16", "q4_0"), ("f16", "f16")]


@pytest.mark.parametrize(
    ("in_file", "override", "in_force"),
    [(None, False, False), (False, None, False), (False, True, True), (True, False, False), (True, None, True)],
)
def test_enabled_switches_the_plan(load, tiny, in_file, override, in_force):
    flag = [] if in_file is None else [("kvtuner.enabled", GGUFValueType.BOOL, in_file)]
    overrides = {"kvtuner.type_k.0": "q5_0"} | ({} if override is None else {"kvtuner.enabled": override})
    session = load(tiny("llama", extra=metadata(uniform("q8_0", 4)) + flag), overrides=overrides)
    assert native.plan_notes(session.model) == []
    assert (native.plan_source(session.model), native.plan_layers(session.model) is not None) == (
        ("override", True) if in_force else ("none", False)
    )
    with session.context(256) as ctx:
        assert types(ctx)[:2] == ([("q5_0", "q8_0"), ("q8_0", "q8_0")] if in_force else [("f16", "f16")] * 2)


def test_a_set_plan_replaces_the_one_in_the_file(load, tiny):
    session = load(tiny("llama", extra=metadata(uniform("q4_0", 4))), overrides={"kvtuner.type_k.0": "q8_0"})
    session.set_plan(uniform("q5_1/q5_0", 4))
    assert native.plan_source(session.model) == "api"
    with session.context(256) as ctx:
        assert types(ctx) == [("q5_1", "q5_0")] * 4
    session.set_plan(None)
    assert native.plan_source(session.model) == "none"
    with session.context(256) as ctx:
        assert types(ctx) == [("f16", "f16")] * 4


def test_contexts_keep_the_plan_they_were_made_under(load, tiny):
    session = load(tiny("llama"))
    session.set_plan(uniform("q8_0", 4))
    with session.context(256) as old:
        session.set_plan(uniform("q4_0", 4))
        with session.context(256) as new:
            session.set_plan(None)
            assert types(old) == [("q8_0", "q8_0")] * 4
            assert types(new) == [("q4_0", "q4_0")] * 4
            feed(old, prompt(8))
            feed(new, prompt(8))


def test_a_plan_that_is_refused_leaves_the_old_one(load, tiny):
    session = load(tiny("llama"))
    session.set_plan(uniform("q8_0", 4))
    with pytest.raises(CodecError, match="layer 2: 'q4_9' is not the name of a cache type"):
        native.set_plan(session.model, ["q4_0", "q4_0", "q4_9", "q4_0"], ["f16"] * 4)
    with pytest.raises(NativeError, match="plan has 3 layers, the model has 4"):
        session.set_plan(uniform("q4_0", 3))
    assert native.plan_layers(session.model) == [("q8_0", "q8_0")] * 4


# ---- fallbacks


def test_without_flash_attention_a_quantized_v_is_f16(load, tiny):
    session = load(tiny("llama"))
    session.set_plan([Pair.parse(p) for p in ("q8_0/q4_0", "q4_0/bf16", "f16/f32", "q5_1/q4_0")])
    with session.context(256, flash_attn=False) as ctx:
        assert types(ctx) == [("q8_0", "f16"), ("q4_0", "bf16"), ("f16", "f32"), ("q5_1", "f16")]
        (note,) = ctx.notes()
        assert note.startswith("layers 0,3: V q4_0 needs flash attention") and FLASH_ATTN_CURE in note
        assert feed(ctx, prompt(8)).std() > 0.1


@pytest.mark.parametrize("arch", ["llama", "gemma3", "gemma4", "hybrid", "mla"])
def test_flash_attention_left_to_llama_cpp_is_on_for_a_plan(load, tiny, arch):
    session = load(tiny(arch, extra=metadata(PLANS[arch][0])))
    from llama_cpp import llama_cpp

    params = llama_cpp.llama_context_default_params()
    assert params.flash_attn_type == llama_cpp.LLAMA_FLASH_ATTN_TYPE_AUTO
    params.n_ctx, params.swa_full = 256, False
    ctx = llama_cpp.llama_init_from_model(session.model, params)
    try:
        with session.context(256) as want:
            assert native.ctx_layers(session.model, ctx) == want.layers()
        assert native.ctx_notes(ctx) == []
    finally:
        llama_cpp.llama_free(ctx)


def test_a_head_that_blocks_do_not_divide_is_f16(load, tiny):
    session = load(tiny("llama", head_dim=80))
    session.set_plan([Pair.parse(p) for p in ("q8_0/q8_0", "q8_0/f16", "bf16/f32", "f16/q4_0")])
    with session.context(256) as ctx:
        assert types(ctx) == [("f16", "f16"), ("f16", "f16"), ("bf16", "f32"), ("f16", "f16")]
        why = "head_dim 80 is not a multiple of its block of 32: f16 there"
        assert set(ctx.notes()) == {
            f"layers 0-1: K q8_0: {why}",
            f"layers 0: V q8_0: {why}",
            f"layers 3: V q4_0: {why}",
        }
        assert feed(ctx, prompt(8)).std() > 0.1


def test_mla_obeys_the_k_type_alone(load, tiny):
    session = load(tiny("mla"))
    session.set_plan([Pair.parse(p) for p in ("q8_0/f16", "f16/q4_0", "q4_0/q8_0")])
    with session.context(256) as ctx:
        assert types(ctx) == [("q8_0", ""), ("f16", ""), ("q4_0", "")]


def test_mla_without_flash_attention_is_f16(load, tiny):
    session = load(tiny("mla"))
    session.set_plan([Pair.parse(p) for p in ("q8_0", "bf16", "q8_0")])
    with session.context(256, flash_attn=False) as ctx:
        assert types(ctx) == [("f16", ""), ("bf16", ""), ("f16", "")]
        (note,) = ctx.notes()
        assert note.startswith("layers 0,2: K q8_0 needs flash attention") and FLASH_ATTN_CURE in note


def test_t5_keeps_v_at_f16(load, tiny):
    session = load(tiny("t5"))
    session.set_plan(uniform("q8_0/q4_0", 2))
    with session.context(256) as ctx:
        assert types(ctx) == [("q8_0", "f16")] * 2
        (note,) = ctx.notes()
        assert note.startswith("layers 0-1: V q4_0: this architecture has a bias on KQ")
        assert encoder_decoder_logits(ctx).std() > 0.1


def encoder_decoder_logits(ctx):
    """Logits after the decoder's first token."""
    from llama_cpp import llama_cpp

    tokens = (llama_cpp.llama_token * 8)(*prompt(8))
    assert llama_cpp.llama_encode(ctx.ctx, llama_cpp.llama_batch_get_one(tokens, 8)) == 0
    return feed(ctx, [0])
