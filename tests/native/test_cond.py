"""K conditioned before it is cached: attention stays what it was, the cache is another, and nothing mistakes one for
the other."""

from dataclasses import replace

import numpy as np
import pytest
from models import OUTLIER_CHANNELS
from running import feed, mixture, prompt, run, uniform, vectors
from test_shift import next_logits
from test_state import assert_refused, every_kind, restore, save, saved

from kvtuner_gguf.codecs import CODECS
from kvtuner_gguf.errors import NativeError
from kvtuner_gguf.kvectors import KVectors
from kvtuner_gguf.pair import Pair

pytestmark = pytest.mark.native

# how a model's K is cached: arch, arguments, heads and head size of its K, which layers have any
MODELS = {
    "llama": ("llama", {}, (2, 64)),
    "heads of 96, never rotated": ("llama", {"head_dim": 96}, (2, 96)),
    "heads of 72": ("llama", {"head_dim": 72}, (2, 72)),
    "heads of 128": ("llama", {"head_dim": 128}, (2, 128)),
    "one KV head": ("llama", {"n_head_kv": 1}, (1, 64)),
    "as many KV heads": ("llama", {"n_head_kv": 4}, (4, 64)),
    "RoPE on half of a head": ("llama", {"rope_dim": 32}, (2, 64)),
    "RoPE of far pairs": ("qwen2", {}, (2, 64)),
    "sliding window": ("gemma3", {}, (2, 64)),
    "shared KV": ("gemma4", {}, (2, 64)),
    "hybrid": ("hybrid", {}, (1, 64)),
    "ALiBi": ("refact", {}, (2, 64)),
}
every_model = pytest.mark.parametrize("model", MODELS)
# Greatest difference of a logit (std 2), conditioned less not: the rounding of another cache. Measured at worst: f32
# .014 (flash attention reads it as f16, without it .006), f16 .018, bf16 .10. Without the scale on Q, or the mean at a
# shift, it is above 1.
MOST = {"f32": 0.04, "f16": 0.05, "bf16": 0.3}


def layers_with_kv(session):
    session.set_plan(None)
    with session.context(256) as ctx:
        return [layer.il for layer in ctx.layers()]


def all_vectors(session, shape, **sides):
    """Vectors for every layer that has K of its own."""
    il = layers_with_kv(session)
    return [vectors(i, *shape, **sides) if i in il else KVectors() for i in range(session.n_layer)]


def conditioned(ctx):
    return [(layer.k_mean, layer.k_scale) for layer in ctx.layers()]


def in_force(ctx):
    """(mean, scale, basis, block of the rotation) of each layer's K."""
    return [(layer.k_mean, layer.k_scale, layer.k_basis, layer.rot_k) for layer in ctx.layers()]


GROUP_TYPES = [name for name, c in CODECS.items() if c.groups]


# ---- the same attention


@every_model
@pytest.mark.parametrize(
    "sides",
    [{"scale": False}, {"mean": False}, {}, {"basis": True}, {"basis": True, "mean": False, "scale": False}],
    ids=["mean", "scale", "both", "all with a basis", "basis alone"],
)
@pytest.mark.parametrize("name", ["f16", "f32"])
def test_a_cache_that_is_not_quantized_gives_the_same_logits(load, tiny, model, sides, name):
    arch, arguments, shape = MODELS[model]
    session = load(tiny(arch, **arguments))
    pairs = uniform(name, session.n_layer)
    k_vectors = all_vectors(session, shape, **sides)
    for flash_attn in (True, False):
        want = run(session, pairs, flash_attn=flash_attn)
        have = run(session, pairs, k_vectors, flash_attn=flash_attn)
        assert not np.array_equal(have, want)
        assert np.abs(have - want).max() < MOST[name]


@every_model
@pytest.mark.parametrize("basis", [False, True])
@pytest.mark.parametrize("n_threads", [1, 3])
def test_a_few_tokens_at_once_give_the_logits_of_many(load, tiny, model, basis, n_threads):
    arch, arguments, shape = MODELS[model]
    session = load(tiny(arch, **arguments), n_threads=n_threads)
    tokens = prompt(40)

    def last_logits(n, name="f32"):
        session.set_plan(uniform(name, session.n_layer), all_vectors(session, shape, basis=basis))
        with session.context(256, flash_attn=False) as ctx:
            return [feed(ctx, tokens[i : i + n], i)[-1] for i in range(0, len(tokens), n)][-1]

    want = last_logits(len(tokens))
    for n in (1, 5, 8):
        assert np.abs(last_logits(n) - want).max() < MOST["f32"]


def test_greedy_tokens_are_the_same(load, tiny):
    session = load(tiny("llama"))

    def greedy(k_vectors, name="f16", **arguments):
        session.set_plan(uniform(name, 4), k_vectors)
        tokens = prompt(8)
        with session.context(512, **arguments) as ctx:
            logits = feed(ctx, tokens)[-1]
            for pos in range(8, 200):
                tokens.append(int(logits.argmax()))
                logits = feed(ctx, tokens[-1:], pos)[-1]
        return tokens

    assert greedy(all_vectors(session, (2, 64))) == greedy(())
    # f16 rounds what is turned, and flash attention reads f32 as f16
    assert greedy(all_vectors(session, (2, 64), basis=True), "f32", flash_attn=False) == greedy(
        (), "f32", flash_attn=False
    )


@pytest.mark.parametrize("basis", [False, True])
@pytest.mark.parametrize("n_seq_max", [1, 3])
def test_sequences_do_not_mix(load, tiny, n_seq_max, basis):
    session = load(tiny("gemma3"))
    k_vectors = all_vectors(session, (2, 64), basis=basis)

    def last(k_vectors):
        session.set_plan(uniform("f16", 6), k_vectors)
        with session.context(256 * n_seq_max, n_seq_max=n_seq_max) as ctx:
            rows = [(token, pos, seq) for seq in range(n_seq_max) for pos, token in enumerate(prompt(32, seed=seq))]
            return ctx.decode(rows, [True] * len(rows)).copy()

    assert np.abs(last(k_vectors) - last(())).max() < MOST["f16"]


@pytest.mark.parametrize("name", ["q8_0", "q5_1", "q4_0"])
def test_the_mean_of_k_takes_its_outliers_off(load, tiny, name):
    session = load(tiny("qwen2", k_outlier=40.0, outlier_layers=range(4)))
    mean = np.zeros((2, 64))
    mean[:, [30, 31, 62, 63]] = 40.0 * np.array([1, -1, 1, -1])
    k_vectors = [KVectors(tuple(mean.reshape(-1).tolist()))] * 4
    pairs = uniform(f"{name}/f16", 4)
    want = run(session, uniform("f16", 4))
    plain, centred = (np.square(run(session, pairs, v) - want).mean() for v in ((), k_vectors))
    assert centred < 0.2 * plain


def test_a_basis_is_in_force_under_types_of_groups_and_where_k_is_not_quantized(load, tiny):
    """It holds the scale and the rotation. Other types keep to these."""
    session = load(tiny("llama", n_layer=6))
    types = ["k3_64", "f16", "q8_0", "k2_64", "q3_64", "k4_64"]
    session.set_plan([Pair(t, "q8_0") for t in types], [vectors(il, basis=True) for il in range(6)])
    with session.context(256) as ctx:
        apart, together = (True, True, False, 64), (True, False, True, 0)
        assert in_force(ctx) == [together, together, apart, together, apart, together]
        assert ctx.notes() == []


@pytest.mark.parametrize("name", GROUP_TYPES)
def test_the_first_group_of_a_block_carries_what_matters(load, tiny, name):
    """Channels of outliers, scaled to the size of the others, come through a type of groups if the basis puts them
    first, and do not if it puts them last."""
    session = load(tiny("qwen2", k_outlier=40.0, outlier_layers=range(4)))
    want = run(session, uniform("f16", 4))
    others = [c for c in range(64) if c not in OUTLIER_CHANNELS]

    def error(order):
        rows = np.tile(127 * np.eye(64, dtype=np.int8)[order], (2, 1, 1))
        row_scale = np.where(np.isin(order, OUTLIER_CHANNELS), 1 / 40, 1) / 127
        basis = KVectors(basis=rows.tobytes(), basis_scale=tuple(np.tile(row_scale, 2).tolist()))
        return np.square(run(session, uniform(f"{name}/f16", 4), [basis] * 4) - want).mean()

    most = {"k5_64": 0.1, "k4_64": 0.2, "k3_64": 0.4, "k2_64": 0.8}[name]  # measured .034, .092, .22, .53
    assert error([*OUTLIER_CHANNELS, *others]) < most * error([*others, *OUTLIER_CHANNELS])


def test_a_basis_for_other_heads_is_refused(load, tiny):
    """Of as many channels: what is there is not read beyond its end."""
    session = load(tiny("llama", head_dim=128))
    with pytest.raises(NativeError, match="layer 1: basis of K has 16384 values and 256 scales, need 32768 and 256"):
        session.set_plan(uniform("k3_64", 4), [KVectors(), vectors(1, 4, 64, basis=True)])


def test_a_type_of_groups_without_a_basis_is_told(load, tiny):
    session = load(tiny("llama"))
    session.set_plan([Pair(t, "q8_0") for t in ("k3_64", "q3_64", "k3_64", "k2_64")], [vectors(0, basis=True)])
    with session.context(256) as ctx:
        why = "without a basis, in which its groups would hold what matters: it loses much. Calibrate again"
        assert sorted(ctx.notes()) == [f"layers 2: K k3_64 {why}", f"layers 3: K k2_64 {why}"]
        assert np.isfinite(feed(ctx, prompt(8))).all()


def test_no_vectors_are_no_plan_of_vectors(load, tiny):
    session = load(tiny("llama"))
    pairs = mixture(4)
    want = run(session, pairs)
    assert np.array_equal(run(session, pairs, [KVectors()] * 4), want)
    session.set_plan(pairs, all_vectors(session, (2, 64)))
    session.set_plan(pairs)  # a new plan starts without
    with session.context(256) as ctx:
        assert conditioned(ctx) == [(False, False)] * 4


# ---- attention that is not plain softmax


@pytest.mark.parametrize(("arch", "why"), [("gemma2", "a soft cap"), ("gpt_oss", "sinks")])
def test_where_the_mean_would_matter_it_is_left_in(load, tiny, arch, why):
    session = load(tiny(arch))
    pairs = uniform("f16", 4)
    want = run(session, pairs)
    assert np.abs(run(session, pairs, all_vectors(session, (2, 64))) - want).max() < MOST["f16"]
    session.set_plan(pairs, all_vectors(session, (2, 64)))
    with session.context(256) as ctx:
        assert conditioned(ctx) == [(False, True)] * 4
        note = f"the mean of K is left in, since the attention has {why}; the rest applies"
        assert ctx.notes() == [f"layers 1,3: {note}", f"layers 0,2: {note}"]  # of the full cache, then of the window's
    session.set_plan(pairs, all_vectors(session, (2, 64), scale=False))
    with session.context(256) as ctx:
        assert conditioned(ctx) == [(False, False)] * 4


def test_mla_is_cached_as_it_is(load, tiny):
    session = load(tiny("mla"))
    pairs = uniform("q8_0", 3)
    want = run(session, pairs)
    assert np.array_equal(run(session, pairs, [vectors(il, 1, 192) for il in range(3)]), want)
    with session.context(256) as ctx:
        assert conditioned(ctx) == [(False, False)] * 3
        assert ctx.notes() == ["layers 0-2: K cannot be conditioned with MLA: it is cached as it is"]


def test_an_explicit_k_type_takes_k_out_of_the_plan(load, tiny):
    session = load(tiny("llama"))
    session.set_plan(uniform("q4_0", 4), all_vectors(session, (2, 64)))
    with session.context(256, type_k="q8_0") as ctx:
        assert conditioned(ctx) == [(False, False)] * 4
    with session.context(256, type_v="q8_0") as ctx:
        assert conditioned(ctx) == [(True, True)] * 4


def test_a_dry_session_tells_the_same(load, tiny):
    path = tiny("gemma3")
    real, dry = load(path), load(path, no_alloc=True)
    for session in (real, dry):
        session.set_plan(mixture(6), [vectors(il) for il in range(6)])
    with real.context(512) as a, dry.context(512) as b:
        assert a.layers() == b.layers() and conditioned(b) == [(True, True)] * 6


# ---- context shift


@every_model
@pytest.mark.parametrize("basis", [False, True])
@pytest.mark.parametrize("name", ["f16", "f32", "bf16", "q8_0"])
def test_a_shift_keeps_the_logits(load, tiny, model, name, basis):
    """As without vectors: after a shift the logits are those of the same K, moved. f16 and f32 to rounding."""
    arch, arguments, shape = MODELS[model]
    session = load(tiny(arch, **arguments))
    pairs = uniform(f"{name}/f16", session.n_layer)
    k_vectors = all_vectors(session, shape, basis=basis)

    def shifted(k_vectors):
        session.set_plan(pairs, k_vectors)
        with session.context(256) as ctx:
            return next_logits(ctx, shifted=True)

    want, have = shifted(()), shifted(k_vectors)
    if name in MOST:
        assert np.abs(have - want).max() < MOST[name]
    assert np.corrcoef(have, want)[0, 1] > (0.9995 if name in MOST else 0.99)


# ---- states


@every_kind
@pytest.mark.parametrize("model", ["llama", "sliding window", "hybrid"])
@pytest.mark.parametrize("name", ["f16", "q8_0", "k3_64"])
def test_a_state_belongs_to_its_vectors(load, tiny, kind, model, name):
    arch, arguments, shape = MODELS[model]
    session = load(tiny(arch, **arguments))
    pairs, groups = uniform(f"{name}/q8_0", session.n_layer), CODECS[name].groups
    k_vectors = all_vectors(session, shape, basis=groups)
    session.set_plan(pairs, k_vectors)
    state, want = saved(session, kind)
    with session.context(256) as ctx:
        assert restore(ctx, kind, state) == len(state)
        assert np.array_equal(feed(ctx, [77], 40), want)
    session.set_plan(pairs)
    tags = " (not rotated) (conditioned)" if groups else " (conditioned)"
    assert_refused(session, kind, state, f"the state has K {name}{tags}, this context has {name}: it was saved under")
    plain, _ = saved(session, kind)
    il = layers_with_kv(session)[-1]
    of_layer = k_vectors[il]
    other = replace(of_layer, scale=(1.01 * of_layer.scale[0], *of_layer.scale[1:]))
    if groups:
        other = replace(of_layer, basis=bytes([of_layer.basis[0] ^ 1]) + of_layer.basis[1:])
    session.set_plan(pairs, [*k_vectors[:il], other, *k_vectors[il + 1 :]])
    assert_refused(session, kind, state, f"layer {il}: the state's K has a mean, scale or basis of ")
    assert_refused(session, kind, plain, f"the state has K {name}, this context has {name}{tags}")


@every_kind
def test_means_are_not_taken_for_scales(load, tiny, kind):
    session = load(tiny("llama"))
    ones = (1.0,) * 128
    session.set_plan(uniform("f16", 4), [KVectors(mean=ones)] * 4)
    state, _ = saved(session, kind)
    session.set_plan(uniform("f16", 4), [KVectors(scale=ones)] * 4)
    assert_refused(session, kind, state, "layer 0: the state's K has a mean, scale or basis of ")


def test_a_state_without_vectors_is_stocks(load, tiny):
    session = load(tiny("llama"))
    session.set_plan(uniform("q8_0", 4), [KVectors(), KVectors(), KVectors(), vectors(3)])
    one, _ = saved(session, "whole")
    session.set_plan(uniform("q8_0", 4))
    none, _ = saved(session, "whole")
    assert len(one) == len(none) + 8  # the hash of one layer
    with session.context(256, type_k="q8_0", type_v="q8_0") as ctx:
        feed(ctx, prompt(40))
        assert len(save(ctx, "whole")) == len(none)
