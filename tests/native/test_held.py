"""Whatever a Llama read before, its answers are those of a fresh one: sliding windows, recurrent states, saved states,
drafts."""

from __future__ import annotations

import copy
import pickle

import pytest
from chats import LONG, N_LONG, OTHER_TYPES, OTHERS, SHORT, START, THIRD, VECTORS, answer, every_arch, text
from running import feed, prompt

from kvtuner_gguf import native
from kvtuner_gguf.errors import KvtunerError, NativeError, StateError, StoppedError
from kvtuner_gguf.pair import Pair
from kvtuner_gguf.plan import Plan

pytestmark = pytest.mark.native

# ---- one object, several prompts


@every_arch
@pytest.mark.parametrize("swa_full", [False, True])
def test_a_second_chat_is_answered_as_by_a_fresh_object(llama, arch, swa_full):
    llm = llama(arch, swa_full=swa_full)
    answer(llm, LONG)
    assert answer(llm, SHORT) == answer(llama(arch, swa_full=swa_full), SHORT)


@every_arch
def test_a_regenerated_answer_is_the_first_one(llama, arch):
    llm = llama(arch)
    first = answer(llm, LONG, 90)
    assert answer(llm, LONG, 90) == first
    assert answer(llm, [*LONG, *first]) == answer(llama(arch), [*LONG, *first])


@every_arch
def test_a_dropped_turn_is_forgotten(llama, arch):
    llm = llama(arch)
    turns = [prompt(300, seed)[1:] for seed in (4, 5, 6)]
    said = answer(llm, [*START, *turns[0]])
    answer(llm, [*START, *turns[0], *said, *turns[1]])
    rest = [*START, *turns[1], *turns[2]]
    assert answer(llm, rest) == answer(llama(arch), rest)


@every_arch
def test_a_draft_does_not_change_the_answer(llama, arch):
    from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

    # says the same again and again, so that drafts are made; no two tokens are next to alike, as the size of a batch
    # changes how some processors round
    tokens = (prompt(30, 8) * 6)[:170]
    drafted = llama(arch, logits_all=True, draft_model=LlamaPromptLookupDecoding(num_pred_tokens=7))
    want = answer(llama(arch), tokens, 40)
    assert answer(drafted, tokens, 40) == want
    assert answer(drafted, SHORT, 40) == answer(llama(arch), SHORT, 40)
    assert answer(drafted, tokens, 40) == want


@pytest.mark.parametrize("arch", ["gemma3", "gpt_oss", "hybrid"])
def test_a_long_chat_reads_nothing_twice(llama, arch, monkeypatch):
    """What is held is used: only what is new is read, turn after turn."""
    llm, read = llama(arch), []
    chat = list(START)
    for seed in range(5):
        chat += prompt(40, seed)[1:]
        read.clear()
        monkeypatch.setattr(
            llm._batch,
            "set_batch",
            lambda batch, **kw: (read.append(len(batch)), type(llm._batch).set_batch(llm._batch, batch=batch, **kw)),
        )
        chat += answer(llm, chat)
        assert sum(read) < 60


@pytest.mark.parametrize("arch", ["gemma3", "hybrid"])
def test_a_chat_that_is_reset_is_a_fresh_one(llama, arch):
    """In the terminal: a long answer, /reset, then a question."""
    from kvtuner_gguf.chat import chat_loop

    def said(*lines):
        rest, out = iter((*lines, "/exit")), []
        chat_loop(llama(arch), lambda: next(rest), out.append, max_tokens=12, temperature=0.0)
        return "".join(out)

    question = "What is two plus two?"
    assert said("word " * 90, "/reset", question).split("(forgotten)\n")[1] == said(question)


# ---- a program that moves about by itself


@every_arch
def test_a_position_that_is_set_by_hand_is_read_again(llama, arch):
    llm, fresh = llama(arch, logits_all=True), llama(arch, logits_all=True)
    llm.eval(LONG)
    llm.n_tokens = 150
    llm.eval(THIRD)
    fresh.eval([*LONG[:150], *THIRD])
    assert llm.n_tokens == fresh.n_tokens and llm.sample(temp=0.0) == fresh.sample(temp=0.0)
    assert abs(llm.scores[239] - fresh.scores[239]).max() < 1e-2


@every_arch
def test_logits_of_another_position_are_not_sampled(llama, arch):
    llm = llama(arch)
    answer(llm, LONG)
    llm.n_tokens = 100
    assert answer(llm, LONG[:100]) == answer(llama(arch), LONG[:100])


@every_arch
def test_tokens_that_no_one_read_are_an_error(llama, arch):
    llm = llama(arch)
    llm.eval(SHORT)
    llm.n_tokens = 300
    with pytest.raises(NativeError, match="position 300: .* 277 tokens before it were not read by eval"):
        llm.eval(SHORT)
    assert llm.n_tokens == 0 and answer(llm, SHORT) == answer(llama(arch), SHORT)


def test_a_hole_is_seen(llama):
    llm = llama("llama")
    llm.eval(LONG)
    llm._ctx.kv_cache_seq_rm(0, 100, 101)
    assert not native.ctx_holds(llm._ctx.ctx, 0, N_LONG) and native.ctx_holds(llm._ctx.ctx, 0, 100)
    llm.eval(SHORT)
    assert answer(llm, [*LONG, *SHORT]) == answer(llama("llama"), [*LONG, *SHORT])


def test_a_shift_by_hand_goes_on(llama):
    """As programs do with a full context: positions are held, though the tokens at them are others."""
    llm = llama("llama")
    llm.eval(LONG)
    llm._ctx.kv_cache_seq_rm(0, 10, 110)
    llm._ctx.kv_cache_seq_shift(0, 110, N_LONG, -100)
    llm.n_tokens -= 100
    llm.eval(SHORT)
    assert llm.n_tokens == N_LONG - 100 + len(SHORT)


def see_image(llm, side=3):
    """What a handler of images does: side * side embeddings at one position, then n_tokens by hand. -> that
    position."""
    import ctypes

    import numpy as np
    from llama_cpp import llama_cpp

    at, n, n_embd = llm.n_tokens, side * side, llm.n_embd()
    batch = llama_cpp.llama_batch_init(n, n_embd, 1)
    batch.n_tokens, own = n, ctypes.cast(batch.pos, ctypes.POINTER(ctypes.c_int32))
    rows, columns = np.divmod(np.arange(n), side)
    batch.pos = (ctypes.c_int32 * (4 * n))(*[at] * n, *(at + rows).tolist(), *(at + columns).tolist(), *[0] * n)
    image = np.random.default_rng(0).standard_normal((n, n_embd), np.float32)
    ctypes.memmove(batch.embd, image.ctypes.data, image.nbytes)
    for i in range(n):
        batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = 1, 0, i == n - 1
    assert llama_cpp.llama_decode(llm._ctx.ctx, batch) == 0
    batch.pos = own
    llama_cpp.llama_batch_free(batch)
    llm.n_tokens = at + side
    return at


def test_the_square_of_an_image_is_held(llama):
    llm = llama("qwen2 with images")
    llm.eval(THIRD)
    at = see_image(llm)
    assert native.ctx_holds(llm._ctx.ctx, 0, at + 3) and not native.ctx_holds(llm._ctx.ctx, 0, at + 4)
    llm.eval(SHORT)
    first = llm.sample(temp=0.0)
    assert llm.n_tokens == at + 3 + len(SHORT)
    llm._ctx.kv_cache_seq_rm(0, at, at + 1)
    with pytest.raises(NativeError, match="26 tokens before it were not read by eval"):  # an image cannot be read again
        llm.eval(SHORT)
    llm.eval(THIRD)
    see_image(llm)
    llm.eval(SHORT)
    assert llm.sample(temp=0.0) == first


# ---- what the run time says


@pytest.mark.parametrize("swa_full", [False, True])
def test_a_window_holds_what_it_has_not_written_over(load, tiny, swa_full):
    with load(tiny("gemma3")).context(1024, n_ubatch=64, swa_full=swa_full) as ctx:
        assert native.ctx_holds(ctx.ctx, 0, 0) and not native.ctx_holds(ctx.ctx, 0, 1)
        for start in range(0, 640, 64):
            feed(ctx, prompt(64, start), start)
        held = [pos for pos in range(642) if native.ctx_holds(ctx.ctx, 0, pos)]
        from llama_cpp import llama_cpp

        first = llama_cpp.llama_memory_seq_pos_min(llama_cpp.llama_get_memory(ctx.ctx), 0)
        assert held == [0, *range(first + 63 if first else 1, 641)] and bool(first) != swa_full


@pytest.mark.parametrize("arch", ["hybrid", "mamba"])
def test_a_recurrent_state_holds_its_own_position(load, tiny, arch):
    with load(tiny(arch)).context(256) as ctx:
        feed(ctx, prompt(40))
        assert [pos for pos in range(60) if native.ctx_holds(ctx.ctx, 0, pos)] == [40]


def test_a_sequence_holds_its_own_cells(load, tiny):
    with load(tiny("gemma3")).context(1024, n_seq_max=2) as ctx:
        feed(ctx, prompt(40), seq_id=1)
        assert [native.ctx_holds(ctx.ctx, seq_id, 40) for seq_id in (0, 1)] == [False, True]
        for seq_id, pos in ((-1, 0), (2, 0), (0, -1)):
            with pytest.raises(NativeError, match=f"sequence {seq_id} is not one of it, or position {pos} is negative"):
                native.ctx_holds(ctx.ctx, seq_id, pos)


# ---- saved states


@every_arch
@pytest.mark.parametrize("tokens", [SHORT, LONG, LONG[:150], [*LONG, *THIRD]], ids=["other", "same", "part", "more"])
def test_a_restored_state_goes_on_as_a_fresh_object(llama, arch, tokens):
    llm = llama(arch)
    llm.eval(LONG)
    state = pickle.loads(pickle.dumps(llm.save_state()))
    answer(llm, THIRD)
    llm.load_state(state)
    assert answer(llm, tokens) == answer(llama(arch), tokens)


@every_arch
@pytest.mark.parametrize("kind", ["RAM", "disk"])
def test_a_prompt_cache_does_not_change_the_answer(llama, arch, kind, tmp_path):
    import llama_cpp

    cache = llama_cpp.LlamaRAMCache() if kind == "RAM" else llama_cpp.LlamaDiskCache(str(tmp_path))
    llm = llama(arch)
    llm.set_cache(cache)
    prompts = (LONG, SHORT, THIRD, [*LONG, *THIRD], LONG[:150], LONG)
    assert [text(llm, tokens) for tokens in prompts] == [text(llama(arch), tokens) for tokens in prompts]


def test_a_state_fits_an_object_of_other_sizes(llama):
    one = llama("gemma3", logits_all=True)
    one.eval(THIRD)
    other = llama("gemma3", n_ctx=512, n_batch=32)
    other.load_state(one.save_state())
    assert answer(other, [*THIRD, *SHORT]) == answer(llama("gemma3", n_ctx=512, n_batch=32), [*THIRD, *SHORT])
    one.eval(LONG)
    with pytest.raises(StateError, match="state: has 540 tokens, this context 512"):
        other.load_state(one.save_state())


@pytest.mark.parametrize("case", OTHERS)
def test_a_refused_state_leaves_an_object_as_after_a_reset(objects, case):
    one = objects()
    one.eval(LONG)
    state = one.save_state()
    other = objects(**OTHERS[case])
    want = answer(objects(**OTHERS[case]), [*LONG, *SHORT])
    for _ in range(2):
        answer(other, THIRD)
        with pytest.raises(StateError, match="(?i)state: .* give the prompt again") as error:
            other.load_state(state)
        assert isinstance(error.value, KvtunerError) and "'" not in str(error.value)[:6]
        assert other.n_tokens == 0
        assert answer(other, [*LONG, *SHORT]) == want


@pytest.mark.parametrize("kind", ["RAM", "disk"])
@pytest.mark.parametrize("case", OTHERS)
def test_a_state_of_another_plan_is_a_miss(objects, case, kind, tmp_path):
    import llama_cpp

    cache = llama_cpp.LlamaRAMCache() if kind == "RAM" else llama_cpp.LlamaDiskCache(str(tmp_path / "cache"))
    one = objects()
    one.set_cache(cache)
    text(one, LONG)
    for tokens in ([*LONG, *SHORT], [*LONG, *THIRD]):
        other = objects(**OTHERS[case])
        other.set_cache(cache)
        assert text(other, tokens) == text(objects(**OTHERS[case]), tokens)
        assert text(one, tokens) == text(objects(), tokens)


@pytest.mark.parametrize("keep", [0.01, 0.5, 0.999])
@pytest.mark.parametrize("arch", ["llama", "gemma3", "hybrid"])
def test_a_state_that_is_cut_off_leaves_an_object_as_after_a_reset(llama, arch, keep):
    llm = llama(arch)
    llm.eval(LONG)
    state = llm.save_state()
    state.llama_state = state.llama_state[: int(len(state.llama_state) * keep)]
    state.llama_state_size = len(state.llama_state)
    with pytest.raises(StateError):
        llm.load_state(state)
    assert llm.n_tokens == 0 and answer(llm, SHORT) == answer(llama(arch), SHORT)


def test_an_empty_state_holds_nothing(llama):
    llm = llama("llama")
    llm.eval(LONG)
    state = llm.save_state()
    state.llama_state, state.llama_state_size = b"", 0
    answer(llm, THIRD)
    llm.load_state(state)
    assert answer(llm, [*LONG, *SHORT]) == answer(llama("llama"), [*LONG, *SHORT])


def test_a_state_of_stock_is_refused(llama, tiny):
    import llama_cpp

    stock = llama_cpp.Llama(str(tiny("llama")), n_ctx=1024, n_threads=1, flash_attn=True, verbose=False)
    stock.eval(SHORT)
    with pytest.raises(StateError, match="not by kvtuner_gguf"):
        llama("llama").load_state(stock.save_state())
    stock.close()


# ---- stopped


@every_arch
@pytest.mark.parametrize("n_asked", [0, 1, 40, 400])
def test_a_prompt_that_was_stopped_can_be_read_again(llama, arch, n_asked):
    """At the first of its batches, between two, and between two steps of one."""
    llm, asked = llama(arch), []
    llm.should_stop = lambda: len(asked.append(1) or asked) > n_asked
    with pytest.raises(StoppedError, match="the prompt: was not read to its end"):
        answer(llm, LONG)
    assert len(asked) == n_asked + 1 and llm.n_tokens % 64 == 0 and llm.n_tokens < len(LONG)
    llm.should_stop = None
    assert answer(llm, LONG) == answer(llama(arch), LONG)
    llm.should_stop = lambda: False
    assert answer(llm, [*LONG, *SHORT]) == answer(llama(arch), [*LONG, *SHORT])


@pytest.mark.parametrize("n_asked", [0, 100])
def test_what_the_question_raises_is_raised(llama, n_asked):
    llm, asked = llama("llama"), []

    def should_stop() -> bool:
        asked.append(1)
        if len(asked) > n_asked:
            raise KeyboardInterrupt
        return False

    llm.should_stop = should_stop
    with pytest.raises(KeyboardInterrupt):
        answer(llm, LONG)
    llm.should_stop = None
    assert answer(llm, SHORT) == answer(llama("llama"), SHORT)


def test_an_answer_is_stopped_between_two_tokens(llama):
    llm, said = llama("llama"), []
    want = answer(llama("llama"), SHORT)
    llm.should_stop = lambda: len(said) == 5
    with pytest.raises(StoppedError):
        for token in llm.generate(list(SHORT), temp=0.0):
            said.append(token)
    assert said == want[:5]


# ---- copies


COPIES = {"pickle": lambda llm: pickle.loads(pickle.dumps(llm)), "copy": copy.copy, "deepcopy": copy.deepcopy}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"plan": False},
        {"plan": OTHER_TYPES},
        {"plan": Plan((Pair("q4_0", "q4_0"),) * 4, k_vectors=VECTORS)},
        {"type_k": "q5_1"},
        {"type_v": "q3_64", "type_k": "q8_0"},
        {"swa_full": True, "flash_attn": False},
        {"kv_overrides": {"kvtuner.type_k.2": "q4_0"}},
    ],
    ids=str,
)
def test_a_copy_runs_what_the_original_runs(objects, how, arguments):
    one = objects(**arguments)
    two = COPIES[how](one)
    assert (two.layers, two.plan_notes) == (one.layers, one.plan_notes)
    assert answer(two, SHORT) == answer(one, SHORT)
    two.load_state(one.save_state())
    two.close()
