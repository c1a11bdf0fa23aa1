#!/usr/bin/env python3
"""Writes all that is generated in docs/: run it when a test says that a page is not current."""

from __future__ import annotations

import cli_docs
import file_map
import import_graph
import picture


def main() -> None:
    cli_docs.PAGE.write_text(cli_docs.page())
    picture.PICTURE.write_text(picture.picture(picture.PAGE.read_text()))
    file_map.PAGE.write_text(import_graph.drawn(file_map.mapped(file_map.PAGE.read_text())))


if __name__ == "__main__":
    main()
