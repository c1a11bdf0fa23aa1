"""The text of others on its way to a person: strings out of files, file names, log lines."""

from __future__ import annotations

import re

# what moves the cursor, colours, retitles the terminal, turns the line around, hides, ends a line, or has no UTF-8
_UNSAFE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff]"
)
_BYTES_OF_NAMES = range(0xDC80, 0xDD00)  # how Python holds bytes of a file name that are no UTF-8


def printable(text: object, limit: int = 1000, *, keep: str = "") -> str:
    """The text in one line and safe to show: what could act on a terminal, or cannot be encoded, stands as \\x1b or
    \\u202e.

    limit  characters at most; a longer text loses its middle
    keep   characters that stay as they are, for example "\\n\\t"
    """
    text = _UNSAFE.sub(lambda match: match[0] if match[0] in keep else _escaped(ord(match[0])), str(text))
    if len(text) > limit:
        half = (limit - 3) // 2
        text = f"{text[:half]}...{text[len(text) - half :]}"
    return text


def _escaped(code: int) -> str:
    if code in _BYTES_OF_NAMES:
        return f"\\x{code - 0xDC00:02x}"
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def json_printable(text: str) -> str:
    """JSON that says the same, and is safe to show."""
    return _UNSAFE.sub(lambda match: match[0] if match[0] == "\n" else f"\\u{ord(match[0]):04x}", text)
