"""A conversation in a file: its tokens and the cells that hold them, without logits."""

from __future__ import annotations

import io
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .atomic import atomic_file
from .errors import StateError
from .reading import is_regular
from .room import write_errors

_FORMAT = 1
_CURE = "Make room there, or give another path."


@dataclass(frozen=True)
class SavedSession:
    """What a context has read.

    identity  of the weights and all that K and V are computed with
    tokens    (n,) int32, in their order
    n_read    how many of them, from the start on, were read as tokens; an image is not
    cells     as llama.cpp writes those of a sequence
    about     what the program that saved it keeps with it
    """

    identity: str
    tokens: np.ndarray
    n_read: int
    cells: bytes
    about: str = ""


def save_session(path: Path, session: SavedSession) -> None:
    """Write it as .npz, whatever the path's suffix, in one step and for its owner alone. Raises StateError if it cannot
    be written; what stood there stays."""
    file = io.BytesIO()
    cells = np.frombuffer(session.cells, np.uint8)
    np.savez(file, format=_FORMAT, **{**vars(session), "cells": cells})
    data = file.getbuffer()
    with write_errors(path, len(data), _CURE, StateError), atomic_file(path, private=True) as out:
        out.write(data)


def load_session(path: Path) -> SavedSession:
    """What `save_session` wrote. Raises StateError if the file cannot be read, holds something else, or is damaged."""
    try:
        data = path.read_bytes() if is_regular(path) else None
    except OSError as error:
        raise StateError(f"session '{path}': cannot be read ({error.strerror}). Check the path.") from None
    try:
        with np.load(io.BytesIO(data or b""), allow_pickle=False) as file:
            if int(file["format"]) != _FORMAT:
                raise StateError(f"session '{path}': is of another version of kvtuner-gguf. Give the prompt again.")
            tokens = file["tokens"].astype(np.int32, casting="same_kind")
            identity, about = str(file["identity"]), str(file["about"])
            found = SavedSession(identity, tokens, int(file["n_read"]), file["cells"].tobytes(), about)
    except (ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise StateError(f"session '{path}': is none, or is damaged ({error}). Give the prompt again.") from None
    if found.tokens.ndim != 1 or not 0 <= found.n_read <= len(found.tokens):
        raise StateError(f"session '{path}': is damaged. Give the prompt again.")
    return found
