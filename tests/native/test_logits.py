"""A plan changes what the cache holds and nothing else: a uniform one is llama.cpp's own cache type, bit for bit."""

import numpy as np
import pytest
from running import N_TOKENS, feed, mixture, prompt, run, uniform

from kvtuner_gguf.codecs import CODECS
from kvtuner_gguf.pair import Pair

pytestmark = pytest.mark.native

every_arch = pytest.mark.parametrize("arch", ["llama", "gemma3", "gemma4", "hybrid", "mla"])


@every_arch
@pytest.mark.parametrize("name", CODECS)
def test_a_uniform_plan_is_the_cache_type(load, tiny, arch, name):
    session = load(tiny(arch))
    planned = run(session, uniform(name, session.n_layer))
    assert np.array_equal(planned, run(session, type_k=name, type_v=name))


@pytest.mark.parametrize("arch", ["llama", "gemma3", "hybrid"])
@pytest.mark.parametrize("pair", ["q8_0/q4_0", "f16/q8_0", "q4_0/f16", "bf16/iq4_nl", "q3_64/q2_64", "q6_32/q3_32"])
def test_a_uniform_pair_is_the_two_cache_types(load, tiny, arch, pair):
    session = load(tiny(arch))
    type_k, type_v = pair.split("/")
    planned = run(session, uniform(pair, session.n_layer))
    assert np.array_equal(planned, run(session, type_k=type_k, type_v=type_v))


@pytest.mark.parametrize("arguments", [{"head_dim": 96}, {"head_dim": 128}, {"rope_dim": 32}])
def test_a_uniform_plan_is_the_cache_type_for_other_heads(load, tiny, arguments):
    session = load(tiny("llama", **arguments))
    planned = run(session, uniform("q8_0/q4_0", session.n_layer))
    assert np.array_equal(planned, run(session, type_k="q8_0", type_v="q4_0"))


@pytest.mark.parametrize("name", ["q8_0", "q4_0", "bf16", "q6_32", "q3_64", "q2_64"])
def test_a_uniform_k_is_the_cache_type_without_flash_attention(load, tiny, name):
    session = load(tiny("llama"))
    planned = run(session, uniform(f"{name}/f16", session.n_layer), flash_attn=False)
    assert np.array_equal(planned, run(session, type_k=name, flash_attn=False))


@every_arch
@pytest.mark.parametrize("flash_attn", [True, False])
def test_a_plan_of_f16_is_no_plan(load, tiny, arch, flash_attn):
    session = load(tiny(arch))
    planned = run(session, uniform("f16", session.n_layer), flash_attn=flash_attn)
    assert np.array_equal(planned, run(session, flash_attn=flash_attn))


@every_arch
def test_layers_that_no_override_names_are_f16(load, tiny, arch):
    pairs = [Pair("q8_0" if il % 2 else "f16", "f16") for il in range(6)]
    overrides = {f"kvtuner.type_k.{il}": "q8_0" for il, pair in enumerate(pairs) if pair.type_k == "q8_0"}
    stock = load(tiny(arch))
    session = load(tiny(arch), overrides={key: name for key, name in overrides.items() if int(key[-1]) < stock.n_layer})
    with session.context(256) as ctx:
        assert np.array_equal(feed(ctx, prompt(N_TOKENS)), run(stock, pairs[: stock.n_layer])[:N_TOKENS])


@every_arch
def test_a_mixture_is_near_f16_and_not_f16(load, tiny, arch):
    session = load(tiny(arch))
    f16, mixed = run(session), run(session, mixture(session.n_layer))
    assert np.isfinite(mixed).all()
    assert not np.array_equal(mixed, f16)
    assert np.corrcoef(mixed.ravel(), f16.ravel())[0, 1] > 0.98  # 0.993 measured, at worst


def test_one_layer_alone_changes_the_logits(load, tiny):
    session = load(tiny("llama"))
    f16 = run(session)
    for il in range(session.n_layer):
        for pair in ("q4_0/f16", "f16/q4_0"):
            one = uniform("f16", session.n_layer)
            one[il] = uniform(pair, 1)[0]
            assert not np.array_equal(run(session, one), f16), f"layer {il}: {pair} changes nothing"


@every_arch
@pytest.mark.parametrize("n_seq_max", [2, 4])
def test_each_sequence_of_a_batch_is_as_if_alone(load, tiny, arch, n_seq_max):
    session = load(tiny(arch))
    session.set_plan(mixture(session.n_layer))
    texts = [prompt(40, seed=seq) for seq in range(n_seq_max)]
    with session.context(256 * n_seq_max, n_seq_max=n_seq_max) as ctx:
        rows = [(token, pos, seq) for seq, text in enumerate(texts) for pos, token in enumerate(text)]
        together = ctx.decode(rows, [True] * len(rows)).reshape(n_seq_max, 40, -1).copy()
        then = ctx.decode([(7, 40, seq) for seq in range(n_seq_max)], [True] * n_seq_max).copy()
    for seq, text in enumerate(texts):
        with session.context(256) as ctx:
            assert_near(together[seq], feed(ctx, text))
            assert_near(then[seq], feed(ctx, [7], 40)[0])


def assert_near(have, want):
    """Logits with a std of 2: another order of summation may flip a code in the cache. 0.013 measured, at worst."""
    assert np.abs(have - want).max() < 0.05
