#!/usr/bin/env python3
"""Code that stands in two places, layout and comments aside: tools/copies.py FILE..."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

from pygments.lexers import get_lexer_for_filename
from pygments.token import Comment, String

FEWEST_TOKENS, FEWEST_LINES = 50, 5  # less is grammar: a head, a call with its arguments
SILENT = (Comment.Single, Comment.Multiline, Comment.Hashbang, String.Doc)
MEANT = {  # two files, or one -> why what they say twice is meant
    frozenset({"tests/models.py"}): "each tiny model is told whole",
    frozenset({"native/ggml-cpu/kvt-attn.cpp", "native/ggml-cpu/kvt-attn-ref.cpp"}): "a reference shares no code",
    frozenset({"tests/native/test_tap.py", "calibrate/capture.py"}): "a test copies what it checks the copies with",
}

Token = tuple[str, int]
"""What is said, and in which line."""


def tokens(path: str) -> list[Token]:
    found, line = [], 1
    for kind, text in get_lexer_for_filename(path, stripnl=False).get_tokens(Path(path).read_text()):
        if text.strip() and not any(kind in silent for silent in SILENT):
            found.append((text.strip(), line))
        line += text.count("\n")
    return found


def copies(paths: Iterable[str]) -> list[str]:
    """ "a.py:10-20 is like b.py:30-40" for each two places that say the same."""
    said: dict[str, list[Token]] = {}
    places: dict[int, list[tuple[str, int]]] = {}  # hash of a row of tokens -> where it begins: file, token
    found = []
    for path in paths:
        said[path] = tokens(path)
        runs: dict[tuple[str, int, int], int] = {}  # file, token there, token here, where a copy begins -> its last row
        going: dict[tuple[str, int], tuple[str, int, int]] = {}  # file, the row there that would go on -> a copy
        for i in range(len(said[path]) - FEWEST_TOKENS + 1):
            row = hash(tuple(text for text, _ in said[path][i : i + FEWEST_TOKENS]))
            apart = [(of, j) for of, j in places.setdefault(row, []) if of != path or j + FEWEST_TOKENS <= i]
            going = {(of, j + 1): going.get((of, j), (of, j, i)) for of, j in apart}
            runs |= dict.fromkeys(going.values(), i)
            places[row].append((path, i))
        found += [
            (path, _lines(said[path], i, last), of, _lines(said[of], j, j + last - i))
            for (of, j, i), last in runs.items()
        ]
    return [
        f"{path}:{here.start}-{here.stop} is like {of}:{there.start}-{there.stop}"
        for path, here, of, there in found
        if min(len(here), len(there)) + 1 >= FEWEST_LINES and frozenset((path, of)) not in MEANT
    ]


def _lines(said: list[Token], first: int, last: int) -> range:
    """From the first line to the last one, of the rows that begin at the tokens first to last."""
    return range(said[first][1], said[last + FEWEST_TOKENS - 1][1])


if __name__ == "__main__":
    found = copies(sys.argv[1:])
    print(*found, sep="\n")
    sys.exit(bool(found))
