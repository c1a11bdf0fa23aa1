"""Words without end: llama.cpp's tokenizers use the stack for each of their characters."""

from __future__ import annotations

import re

import pytest

from kvtuner_gguf.words import MOST, cut_long_words


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "a few words\nand lines",
        "a" * (3 * MOST + 1),
        " " * (2 * MOST),
        ("漢" * MOST + "\n") * 3,
        "x" + "a " * MOST,
    ],
)
def test_a_text_is_cut_within_long_words_only(text):
    parts = cut_long_words(text)
    assert "".join(parts) == text and parts
    assert all(len(run) <= MOST for part in parts for run in re.findall(r"\S+|\s+", part))
    assert len(parts) <= 1 + len(text) // MOST


def test_natural_text_stays_whole():
    text = "A text of many words. " * 10000
    assert cut_long_words(text) == [text]
