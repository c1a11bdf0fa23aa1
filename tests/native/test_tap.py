"""The tap shows what attention reads and gives: numpy gets the same output from it, and watching changes nothing."""

import numpy as np
import pytest
from running import feed, prompt, uniform

from kvtuner_gguf.calibrate.capture import capture, captured_bytes
from kvtuner_gguf.calibrate.error import attention
from kvtuner_gguf.calibrate.samples import LayerSample
from kvtuner_gguf.calibrate.text import chunks_of
from kvtuner_gguf.errors import NativeError
from kvtuner_gguf.tap import Tap

pytestmark = pytest.mark.native

# arch -> the layers that have KV of their own, heads of Q and of KV, head_dim of K and of V
SHAPES = {
    "llama": (range(4), 4, 2, 64, 64),
    "gemma3": (range(6), 4, 2, 64, 64),
    "qwen2": (range(4), 4, 2, 64, 64),
    "hybrid": ((2, 4), 2, 1, 64, 64),
    "mla": (range(3), 4, 1, 192, 128),
}
every_arch = pytest.mark.parametrize("arch", SHAPES)
N_TOKENS = 96  # more than the window of gemma3


def sample_of(node):
    """A copy of the node, whose data lives during the callback only."""

    def copy(pointer, shape, dtype=np.float32):
        return np.ctypeslib.as_array(pointer, shape).view(dtype).astype(np.float32)

    return LayerSample(
        il=node.il,
        q=copy(node.q, (node.n_head, node.n_q, node.head_dim_k)),
        k=copy(node.k, (node.n_head_kv, node.n_kv, node.head_dim_k), np.float16),
        v=copy(node.v, (node.n_head_kv, node.n_kv, node.head_dim_v), np.float16),
        mask=copy(node.mask, (node.n_q, node.n_kv)),
        scale=node.scale,
        output=copy(node.out, (node.n_head, node.n_q, node.head_dim_v)),
    )


@pytest.fixture
def tapped():
    """tapped(session, runs, n_q_max) -> the samples, in order, of runs(ctx) with the tap on."""
    taps = []

    def watch(session, runs, n_q_max=512, **arguments):
        samples = []
        taps.append(Tap(lambda node: samples.append(sample_of(node)), n_q_max))
        with session.context(256, watch=taps[-1], **arguments) as ctx, taps[-1].enabled():
            runs(ctx)
        return samples

    yield watch
    for tap in taps:
        tap.close()


def assert_numpy_agrees(sample):
    """Within what the kernel's f16 sums leave: 0.0016 of the norm measured, at worst, for one token; 1e-6 for a
    batch."""
    _, output = attention(sample, sample.k, sample.v)
    assert np.linalg.norm(output - sample.output) < 0.005 * np.linalg.norm(sample.output)


@every_arch
def test_numpy_gets_the_same_output(load, tiny, tapped, arch):
    layers, n_head, n_head_kv, head_dim_k, head_dim_v = SHAPES[arch]
    samples = tapped(load(tiny(arch)), lambda ctx: feed(ctx, prompt(N_TOKENS)))
    assert [sample.il for sample in samples] == list(layers)
    for sample in samples:
        assert sample.q.shape == (n_head, N_TOKENS, head_dim_k)
        assert sample.k.shape == (n_head_kv, 256, head_dim_k)
        assert sample.output.shape == (n_head, N_TOKENS, head_dim_v)
        assert_numpy_agrees(sample)


@every_arch
def test_a_single_token_is_seen_as_well(load, tiny, tapped, arch):
    def runs(ctx):
        feed(ctx, prompt(N_TOKENS))
        feed(ctx, [77], N_TOKENS)

    samples = tapped(load(tiny(arch)), runs)
    layers = list(SHAPES[arch][0])
    assert [sample.il for sample in samples] == layers * 2
    for sample in samples[len(layers) :]:
        assert sample.q.shape[1] == 1
        assert_numpy_agrees(sample)


def test_the_mask_is_the_layer_s_own(load, tiny, tapped):
    samples = tapped(load(tiny("gemma3", n_swa=64)), lambda ctx: feed(ctx, prompt(N_TOKENS)))
    n_seen = [(sample.mask[-1] == 0).sum() for sample in samples]
    assert n_seen == [64, 64, N_TOKENS, 64, 64, N_TOKENS]
    for sample in samples:
        assert set(np.unique(sample.mask)) == {0, -np.inf}
        assert (sample.mask[0] == 0).sum() == 1


def test_rows_are_spread_over_the_batch_and_hold_the_last(load, tiny, tapped):
    session = load(tiny("llama"))
    few, every = (tapped(session, lambda ctx: feed(ctx, prompt(N_TOKENS)), n_q_max=n) for n in (5, 512))
    rows = [(i + 1) * N_TOKENS // 5 - 1 for i in range(5)]
    assert rows[-1] == N_TOKENS - 1
    for a, b in zip(few, every):
        assert np.array_equal(a.q, b.q[:, rows])
        assert np.array_equal(a.mask, b.mask[rows])
        assert np.array_equal(a.output, b.output[:, rows])
        assert np.array_equal(a.k, b.k)


@every_arch
def test_a_tap_changes_no_logits(load, tiny, arch):
    session, tokens = load(tiny(arch)), prompt(N_TOKENS)
    with session.context(256) as ctx:
        want = feed(ctx, tokens)
    seen = []
    tap = Tap(lambda node: seen.append(node.il), 8)
    with session.context(256, watch=tap) as ctx:
        assert np.array_equal(feed(ctx, tokens), want)
        assert not seen  # it is off at first
        ctx.clear()
        with tap.enabled():
            assert np.array_equal(feed(ctx, tokens), want)
        assert seen == list(SHAPES[arch][0])
        ctx.clear()
        assert np.array_equal(feed(ctx, tokens), want)
        assert seen == list(SHAPES[arch][0])
    tap.close()


def test_a_cache_that_is_not_f16_is_an_error(load, tiny, tapped):
    session = load(tiny("llama"))
    session.set_plan([*uniform("f16", 3), *uniform("q8_0/q4_0", 1)])
    with pytest.raises(
        NativeError, match="layer 3: need one sequence and an f16 cache, have q f32 x 1, k q8_0, v q4_0"
    ):
        tapped(session, lambda ctx: feed(ctx, prompt(8)))


def test_several_sequences_at_once_are_an_error(load, tiny, tapped):
    rows = [(token, pos, seq) for seq in (0, 1) for pos, token in enumerate(prompt(8))]
    with pytest.raises(NativeError, match="need one sequence"):
        tapped(load(tiny("llama")), lambda ctx: ctx.decode(rows, [True] * 16), n_seq_max=2)


def test_an_error_in_the_callback_comes_back(load, tiny):
    def fail(node):
        raise KeyError(node.il)

    tap = Tap(fail, 8)
    with load(tiny("llama")).context(256, watch=tap) as ctx, pytest.raises(KeyError), tap.enabled():
        feed(ctx, prompt(8))
    tap.close()


@every_arch
def test_a_capture_takes_the_room_that_is_asked_for(load, tiny, tmp_path, arch):
    """Before work, of the disk: within its small arrays."""
    session, n_ctx = load(tiny(arch)), 512
    tokens = np.array(prompt(2 * n_ctx), np.int32)
    capture(session, chunks_of(tokens, n_ctx, 2, "text"), tmp_path, n_ctx=n_ctx)
    taken = sum(path.stat().st_size for path in tmp_path.rglob("*"))
    asked = captured_bytes(session.geometry(n_ctx), 2, session.n_gqa)
    assert asked < taken < 1.2 * asked + 2**16
