"""Records on disk: written whole, sealed with a hash, and read back as they were written or not at all."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from kvtuner_gguf.atomic import atomic_file
from kvtuner_gguf.errors import CalibrationError
from kvtuner_gguf.reading import is_regular
from kvtuner_gguf.room import write_errors

CURE = "Make room there, or set XDG_CACHE_HOME to a folder elsewhere."
_SEAL_BYTES = 32
_LINE_SEAL = 16  # hex digits


def write_record(path: Path, data: bytes) -> None:
    """Write a file in one step, for its owner alone. Raises CalibrationError if it cannot be written."""
    with write_errors(path, len(data), CURE, CalibrationError):
        _make_place(path)
        with atomic_file(path, private=True) as out:
            out.write(data)


def save_json(path: Path, record: str, data: dict[str, Any]) -> None:
    """Write a record as JSON, with its name and its seal."""
    body = {"record": record, **data}
    write_record(path, (_dumped({**body, "sha256": _seal_of_json(body)}) + "\n").encode())


def load_json(path: Path, record: str, make: Callable[[dict[str, Any]], Any]) -> Any:
    """The record in a file, made from its data. Raises CalibrationError if that is not what it holds, or not as it was
    written."""
    data = _read(path, record)
    try:
        body = json.loads(data)
        found, seal = body["record"], body.pop("sha256", None)
        if found != record:
            raise CalibrationError(f"{path}: holds {found}, need {record}. Give the file of the stage before.")
        if seal != _seal_of_json(body):
            raise CalibrationError(f"{path}: damaged (its seal is broken), need {record}. Run the stage before again.")
        return make(body)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CalibrationError(f"{path}: damaged ({error!r}), need {record}. Run the stage before again.") from None


def save_arrays(path: Path, **arrays: Any) -> None:
    """Write arrays as .npz, with the seal after it."""
    file = io.BytesIO()
    np.savez(file, **arrays)
    data = file.getvalue()
    write_record(path, data + hashlib.sha256(data).digest())


def load_arrays(path: Path) -> dict[str, np.ndarray]:
    """What `save_arrays` wrote. Raises CalibrationError if the file is not there, or not as it was written."""
    data = _read(path, "arrays")
    data, seal = data[:-_SEAL_BYTES], data[-_SEAL_BYTES:]
    if hashlib.sha256(data).digest() != seal:
        raise CalibrationError(f"{path}: damaged (its seal is broken), need arrays. Run the stage before again.")
    with np.load(io.BytesIO(data), allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def append_line(path: Path, value: dict[str, Any]) -> None:
    """Add a sealed line of JSON, after the end of one that was cut. Raises CalibrationError if it cannot be written."""
    line = json.dumps({**value, "seal": _seal_of_line(value)}) + "\n"
    with write_errors(path, len(line), CURE, CalibrationError):
        _make_place(path)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0), 0o600)
        with open(fd, "r+b") as file:
            cut = False
            if file.seek(0, os.SEEK_END):
                file.seek(-1, os.SEEK_END)
                cut = file.read(1) != b"\n"
            file.write(b"\n" * cut + line.encode())
            file.flush()
            os.fsync(fd)


def _make_place(path: Path) -> None:
    """The folder of a record, and nothing but a file in the record's place."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif path.is_symlink() or (path.exists() and not path.is_file()):
        path.unlink()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The values of `append_line`, in order; lines that are not as they were written are left out. [] if there is no
    file."""
    lines = (read_bytes(path) or b"").split(b"\n")
    return [value for line in lines if (value := _value_of(line)) is not None]


def read_bytes(path: Path) -> bytes | None:
    """What a file holds; None if none is there, or it cannot be read."""
    try:
        return path.read_bytes() if is_regular(path) else None
    except OSError:
        return None


def _value_of(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
        seal = value.pop("seal")
        return value if seal == _seal_of_line(value) else None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _seal_of_line(value: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:_LINE_SEAL]


def _seal_of_json(body: dict[str, Any]) -> str:
    return hashlib.sha256(_dumped(body).encode()).hexdigest()


def _dumped(body: dict[str, Any]) -> str:
    return json.dumps(body, indent=1, allow_nan=False)


def _read(path: Path, record: str) -> bytes:
    data = read_bytes(path)
    if data is None:
        raise CalibrationError(f"{path}: there is no such file, need {record} that can be read. Run the stage before.")
    return data
