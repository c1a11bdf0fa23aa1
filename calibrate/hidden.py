"""Room for the hidden states of a text, so that runs that price a layer start with it."""

from __future__ import annotations

from pathlib import Path

from kvtuner_gguf.calibrate.records import CURE
from kvtuner_gguf.errors import CalibrationError
from kvtuner_gguf.hidden import Hidden
from kvtuner_gguf.room import reserve, write_errors
from kvtuner_gguf.runtime import Session

MOST_BYTES = 2**30  # on disk: what a large model has more of is kept after every second layer, or third


def stride_of(n_layer: int, n_tokens: int, n_embd: int) -> int:
    """Layers from one whose hidden states are kept to the next."""
    of_layer = 4 * n_tokens * n_embd
    return -(-n_layer // max(1, MOST_BYTES // of_layer))


def hidden_bytes(n_layer: int, n_tokens: int, n_embd: int) -> int:
    """What they take on disk."""
    return 4 * n_tokens * n_embd * ((n_layer - 1) // stride_of(n_layer, n_tokens, n_embd))


def hidden_of(session: Session, n_tokens: int, path: Path) -> Hidden | None:
    """For n_tokens of a text, in a file; None if the model has too few layers. Raises CalibrationError if there is no
    room."""
    sizes = (session.n_layer, n_tokens, session.n_embd)
    stride, n_bytes = stride_of(*sizes), hidden_bytes(*sizes)
    if not n_bytes:
        return None
    with write_errors(path, n_bytes, CURE, CalibrationError), open(path, "wb") as out:
        path.chmod(0o600)
        reserve(out, path.parent, n_bytes)
        out.truncate(n_bytes)
    return Hidden(path, ((session.n_layer - 1) // stride, n_tokens, session.n_embd), stride)
