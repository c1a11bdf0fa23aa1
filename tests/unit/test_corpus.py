"""A user's text: which documents it holds, where it may be cut, and what is told of a line that is wrong."""

from __future__ import annotations

import json
import os
import random
import threading
from pathlib import Path

import pytest

from kvtuner_gguf.calibrate import corpus
from kvtuner_gguf.calibrate.corpus import Corpus, Document, file_sha256, readable
from kvtuner_gguf.errors import CalibrationError


def write(folder: Path, data: bytes, name: str = "text.jsonl") -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


def documents(path: Path) -> list[Document]:
    with Corpus(path) as text:
        return [d for piece in text.front() for d in piece.documents]


def rows(*texts: object, end: str = "\n") -> bytes:
    return "".join(json.dumps({"text": text}, ensure_ascii=False) + end for text in texts).encode()


@pytest.mark.parametrize("inside", ["\u2028", "\u2029", "\x85", "\x7f", "\\n \\r\\n \\f \\u0000 \\u2028"])
def test_only_a_line_feed_ends_a_row(tmp_path, inside):
    escaped = inside.startswith("\\")
    line = '{"text": "before ' + inside + ' after"}\n{"text": "next"}\n'
    expected = json.loads(f'"{inside}"') if escaped else inside
    assert documents(write(tmp_path, line.encode())) == [Document(f"before {expected} after"), Document("next")]


def test_a_mark_of_byte_order_and_carriage_returns_are_no_part_of_a_row(tmp_path):
    path = write(tmp_path, b"\xef\xbb\xbf" + rows("a", "b", end="\r\n") + b"\r\n\r\n" + rows("c").rstrip())
    assert documents(path) == [Document("a"), Document("b"), Document("c")]
    assert documents(write(tmp_path, b"\xef\xbb\xbfplain\r\n", "x.txt")) == [Document("plain\r\n")]


def test_null_and_empty_texts_are_left_out_and_counted(tmp_path):
    with Corpus(write(tmp_path, rows("a", None, "", "b") + b'{"text": null, "messages": null}\n')) as text:
        assert [d.text for piece in text.front() for d in piece.documents] == ["a", "b"]
        assert (text.n_lines, text.n_skipped) == (5, 3)


def test_conversations_are_read_as_such(tmp_path):
    line = {
        "messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": None, "tool_calls": []}],
        "text": "hi",
    }
    (document,) = documents(write(tmp_path, json.dumps(line).encode()))
    assert document.messages == (
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "", "tool_calls": []},
    )


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (b'{"text": 5}', '"text" is a number, need a string'),
        (b'{"text": 0}', '"text" is a number'),
        (b'{"text": false}', '"text" is true or false'),
        (b'{"text": ["a"]}', '"text" is a list'),
        (b'{"txt": "a"}', "got an object with neither, need a JSON object"),
        (b'["a"]', "got a list"),
        (b"null", "got null"),
        (b'{"text": "a"', "not JSON"),
        (b"[" * 100000, "not JSON"),
        (b'{"text": ' + b"9" * 5000 + b"}", "not JSON"),
        (b'{"text": "cut emoji \\ud83d"}', "half a surrogate pair"),
        (b'{"messages": [{"role": "user", "content": "\\ude00"}]}', "half a surrogate pair"),
        (b'{"messages": {"role": "user"}}', '"messages" is no list'),
        (b'{"messages": ["hi"]}', '"messages" is no list of objects'),
        (b'{"messages": [{"role": 1, "content": "a"}]}', '"messages" is no list of objects'),
        (b'{"text": "caf\xe9"}', "byte 0xe9 is no UTF-8"),
        (b'{"text": "a\x00"}', "a NUL byte"),
    ],
)
@pytest.mark.parametrize("blanks", [0, 3])
def test_a_wrong_row_is_named_by_file_and_line(tmp_path, line, told, blanks):
    path = write(tmp_path, rows("\u2028 ok") + b" \n" * blanks + line + b"\n" + rows("ok"))
    with pytest.raises(CalibrationError) as error:
        documents(path)
    assert f"text '{path}', line {2 + blanks}: " in str(error.value) and told in str(error.value)


def test_a_plain_text_that_is_none_is_named_by_its_line(tmp_path):
    with pytest.raises(CalibrationError, match="line 3: byte 0xff is no UTF-8"):
        documents(write(tmp_path, b"a\nb\n\xff", "x.txt"))
    with pytest.raises(CalibrationError, match="line 2: a NUL byte"):
        documents(write(tmp_path, b"a\n\0\0", "x.txt"))


@pytest.mark.parametrize("seed", range(20))
def test_pieces_from_both_ends_hold_each_document_once_and_whole(tmp_path, monkeypatch, seed):
    rng = random.Random(seed)
    monkeypatch.setattr(corpus, "PIECE", rng.choice([1, 7, 64, 300]))
    texts = ["".join(rng.choice("aé漢😀 ") for _ in range(rng.randrange(1, 80))) for _ in range(rng.randrange(1, 40))]
    path = write(tmp_path, rows(*texts, end=rng.choice(["\n", "\r\n", "\n\n"])))
    with Corpus(path) as text:
        front = []
        for piece in text.front():
            front.append(piece)
            if rng.random() < 0.3:
                break
        back = list(text.back())
        assert not list(text.front())
    pieces = front + back[::-1]
    assert [d.text for piece in pieces for d in piece.documents] == texts
    assert [piece.is_first for piece in pieces] == [True] + [False] * (len(pieces) - 1)


def cut_texts(folder: Path, whole: str) -> list[str]:
    """The documents that a plain text is cut into, more than five, which are all of it."""
    with Corpus(write(folder, whole.encode(), "x.txt")) as text:
        first = next(text.front())
        pieces = [first, *list(text.back())[::-1]]
    texts = [d.text for piece in pieces for d in piece.documents]
    assert "".join(texts) == whole and len(texts) > 5
    return texts


@pytest.mark.parametrize("seed", range(20))
def test_plain_text_is_cut_at_a_line_a_blank_or_a_character(tmp_path, monkeypatch, seed):
    rng = random.Random(seed)
    monkeypatch.setattr(corpus, "PIECE", rng.choice([16, 50]))
    letters = rng.choice(["aé漢😀", "aé漢😀 "])
    whole = "".join(rng.choice(letters) for _ in range(500))
    cut_texts(tmp_path, whole)


def test_plain_text_with_lines_is_cut_after_one(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "PIECE", 100)
    whole = "".join(f"line {i} of it\n" for i in range(200))
    assert all(t.endswith("\n") for t in cut_texts(tmp_path, whole))


def test_of_a_long_text_only_the_ends_are_read(tmp_path, monkeypatch):
    path = write(tmp_path, rows("first") * 20000 + b"no JSON at all\n" + rows("last") * 20000)
    with Corpus(path) as text:
        assert next(text.front()).documents[0] == Document("first")
        assert next(text.back()).documents[-1] == Document("last")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with a name")
@pytest.mark.parametrize(
    ("name", "data", "is_json"),
    [("p", rows("a"), True), ("p.txt", rows("a"), False), ("p.jsonl", rows("a"), True), ("p", b"plain", False)],
)
def test_a_pipe_is_read_once_and_then_as_a_file(tmp_path, name, data, is_json):
    pipe = tmp_path / name
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=(data,))
    writer.start()
    with readable(pipe) as path:
        writer.join()
        assert file_sha256(path) == file_sha256(write(tmp_path, data, "same")) and path.name.startswith("p")
        with Corpus(path) as text:
            assert text.is_json == is_json
            assert [d.text for piece in text.front() for d in piece.documents] == ["a" if is_json else data.decode()]
    assert not path.exists()


def test_what_is_no_text_is_refused(tmp_path):
    for path, told in (
        (tmp_path, "is a folder"),
        (tmp_path / "none", "none' cannot be read .* -f"),
        (Path(os.devnull), "is a device"),
    ):
        with pytest.raises(CalibrationError, match=told), readable(path):
            pass
    with readable(None) as path:
        assert path is None
