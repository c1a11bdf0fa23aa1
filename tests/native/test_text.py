"""Text of a file as tokens: which part is which, what is read of a long file, and conversations in the model's own
template."""

from __future__ import annotations

import json
import subprocess
import sys

import models
import numpy as np
import pytest
from gguf import GGUFValueType
from models import BOS, EOS, FIRST_BYTE

from kvtuner_gguf.calibrate import corpus
from kvtuner_gguf.calibrate.text import read_text
from kvtuner_gguf.errors import CalibrationError

pytestmark = pytest.mark.native

PLAIN = "{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ eos_token }}{% endfor %}"
NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + PLAIN
)


def spelled(text: str) -> list[int]:
    """The tokens of ASCII text, without a BOS."""
    return [FIRST_BYTE + 256 if c == " " else FIRST_BYTE + ord(c) for c in text]


def with_template(tiny, template: str):
    return tiny("llama", n_layer=1, extra=[("tokenizer.chat_template", GGUFValueType.STRING, template)])


@pytest.fixture
def rows(tmp_path):
    def write(*items):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(item) + "\n" for item in items))
        return path

    return write


def test_the_two_parts_are_the_first_and_the_last_tokens(load, tiny, tmp_path):
    session, path = load(tiny("llama", n_layer=1)), tmp_path / "text.txt"
    path.write_text("some words and lines\n" * 40)
    whole = session.tokenize(path.read_text())
    text = read_text(session, path, 300, 400)
    assert text.calibration.tolist() == whole[:300] and text.heldout.tolist() == whole[-400:]
    assert read_text(session, path, 0, len(whole)).heldout.tolist() == whole
    with pytest.raises(CalibrationError, match=f"has {len(whole)} tokens, need 901"):
        read_text(session, path, 501, 400)


def test_documents_are_parted_by_an_empty_line_wherever_the_file_is_cut(load, tiny, rows, monkeypatch):
    session, texts = load(tiny("llama", n_layer=1)), [f"text number {i}" for i in range(50)]
    path, whole = rows(*({"text": t} for t in texts)), [BOS, *spelled("\n\n".join(texts))]
    for piece in (1, 100, 1 << 16):
        monkeypatch.setattr(corpus, "PIECE", piece)
        text = read_text(session, path, 150, 200)
        assert text.calibration.tolist() == whole[:150] and text.heldout.tolist() == whole[-200:]


def test_of_a_long_file_little_is_tokenized(load, tiny, tmp_path, monkeypatch):
    session, path, seen = load(tiny("llama", n_layer=1)), tmp_path / "long.txt", []
    path.write_text("some words and lines\n" * 400_000)
    tokenize = session.tokenize
    monkeypatch.setattr(session, "tokenize", lambda text, **kwargs: seen.append(len(text)) or tokenize(text, **kwargs))
    read_text(session, path, 1000, 1000)
    assert sum(seen) <= 2 * corpus.PIECE < path.stat().st_size // 50


def test_conversations_are_in_the_models_template_and_its_special_tokens_are_special(load, tiny, rows):
    session = load(with_template(tiny, PLAIN))
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    text = read_text(session, rows({"messages": chat}, {"text": "<s>no</s>"}), 0, 32)
    expected = [BOS, *spelled("user: hi"), EOS, *spelled("assistant: ho"), EOS, *spelled("\n\n<s>no</s>")]
    assert text.heldout.tolist() == expected[-32:]


def test_a_system_message_that_the_template_refuses_is_folded(load, tiny, rows):
    session = load(with_template(tiny, NO_SYSTEM))
    chat = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    expected = [BOS, *spelled("user: be brief\n\nhi"), EOS]
    assert read_text(session, rows({"messages": chat}), 0, len(expected)).heldout.tolist() == expected


@pytest.mark.parametrize(
    ("template", "told"),
    [
        (None, "has no chat template"),
        ("{% for %}", "chat template fails .TemplateSyntaxError"),
        ("{{ messages[9]['content'] + 1 }}", "chat template fails .UndefinedError"),
        ("{{ 1 // 0 }}", "chat template fails .ZeroDivisionError"),
        ("{{ raise_exception('roles must alternate') }}", "chat template fails .ValueError: roles must alternate"),
    ],
)
def test_a_template_that_cannot_is_named(load, tiny, rows, template, told):
    session = load(with_template(tiny, template) if template else tiny("llama", n_layer=1))
    with pytest.raises(CalibrationError, match=told) as error:
        read_text(session, rows({"messages": [{"role": "user", "content": "hi"}]}), 0, 4)
    assert "rows.jsonl" in str(error.value)


def test_what_is_left_out_is_said(load, tiny, rows):
    told = []
    read_text(
        load(tiny("llama", n_layer=1)), rows({"text": "a" * 100}, {"text": None}, {"text": ""}), 0, 20, told.append
    )
    assert told == ["text 'rows.jsonl': 2 of the 3 lines read have a null or empty text and are left out."]


def test_a_text_whose_words_never_end_is_read(load, tiny, tmp_path):
    path = tmp_path / "endless.txt"
    path.write_bytes(b"a" * 300_000)
    text = read_text(load(tiny("llama", n_layer=1)), path, 100, 100)
    assert np.array_equal(text.heldout, spelled("a" * 100))


class BpeWriter(models._Writer):
    """A byte-level vocabulary whose words are found by std::regex, as most of llama.cpp's are."""

    def _add_vocab(self):
        plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
        letters = [chr(b) for b in plain] + [chr(256 + i) for i in range(256 - len(plain))]
        self._gguf.add_tokenizer_model("gpt2")
        self._gguf.add_tokenizer_pre("gpt-4o")
        self._gguf.add_token_list([*letters, "<|end|>", "aa", *(f"[{i}]" for i in range(len(models.TOKENS) - 258))])
        self._gguf.add_token_types([1] * 256 + [3] + [1] * (len(models.TOKENS) - 257))
        self._gguf.add_token_merges(["a a"])
        self._gguf.add_eos_token_id(256)


TOKENIZE = """
import sys
from kvtuner_gguf import Llama
from kvtuner_gguf.runtime import Session
text = "a" * 100_000 + " " * 100_000 + "."
with Session(sys.argv[1], no_alloc=True) as session:
    tokens = session.tokenize(text)
    assert len(tokens) == 150_001, len(tokens)
llm = Llama(sys.argv[1], n_ctx=256, n_threads=1, verbose=False)
assert llm.tokenize(text.encode(), add_bos=False) == tokens
assert llm.detokenize(tokens).decode() == text
llm.close()
"""


def test_long_words_do_not_overflow_the_stack_of_a_tokenizer(tmp_path, monkeypatch):
    monkeypatch.setattr(models, "_Writer", BpeWriter)
    model = models.tiny_llama(tmp_path / "bpe.gguf", n_layer=1)
    run = subprocess.run([sys.executable, "-c", TOKENIZE, str(model)], capture_output=True, text=True)
    assert run.returncode == 0, (run.returncode, run.stderr[-1000:])  # -11: the stack ended
