"""The pages do not drift from the code: what is generated is current."""

from __future__ import annotations

from pathlib import Path

import cli_docs
import picture

ROOT = Path(__file__).resolve().parents[2]


def test_the_page_of_the_commands_is_what_help_says():
    assert cli_docs.PAGE.read_text() == cli_docs.page(), "Run tools/cli_docs.py."


def test_the_picture_shows_the_tables():
    assert picture.PICTURE.read_text() == picture.picture(picture.PAGE.read_text()), "Run tools/picture.py."
