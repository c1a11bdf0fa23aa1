"""A text file of the user's -> its documents, from the front and from the back, read no further than they are
needed."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from kvtuner_gguf.cache import scratch
from kvtuner_gguf.calibrate.records import CURE
from kvtuner_gguf.errors import CalibrationError
from kvtuner_gguf.reading import sha256_of
from kvtuner_gguf.room import write_errors

PIECE = 1 << 16  # bytes that are looked at at once; a document of JSON Lines may be longer
BOM = b"\xef\xbb\xbf"
JSON_LINES = (".jsonl", ".ndjson")
NEED = 'need a JSON object with a "text", or with "messages"'


_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Document:
    """One text, or the messages of one conversation: {"role": ..., "content": ...} each."""

    text: str = ""
    messages: tuple[dict[str, Any], ...] = ()

    @property
    def characters(self) -> str:
        """All that stands in it."""
        return self.text or json.dumps(self.messages, ensure_ascii=False)


@dataclass(frozen=True)
class Piece:
    """Some documents that stand together in the file; is_first: at its start."""

    documents: tuple[Document, ...]
    is_first: bool


@contextmanager
def readable(path: Path | None) -> Iterator[Path | None]:
    """The path of a file that can be read from both ends, and twice: a pipe is copied into one. None stays None.

    Raises CalibrationError for what is no file and no pipe.
    """
    if path is None:
        yield None
        return
    with _blamed(path):
        kind = path.stat().st_mode
    if stat.S_ISREG(kind):
        yield path
    elif stat.S_ISFIFO(kind):
        with scratch() as folder:
            yield _copied(path, folder)
    else:
        raise CalibrationError(
            f"text '{path}': is {'a folder' if stat.S_ISDIR(kind) else 'a device'}, need a text file or a pipe."
        )


def file_sha256(path: Path) -> str:
    """Raises CalibrationError if the file cannot be read."""
    with _blamed(path):
        return sha256_of(path)


def _copied(pipe: Path, folder: Path) -> Path:
    """What comes out of a pipe, in a file of its name. A pipe that a shell made has none: JSON objects are told by
    their brace."""
    with _blamed(pipe):
        whole = folder / "text"
        with write_errors(whole, 0, CURE, CalibrationError), pipe.open("rb") as source, whole.open("wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)
        with whole.open("rb") as file:
            braced = file.read(4096).removeprefix(BOM).lstrip().startswith(b"{")
        name = pipe.name if not pipe.name.isdigit() else "pipe"
        return whole.rename(folder / (f"{name}.jsonl" if braced and not pipe.suffix else name))


@contextmanager
def _blamed(path: Path) -> Iterator[None]:
    """Turns an OSError of the block into a CalibrationError that names the text."""
    try:
        yield
    except OSError as error:
        raise CalibrationError(
            f"text '{path}' cannot be read ({error.strerror}). Check the path given with -f."
        ) from None


class Corpus:
    """A text file, read in pieces that end where a document or a line does.

    A file whose name ends in .jsonl or .ndjson holds a JSON object with a "text" or with "messages" in each line; any
    other is one text. Pieces from the front and pieces from the back never meet.

    n_lines    JSON lines read so far
    n_skipped  of them without a text: null or empty
    Raises CalibrationError for what is no UTF-8, or no such JSON, with the file and the line.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.is_json = path, path.suffix.lower() in JSON_LINES
        self.n_lines = self.n_skipped = 0
        with _blamed(path):
            self._file: BinaryIO = path.open("rb")
            self._end = os.fstat(self._file.fileno()).st_size
            self._first = self._start = len(BOM) if self._file.read(len(BOM)) == BOM else 0

    def __enter__(self) -> Corpus:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def front(self) -> Iterator[Piece]:
        """The documents that were not read yet, a piece at a time, from the first on."""
        while (start := self._start) < self._end:
            data = self._cut_off(lambda size: (start, min(start + size, self._end)), self._n_front)
            self._start += len(data)
            yield Piece(self._documents(data, start), start == self._first)

    def back(self) -> Iterator[Piece]:
        """The documents that were not read yet, a piece at a time, the last piece first; within it they stand in
        order."""
        while self._start < (end := self._end):
            data = self._cut_off(lambda size: (max(end - size, self._start), end), self._n_back)
            self._end -= len(data)
            yield Piece(self._documents(data, self._end), self._end == self._first)

    def _cut_off(self, span: Callable[[int], tuple[int, int]], n_cut: Callable[[bytes], int]) -> bytes:
        """A piece of the file. span(size): where to look, for larger and larger sizes until there is a place to cut.

        n_cut(block): bytes of the block that are a piece, from its front; from its back if negative; 0 = more is needed
        """
        size = PIECE
        while True:
            first, last = span(size)
            with _blamed(self.path):
                self._file.seek(first)
                block = self._file.read(last - first)
            if len(block) < last - first:
                raise CalibrationError(f"text '{self.path}': became shorter while it was read. Start again.")
            n = n_cut(block) if last - first < self._end - self._start else len(block)
            if n:
                return block[:n] if n > 0 else block[n:]
            size *= 2

    def _n_front(self, block: bytes) -> int:
        n = block.rfind(b"\n") + 1
        if n or self.is_json:
            return n
        n = block.rfind(b" ")
        return n if n > 0 else _char_start(block, len(block) - 1, -1)

    def _n_back(self, block: bytes) -> int:
        at = block.find(b"\n", 0, -1) + 1
        if not (at or self.is_json):
            at = block.find(b" ", 1)
            at = at if at > 0 else _char_start(block, 1, 1)
        return at - len(block) if at else 0

    def _documents(self, data: bytes, offset: int) -> tuple[Document, ...]:
        if not self.is_json:
            return (Document(self._text(data, offset)),)
        documents: list[Document] = []
        for line in data.split(b"\n"):
            if line.strip():
                documents += self._document(line, offset)
            offset += len(line) + 1
        return tuple(documents)

    def _text(self, data: bytes, offset: int) -> str:
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self._fault(
                offset + error.start, f"byte 0x{data[error.start]:02x} is no UTF-8. Convert the text to UTF-8."
            ) from None
        if "\0" in text:
            raise self._fault(
                offset + data.index(b"\0"), "a NUL byte, need text. Convert it to UTF-8, or give another file."
            )
        return text

    def _document(self, line: bytes, offset: int) -> list[Document]:
        """The document of a line; none if its text is null or empty."""
        try:
            row = json.loads(self._text(line, offset))
        except (ValueError, RecursionError) as error:
            raise self._fault(offset, f"not JSON ({error}), {NEED}.") from None
        if not isinstance(row, dict) or not ("text" in row or "messages" in row):
            raise self._fault(offset, f"got {_kind(row)}, {NEED}.")
        row = {"messages": [], "text": ""} | {key: value for key, value in row.items() if value is not None}
        messages, text = row["messages"], row["text"]
        if not isinstance(messages, list) or not all(map(_is_message, messages)):
            raise self._fault(
                offset, '"messages" is no list of objects with a "role" and a "content" that are strings.'
            )
        if not isinstance(text, str):
            raise self._fault(offset, f'"text" is {_kind(text)}, need a string.')
        document = (
            Document(messages=tuple({**m, "content": m.get("content") or ""} for m in messages))
            if messages
            else Document(text)
        )
        if _SURROGATE.search(document.characters):
            raise self._fault(offset, "half a surrogate pair (\\ud800 to \\udfff) is no character. Remove it.")
        self.n_lines += 1
        self.n_skipped += not (text or messages)
        return [document] if text or messages else []

    def _fault(self, offset: int, what: str) -> CalibrationError:
        """An error that names the line at a place of the file."""
        number, left = 1, offset
        self._file.seek(0)
        while left > 0 and (block := self._file.read(min(left, 1 << 20))):
            number, left = number + block.count(b"\n"), left - len(block)
        return CalibrationError(f"text '{self.path}', line {number}: {what}")


def _char_start(block: bytes, at: int, step: int) -> int:
    """The nearest place from `at` where a UTF-8 character starts."""
    while 0 < at < len(block) and block[at] & 0xC0 == 0x80:
        at += step
    return at


def _is_message(message: object) -> bool:
    return (
        isinstance(message, dict)
        and isinstance(message.get("role"), str)
        and isinstance(message.get("content") or "", str)
    )


def _kind(value: object) -> str:
    names = {dict: "an object with neither", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
