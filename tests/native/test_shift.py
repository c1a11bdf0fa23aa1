"""Context shift with types per layer: whatever the cache holds, a shift by n moves it by n."""

import numpy as np
import pytest
from running import MIXTURE, feed, prompt

from kvtuner_gguf.codecs import CODECS
from kvtuner_gguf.pair import Pair

pytestmark = pytest.mark.native

N_TOKENS, N_DROP = 96, 32
MODELS = {
    "heads of 64": ("llama", {}),
    "heads of 96, never rotated": ("llama", {"head_dim": 96}),
    "heads of 128": ("llama", {"head_dim": 128}),
    "RoPE on half of a head": ("llama", {"rope_dim": 32}),
    "RoPE of far pairs": ("qwen2", {}),
    "sliding window": ("gemma3", {}),
    "shared KV": ("gemma4", {}),
    "hybrid": ("hybrid", {}),
}
every_model = pytest.mark.parametrize("model", MODELS)
# Least correlation of the logits after a shift with those without, by the bits of the plan's coarsest K, which the
# shift decodes and encodes once more. Measured, at worst: 0.865, 0.975, 0.9926, 0.9982, 0.99986. Where the shift is
# left out, or takes a rotated K for one that is not, no model reaches 0.993, and none but the hybrid 0.92.
LEAST_CORRELATION = ((3, 0.82), (4, 0.96), (6, 0.985), (8, 0.996), (np.inf, 0.9995))


def next_logits(ctx, *, shifted):
    """(n_vocab,) after N_TOKENS tokens less the first N_DROP, and one more; shifted: back to position 0."""
    from llama_cpp import llama_cpp

    memory = llama_cpp.llama_get_memory(ctx.ctx)
    feed(ctx, prompt(N_TOKENS))
    assert llama_cpp.llama_memory_seq_rm(memory, 0, 0, N_DROP)
    if shifted:
        assert llama_cpp.llama_memory_can_shift(memory)
        llama_cpp.llama_memory_seq_add(memory, 0, N_DROP, -1, -N_DROP)
    return feed(ctx, [77], N_TOKENS - (N_DROP if shifted else 0))[0]


def assert_shift_keeps_the_logits(session, pairs, **arguments):
    session.set_plan(pairs)
    with session.context(256, **arguments) as ctx:
        want = next_logits(ctx, shifted=False)
    with session.context(256, **arguments) as ctx:
        have = next_logits(ctx, shifted=True)
    coarsest = min(CODECS[pair.type_k].bits_per_value for pair in pairs)
    assert np.corrcoef(want, have)[0, 1] > next(least for bits, least in LEAST_CORRELATION if coarsest < bits)


@every_model
@pytest.mark.parametrize("first", range(len(MIXTURE)))
def test_a_shift_of_a_mixture(load, tiny, model, first):
    arch, arguments = MODELS[model]
    session = load(tiny(arch, **arguments))
    pairs = [Pair.parse(MIXTURE[(first + il) % len(MIXTURE)]) for il in range(session.n_layer)]
    assert_shift_keeps_the_logits(session, pairs)


@every_model
@pytest.mark.parametrize("name", ["f16", "f32", "bf16", "q8_0", "q6_32", "q5_1", "q3_32", "q2_32"])
def test_a_shift_of_one_type(load, tiny, model, name):
    arch, arguments = MODELS[model]
    session = load(tiny(arch, **arguments))
    assert_shift_keeps_the_logits(session, [Pair(name, name)] * session.n_layer)


@every_model
def test_a_shift_without_rotation(load, tiny, monkeypatch, model):
    monkeypatch.setenv("LLAMA_ATTN_ROT_DISABLE", "1")
    arch, arguments = MODELS[model]
    session = load(tiny(arch, **arguments))
    assert_shift_keeps_the_logits(
        session, [Pair.parse(("q8_0/q8_0", "f16/q8_0")[il % 2]) for il in range(session.n_layer)]
    )


@pytest.mark.parametrize("model", ["heads of 64", "RoPE on half of a head", "sliding window"])
def test_a_shift_without_flash_attention(load, tiny, model):
    arch, arguments = MODELS[model]
    session = load(tiny(arch, **arguments))
    pairs = [Pair.parse(("q8_0/f16", "f16/f16", "q5_1/bf16")[il % 3]) for il in range(session.n_layer)]
    assert_shift_keeps_the_logits(session, pairs, flash_attn=False)


def test_an_explicit_type_shifts_beside_a_planned_one(load, tiny):
    session = load(tiny("llama", head_dim=96))
    for arguments in ({"type_k": "q8_0"}, {"type_v": "q8_0"}):
        assert_shift_keeps_the_logits(session, [Pair.parse("q8_0/q5_1")] * 4, **arguments)


@pytest.mark.parametrize(("name", "can_shift"), [("f16", True), ("f32", True), ("q8_0", False), ("q4_0", False)])
def test_mla_says_whether_it_can_shift(load, tiny, name, can_shift):
    from llama_cpp import llama_cpp

    session = load(tiny("mla"))
    pairs = [Pair("f16", "f16"), Pair(name, name), Pair("f16", "f16")]
    session.set_plan(pairs)
    with session.context(256) as ctx:
        assert llama_cpp.llama_memory_can_shift(llama_cpp.llama_get_memory(ctx.ctx)) == can_shift
    if can_shift:
        assert_shift_keeps_the_logits(session, pairs)
