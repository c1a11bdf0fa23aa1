"""A run that differs from the f16 cache in upper layers alone starts there, and is the run that it would have been."""

import numpy as np
import pytest
from models import FIRST_BYTE
from running import prompt, uniform

from kvtuner_gguf.calibrate import hidden as hidden_states
from kvtuner_gguf.calibrate.hidden import hidden_bytes, hidden_of
from kvtuner_gguf.calibrate.kld import Chunks, make_reference, measure
from kvtuner_gguf.errors import NativeError
from kvtuner_gguf.kvectors import KVectors
from kvtuner_gguf.pair import Pair
from kvtuner_gguf.quality import Quality

pytestmark = pytest.mark.native

F16, Q4 = Pair("f16", "f16"), Pair("q4_0", "q4_0")
ARCHS = ["llama", "qwen2", "gemma3", "gemma2", "gpt_oss", "refact", "hybrid", "mla"]


def chunks(n_ctx: int = 768) -> Chunks:
    """Two, of two batches each, the second shorter."""
    tokens = np.random.default_rng(0).integers(FIRST_BYTE, FIRST_BYTE + 256, (2, n_ctx))
    return Chunks(tokens.astype(np.int32), n_ctx // 4)


@pytest.mark.parametrize("arch", ARCHS)
def test_the_run_is_the_same(load, tiny, tmp_path, arch):
    session, text = load(tiny(arch)), chunks()
    hidden = hidden_of(session, text.tokens.size, tmp_path / "hidden")
    assert hidden is not None
    whole = make_reference(session, text, tmp_path / "a")
    kept = make_reference(session, text, tmp_path / "b", hidden=hidden)
    assert whole.path.read_bytes() == kept.path.read_bytes()
    with_kv = [il for il, n in enumerate(session.geometry(256).values_k) if n]
    for il in with_kv:
        plan = [Q4 if i == il else F16 for i in range(session.n_layer)]
        vectors = [KVectors() for _ in plan]
        have = measure(session, plan, kept, k_vectors=vectors)
        assert have == measure(session, plan, whole, k_vectors=vectors)
        assert have.kld_mean > 0
        assert hidden.taken == (text.tokens.size if il else 0)
    kept.discard()
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_run_is_whole_where_a_later_layer_reads_the_cache_of_one_below(load, tiny, tmp_path):
    """In gemma4 layers 3 and 4 attend over layer 1's K and V, layer 5 over layer 2's: a run may start with layer 1."""
    session, text = load(tiny("gemma4")), chunks()
    hidden = hidden_of(session, text.tokens.size, tmp_path / "hidden")
    whole = make_reference(session, text, tmp_path / "a")
    kept = make_reference(session, text, tmp_path / "b", hidden=hidden)
    for il, taken in ((0, 0), (1, text.tokens.size), (2, 0)):
        plan = [Pair("", "") if i > 2 else Q4 if i == il else F16 for i in range(6)]
        have = measure(session, plan, kept)
        assert have == measure(session, plan, whole) and have.kld_mean > 0
        assert hidden.taken == taken


@pytest.mark.parametrize("il", [0, 2])
def test_a_part_of_the_text_is_measured_as_a_text_of_its_own(load, tiny, tmp_path, il):
    session, text = load(tiny("llama")), chunks()
    kept = make_reference(session, text, tmp_path / "f16", hidden=hidden_of(session, text.tokens.size, tmp_path / "h"))
    plan = [Q4 if i == il else F16 for i in range(session.n_layer)]
    for i in range(2):
        alone = make_reference(session, Chunks(text.tokens[i : i + 1], text.n_skip), tmp_path / "alone")
        assert measure(session, plan, kept.of_chunks(range(i, i + 1))) == measure(session, plan, alone)
        assert kept.hidden.taken == (text.n_ctx if il else 0)
    assert measure(session, plan, kept.of_chunks(range(2))) == measure(session, plan, kept)


def test_a_plan_of_all_layers_runs_whole(load, tiny, tmp_path):
    session, text = load(tiny("llama")), chunks()
    kept = make_reference(session, text, tmp_path / "f16", hidden=hidden_of(session, text.tokens.size, tmp_path / "h"))
    assert isinstance(measure(session, uniform("q4_0", 4), kept), Quality)
    assert kept.hidden.taken == 0
    assert measure(session, [F16] * 4, kept).kld_mean < 1e-6
    assert kept.hidden.taken == 0


def test_a_large_model_keeps_them_after_some_layers_alone(load, tiny, tmp_path, monkeypatch):
    session, text = load(tiny("llama")), chunks()
    of_layer = 4 * text.tokens.size * session.n_embd
    monkeypatch.setattr(hidden_states, "MOST_BYTES", 2 * of_layer)
    hidden = hidden_of(session, text.tokens.size, tmp_path / "h")
    assert (tmp_path / "h").stat().st_size == hidden_bytes(4, text.tokens.size, session.n_embd) == of_layer
    kept = make_reference(session, text, tmp_path / "f16", hidden=hidden)
    assert [hidden.start(il, kept.tokens) for il in range(4)] == [0, 0, 2, 2]
    plan = [F16, F16, F16, Q4]
    have = measure(session, plan, kept)
    assert hidden.taken == text.tokens.size
    assert have == measure(session, plan, make_reference(session, text, tmp_path / "whole"))


def test_no_run_takes_what_none_kept(load, tiny, tmp_path):
    session, text = load(tiny("llama")), chunks()
    hidden, tokens = hidden_of(session, text.tokens.size, tmp_path / "h"), range(text.tokens.size)
    assert hidden.start(3, tokens) == 0
    with pytest.raises(NativeError, match="layer -1 or row 0 is negative"):
        hidden.start(-1, tokens)


def test_other_tokens_are_told(load, tiny, tmp_path):
    session, text = load(tiny("llama")), chunks()
    hidden = hidden_of(session, text.tokens.size, tmp_path / "h")
    kept = make_reference(session, text, tmp_path / "f16", hidden=hidden)
    assert hidden.start(3, kept.tokens) == 3
    with session.context(256, None, watch=hidden) as ctx:
        list(ctx.logits(prompt(40), []))
    with pytest.raises(NativeError, match=f"took 40 rows of hidden states, need {text.tokens.size}"):
        hidden.check()


def test_one_layer_has_none(load, tiny, tmp_path):
    assert hidden_of(load(tiny("llama", n_layer=1)), 512, tmp_path / "h") is None
