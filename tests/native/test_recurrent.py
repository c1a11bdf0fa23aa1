"""A recurrent state starts from nothing, whatever its cell held before."""

import numpy as np
import pytest
from running import feed, prompt, uniform

from kvtuner_gguf.gguf_header import read_header

pytestmark = pytest.mark.native

POISON = 200  # the token whose embedding is NaN
N_TOKENS = 40


@pytest.fixture
def poisoned(tiny, tmp_path):
    """A hybrid model with a token that makes NaN of all that comes after it, as an overflow does."""
    path = tmp_path / "model.gguf"
    data = bytearray(tiny("hybrid").read_bytes())
    table = next(t for t in read_header(tiny("hybrid")).tensors if t.name == "token_embd.weight")
    row = 2 * table.shape[0]
    at = table.offset + POISON * row
    data[at : at + row] = np.full(table.shape[0], np.nan, np.float16).tobytes()
    path.write_bytes(data)
    return path


def forget(ctx, how):
    from llama_cpp import llama_cpp

    memory = llama_cpp.llama_get_memory(ctx.ctx)
    if how == "clear":
        llama_cpp.llama_memory_clear(memory, False)
    else:
        assert llama_cpp.llama_memory_seq_rm(memory, 0, -1, -1)


@pytest.mark.parametrize("how", ["clear", "seq_rm"])
@pytest.mark.parametrize("pair", ["f16", "q8_0"])
def test_a_sequence_that_overflowed_leaves_nothing_to_the_next(load, poisoned, pair, how):
    session = load(poisoned)
    session.set_plan(uniform(pair, session.n_layer))
    tokens = [token for token in prompt(2 * N_TOKENS) if token != POISON][:N_TOKENS]
    with session.context(256) as ctx:
        want = feed(ctx, tokens)
        forget(ctx, how)
        assert np.isnan(feed(ctx, [*tokens[:8], POISON, 5, 6])[8:]).all()
        for _ in range(2):
            forget(ctx, how)
            assert np.array_equal(feed(ctx, tokens), want)
