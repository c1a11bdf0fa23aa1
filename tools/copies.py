#!/usr/bin/env python3
"""Code that stands in two places, with names and constants taken as alike: tools/copies.py FILE... By lizard."""

from __future__ import annotations

import sys
from itertools import combinations

import lizard
from lizard_ext.lizardduplicate import CodeSnippet, LizardExtension
from lizard_languages.clike import CLikeReader

FEWEST_TOKENS, FEWEST_LINES = 50, 5  # less is grammar: a table's rows, a call's arguments
MEANT = {  # two files -> why code in both is alike
}


def copies(paths: list[str]) -> list[tuple[CodeSnippet, CodeSnippet]]:
    CLikeReader.ext = [*CLikeReader.ext, "cu", "cuh"]
    finder = LizardExtension()
    list(lizard.analyze_files(paths, exts=[*lizard.get_extensions([]), finder]))
    pairs = (pair for found in finder.get_duplicates(FEWEST_TOKENS) for pair in combinations(found, 2))
    return [pair for pair in pairs if _counts(*pair)]


def _counts(a: CodeSnippet, b: CodeSnippet) -> bool:
    apart = a.file_name != b.file_name or a.end_line < b.start_line or b.end_line < a.start_line
    long = min(a.end_line - a.start_line, b.end_line - b.start_line) + 1 >= FEWEST_LINES
    return apart and long and frozenset((a.file_name, b.file_name)) not in MEANT


if __name__ == "__main__":
    found = copies(sys.argv[1:])
    for a, b in found:
        print(f"{a.file_name}:{a.start_line}-{a.end_line} is like {b.file_name}:{b.start_line}-{b.end_line}")
    sys.exit(bool(found))
