"""What is done with a model that cannot do what is asked: one clear error, before any work, and never an abort of the
process."""

from __future__ import annotations

import os
import threading

import models
import numpy as np
import pytest
from click.testing import CliRunner
from gguf import GGUFValueType

from kvtuner_gguf import native
from kvtuner_gguf.calibrate import pipeline
from kvtuner_gguf.cli import main
from kvtuner_gguf.errors import NativeError

pytestmark = pytest.mark.native

N_POS = 128
NOT_CAUSAL = [("llama.attention.causal", GGUFValueType.BOOL, False)]


class WithoutVocab(models._Writer):
    def _add_vocab(self):
        self._gguf.add_tokenizer_model("no_vocab")
        self._gguf.add_uint32("llama.vocab_size", len(models.TOKENS))


@pytest.fixture
def other(request, tiny, tmp_path, monkeypatch):
    """A model of another kind than those that write text."""
    if request.param == "no_vocab":
        monkeypatch.setattr(models, "_Writer", WithoutVocab)
        return models.tiny_llama(tmp_path / "no_vocab.gguf", n_layer=1)
    if request.param == "not_causal":
        return tiny("llama", n_layer=1, extra=NOT_CAUSAL)
    return tiny(request.param)


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(pipeline, "SEARCH_CTX", 64)
    monkeypatch.chdir(tmp_path)
    text = tmp_path / "text.txt"
    text.write_bytes(np.random.default_rng(0).integers(97, 123, 6000, np.uint8).tobytes())

    def command(*args, **kwargs):
        return CliRunner().invoke(main, [str(text if a == "TEXT" else a) for a in args], **kwargs)

    return command


WORK = {
    "evaluate": ("evaluate", "--chunks", 2, "-t", 1, "-c", N_POS, "-f", "TEXT", "q8_0", "-m"),
    "calibrate": ("calibrate", "--chunks", 2, "--trials", 8, "-t", 1, "-c", N_POS, "-f", "TEXT", "-o", "x.json"),
    "chat": ("chat", "-c", N_POS, "-n", 2, "-t", 1, "-p", "hi", "-m"),
}


@pytest.mark.parametrize("command", WORK)
@pytest.mark.parametrize(
    ("other", "kind"),
    [
        ("t5", "encoder-decoder"),
        ("bert", "embeddings"),
        ("not_causal", "embeddings"),
        ("no_vocab", "without a tokenizer"),
    ],
    indirect=["other"],
)
def test_a_model_of_another_kind_is_refused_and_said_what_it_is(run, other, kind, command):
    result = run(*WORK[command], other)
    assert result.exit_code == 1 and kind in result.output and other.name in result.output, result.output
    assert result.output.startswith("Error: ")  # nothing was done before


@pytest.mark.parametrize("other", ["t5", "bert", "not_causal", "no_vocab"], indirect=True)
def test_any_model_can_be_shown(run, other):
    assert run("show", other, "-c", N_POS).exit_code == 0


def test_llama_takes_a_model_of_embeddings_for_embeddings_only(tiny):
    from kvtuner_gguf import Llama

    arguments = {"n_ctx": N_POS, "n_threads": 1, "verbose": False}
    with pytest.raises(NativeError, match="embeddings"):
        Llama(str(tiny("bert")), **arguments)
    with pytest.raises(NativeError, match="encoder-decoder"):
        Llama(str(tiny("t5")), **arguments)
    with pytest.raises(NativeError, match="learned 128 positions"):
        Llama(str(tiny("bert")), **arguments | {"n_ctx": 2 * N_POS}, embedding=True)
    llm = Llama(str(tiny("bert")), **arguments, embedding=True)
    assert np.isfinite(llm.embed("hello")).all()
    llm.close()


# learned positions, which end


def test_the_table_of_positions_is_known(load, tiny):
    assert native.n_positions(load(tiny("gpt2")).model) == N_POS
    assert native.n_positions(load(tiny("llama")).model) is None


@pytest.mark.parametrize(
    "command", [("show",), WORK["evaluate"], WORK["calibrate"][:-2], WORK["chat"]], ids=lambda c: c[0]
)
def test_a_context_beyond_the_table_is_refused_with_the_one_to_use(run, tiny, command):
    result = run(*command, tiny("gpt2"), "-c", 2 * N_POS)
    assert result.exit_code == 1 and f"has learned {N_POS} positions and no more. Use -c {N_POS}" in result.output


def test_chunks_are_as_long_as_the_table(run, tiny):
    result = run("evaluate", "-m", tiny("gpt2"), "--chunks", 3, "-t", 1, "-c", N_POS, "-f", "TEXT", "q8_0")
    assert (
        result.exit_code == 0 and f"{3 * N_POS // 2} scored positions in chunks of {N_POS} tokens" in result.output
    ), result.output


def test_a_model_with_a_table_is_calibrated_and_its_plan_runs(run, tiny, tmp_path):
    plan = tmp_path / "plan.json"
    result = run(*WORK["calibrate"][:-1], plan, tiny("gpt2"))
    assert result.exit_code == 0 and plan.exists(), result.output
    result = run(*WORK["chat"], tiny("gpt2"), "--plan", plan)
    assert result.exit_code == 0, result.output


def test_no_token_is_decoded_beyond_the_table_or_the_batch(load, tiny):
    session = load(tiny("gpt2"))
    with pytest.raises(NativeError, match="learned 128 positions"):
        session.context(N_POS + 1).__enter__()
    with session.context(N_POS) as ctx:
        assert np.isfinite(ctx.decode([(5, N_POS - 1, 0)], [True])).all()
        for rows, told in (
            ([(5, N_POS, 0)], "learned 128 positions"),
            ([], "a batch of 0 tokens"),
            ([(5, 0, 0)] * (N_POS + 1), "a batch of 129 tokens"),
        ):
            with pytest.raises(NativeError, match=told):
                ctx.decode(rows, [True] * len(rows))
        for row in ((10**6, 0, 0), (-1, 0, 0), (5, 0, 9)):
            with pytest.raises(NativeError, match="returned -1"):
                ctx.decode([row], [True])


def test_llama_ends_at_the_table_and_not_at_what_its_context_was_rounded_up_to(tiny):
    from kvtuner_gguf import Llama

    llm = Llama(str(tiny("gpt2")), n_ctx=N_POS, n_threads=1, verbose=False)
    assert llm.n_ctx() == N_POS
    tokens = [5] * (N_POS - 20)
    answer = llm.create_completion(tokens, max_tokens=10**6, temperature=0, logit_bias={models.EOS: -100.0})
    assert answer["usage"]["total_tokens"] <= N_POS
    with pytest.raises(ValueError, match="exceed context window"):
        llm.create_completion([5] * N_POS)
    llm.close()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"n_ctx": 0}, "need at least 1"),
        ({"n_ctx": 10**30}, "more than 16 times"),
        ({"n_ctx": 1024, "n_seq_max": 300}, "cannot be made"),
    ],
)
def test_a_context_of_an_odd_size_is_refused(load, tiny, arguments, told):
    with pytest.raises(NativeError, match=told):
        load(tiny("llama")).context(**arguments).__enter__()


@pytest.mark.parametrize(
    ("n_ctx", "told"),
    [
        (-1, "need at least 1"),
        (2**31, "more than 16 times"),
        (2**32 + 1, "more than 16 times"),
        (10**30, "more than 16 times"),
    ],
)
@pytest.mark.parametrize("n_gpu_layers", [0, 1])
def test_llama_and_chat_refuse_a_context_of_an_odd_size(run, tiny, n_ctx, told, n_gpu_layers):
    from kvtuner_gguf import Llama

    with pytest.raises(NativeError, match=told):
        Llama(str(tiny("llama")), n_ctx=n_ctx, n_gpu_layers=n_gpu_layers, verbose=False)
    if n_ctx > 0:
        result = run("chat", "-m", tiny("llama"), "-c", n_ctx, "-ngl", n_gpu_layers, "-p", "hi")
        assert result.exit_code == 1 and told in result.output


def test_llama_takes_the_trained_context(tiny):
    from kvtuner_gguf import Llama

    for n_ctx, n in ((0, N_POS), (N_POS, N_POS)):
        llm = Llama(str(tiny("gpt2")), n_ctx=n_ctx, n_threads=1, verbose=False)
        assert llm.n_ctx() == n
        llm.close()
    with pytest.raises(NativeError, match="512 tokens: the model has learned 128"):
        Llama(str(tiny("gpt2")), verbose=False)


# text


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with a name")
@pytest.mark.parametrize("command", ["evaluate", "calibrate"])
def test_both_commands_read_a_pipe(run, tiny, tmp_path, command):
    pipe, data = tmp_path / "pipe", b"many words in lines\n" * 800
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=(data,))
    writer.start()
    args = [pipe if a == "TEXT" else a for a in WORK[command]]
    result = run(*args[:-1], tmp_path / "x.json", tiny("gpt2")) if command == "calibrate" else run(*args, tiny("gpt2"))
    writer.join()
    assert result.exit_code == 0, result.output
