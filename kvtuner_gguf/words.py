"""Text on its way into llama.cpp's tokenizer, whose regular expressions use the stack for each character of a word."""

from __future__ import annotations

import re
from itertools import pairwise

# characters of a word, or of a stretch of blanks; many tokenizers of llama.cpp overflow an 8 MB stack near 16,000
MOST = 2048
_LONG = re.compile(rf"\S{{{MOST}}}|\s{{{MOST}}}")


def cut_long_words(text: str) -> list[str]:
    """The text in parts, to be tokenized one by one, that hold no word longer than MOST: nearly always the text
    itself."""
    ends = [0, *(match.end() for match in _LONG.finditer(text)), len(text)]
    return [text[start:end] for start, end in pairwise(ends) if start < end or not text]
