"""Saved states with types per layer: exact where they fit, refused with the cache's own words where they do not."""

import ctypes

import numpy as np
import pytest
from running import feed, mixture, prompt, uniform

pytestmark = pytest.mark.native

every_arch = pytest.mark.parametrize("arch", ["llama", "gemma3", "gemma4", "hybrid", "mla"])
every_kind = pytest.mark.parametrize("kind", ["whole", "sequence"])
N_TOKENS = (
    40  # inside gemma3's window: past it a whole state may put the next token into another cell, also without a plan
)


def save(ctx, kind, seq_id=0):
    """The state's bytes."""
    from llama_cpp import llama_cpp

    if kind == "whole":
        size = llama_cpp.llama_state_get_size(ctx.ctx)
        buf = (ctypes.c_uint8 * size)()
        written = llama_cpp.llama_state_get_data(ctx.ctx, buf, size)
    else:
        size = llama_cpp.llama_state_seq_get_size(ctx.ctx, seq_id)
        buf = (ctypes.c_uint8 * size)()
        written = llama_cpp.llama_state_seq_get_data(ctx.ctx, buf, size, seq_id)
    assert 0 < written <= size
    return bytes(buf[:written])


def restore(ctx, kind, state, seq_id=0):
    """Bytes read; 0 if the state is refused."""
    from llama_cpp import llama_cpp

    buf = (ctypes.c_uint8 * len(state)).from_buffer_copy(state)
    if kind == "whole":
        return llama_cpp.llama_state_set_data(ctx.ctx, buf, len(state))
    return llama_cpp.llama_state_seq_set_data(ctx.ctx, buf, len(state), seq_id)


def saved(session, kind, **arguments):
    """(state after a prompt, logits of one more token)."""
    with session.context(256, **arguments) as ctx:
        feed(ctx, prompt(N_TOKENS))
        state = save(ctx, kind)
        return state, feed(ctx, [77], N_TOKENS)


def assert_refused(session, kind, state, reason, **arguments):
    """The state is not taken, the log says why, and the context works as before."""
    with session.context(256, **arguments) as ctx:
        want = feed(ctx, prompt(N_TOKENS))
        ctx.clear()
        session._log.lines.clear()
        assert restore(ctx, kind, state) == 0
        assert reason in " ".join(session._log.lines)
        assert np.array_equal(feed(ctx, prompt(N_TOKENS)), want)


@every_arch
@every_kind
@pytest.mark.parametrize("flash_attn", [True, False])
def test_a_state_comes_back_exactly(load, tiny, arch, kind, flash_attn):
    session = load(tiny(arch))
    session.set_plan(mixture(session.n_layer))
    state, want = saved(session, kind, flash_attn=flash_attn)
    with session.context(256, flash_attn=flash_attn) as ctx:
        feed(ctx, prompt(16, seed=1))  # what was there is replaced
        assert restore(ctx, kind, state) == len(state)
        assert np.array_equal(feed(ctx, [77], N_TOKENS), want)


@every_kind
@pytest.mark.parametrize(
    "pair", ["q2_64/q3_64", "q3_64/q2_32", "q6_32/q3_32", "k3_64/t2_64", "k2_64/q4_0", "t4_64/t3_64"]
)
@pytest.mark.parametrize("arch", ["llama", "gemma3", "hybrid"])
def test_a_state_of_our_types_comes_back_exactly(load, tiny, arch, pair, kind):
    session = load(tiny(arch))
    session.set_plan(uniform(pair, session.n_layer))
    state, want = saved(session, kind)
    with session.context(256) as ctx:
        assert restore(ctx, kind, state) == len(state)
        assert np.array_equal(feed(ctx, [77], N_TOKENS), want)


@pytest.mark.parametrize("arch", ["llama", "gemma3", "mla"])
def test_a_sequence_moves_to_another_sequence(load, tiny, arch):
    session = load(tiny(arch))
    session.set_plan(mixture(session.n_layer))
    with session.context(768, n_seq_max=3) as ctx:
        feed(ctx, prompt(N_TOKENS), seq_id=0)
        state = save(ctx, "sequence", seq_id=0)
        want = feed(ctx, [77], N_TOKENS, seq_id=0)
    with session.context(768, n_seq_max=3) as ctx:
        feed(ctx, prompt(16, seed=1), seq_id=0)
        assert restore(ctx, "sequence", state, seq_id=2) == len(state)
        assert np.array_equal(feed(ctx, [77], N_TOKENS, seq_id=2), want)


@pytest.mark.parametrize("arch", ["llama", "gemma3", "mla"])
def test_a_copied_sequence_goes_on_like_the_first(load, tiny, arch):
    from llama_cpp import llama_cpp

    session = load(tiny(arch))
    session.set_plan(mixture(session.n_layer))
    with session.context(512, n_seq_max=2) as ctx:
        feed(ctx, prompt(N_TOKENS))
        llama_cpp.llama_memory_seq_cp(llama_cpp.llama_get_memory(ctx.ctx), 0, 1, -1, -1)
        first, copy = (feed(ctx, [77], N_TOKENS, seq_id=seq) for seq in (0, 1))
        assert np.array_equal(first, copy)


@every_kind
@pytest.mark.parametrize(
    ("there", "reason"),
    [
        ("f16", "layer 0: the state has K q8_0, this context has f16"),
        ("q4_0/q4_0", "layer 0: the state has K q8_0, this context has q4_0"),
        ("q3_64/q4_0", "layer 0: the state has K q8_0, this context has q3_64"),
        ("q8_0/q8_0", "layer 0: the state has V q4_0, this context has q8_0"),
        ("q8_0/f16", "layer 0: the state has V q4_0, this context has f16"),
    ],
)
def test_a_context_of_another_plan_refuses_the_state(load, tiny, kind, there, reason):
    session = load(tiny("llama"))
    session.set_plan(uniform("q8_0/q4_0", 4))
    state, _ = saved(session, kind)
    session.set_plan(uniform(there, 4))
    assert_refused(session, kind, state, reason)


@every_arch
@every_kind
def test_a_context_without_a_plan_refuses_the_state(load, tiny, arch, kind):
    session = load(tiny(arch))
    session.set_plan(mixture(session.n_layer))
    state, _ = saved(session, kind)
    session.set_plan(None)
    assert_refused(session, kind, state, "this context has f16: it was saved under another plan")


@every_kind
def test_one_layer_that_differs_is_enough(load, tiny, kind):
    session = load(tiny("llama"))
    pairs = uniform("q8_0", 4)
    session.set_plan(pairs)
    state, _ = saved(session, kind)
    session.set_plan([*pairs[:3], *uniform("q8_0/q5_1", 1)])
    assert_refused(session, kind, state, "layer 3: the state has V q8_0, this context has q5_1")


@every_kind
@pytest.mark.parametrize("arch", ["llama", "gemma3", "hybrid"])
@pytest.mark.parametrize(("pair", "side"), [("q8_0/f16", "K q8_0"), ("f16/q4_0", "V q4_0")])
def test_a_state_of_another_rotation_is_refused(load, tiny, monkeypatch, kind, arch, pair, side):
    session = load(tiny(arch))
    session.set_plan(uniform(pair, session.n_layer))
    rotated, _ = saved(session, kind)
    monkeypatch.setenv("LLAMA_ATTN_ROT_DISABLE", "1")
    plain, want = saved(session, kind)
    name = side[2:]
    assert_refused(session, kind, rotated, f"the state has {side}, this context has {name} (not rotated)")
    with session.context(256) as ctx:
        assert restore(ctx, kind, plain) == len(plain)
        assert np.array_equal(feed(ctx, [77], N_TOKENS), want)
    monkeypatch.delenv("LLAMA_ATTN_ROT_DISABLE")
    assert_refused(session, kind, plain, f"the state has {side} (not rotated), this context has {name}")


def test_a_head_that_is_never_rotated_needs_no_tag(load, tiny, monkeypatch):
    session = load(tiny("llama", head_dim=96))
    session.set_plan(uniform("q8_0", 4))
    state, want = saved(session, "whole")
    monkeypatch.setenv("LLAMA_ATTN_ROT_DISABLE", "1")
    with session.context(256) as ctx:
        assert restore(ctx, "whole", state) == len(state)
        assert np.array_equal(feed(ctx, [77], N_TOKENS), want)


@every_kind
@pytest.mark.parametrize("keep", [0.1, 0.5, 0.9])
def test_a_state_that_is_cut_off_is_refused(load, tiny, kind, keep):
    session = load(tiny("llama"))
    session.set_plan(mixture(4))
    state, _ = saved(session, kind)
    assert_refused(session, kind, state[: int(len(state) * keep)], "")
