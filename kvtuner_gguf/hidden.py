"""Hidden states between layers: kept in one run, taken in runs that differ from it in later layers alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from . import native
from .errors import NativeError


class Hidden:
    """The hidden states of a text's tokens after every stride-th layer; for a Context to watch, as a Tap is.

    path   file of (n_slot, n_tokens, n_embd) float32, written by a run after keep(); slot i: after layer
           (i + 1) * stride - 1
    shape  of it
    Runs are of the same tokens in the same batches, one Context after the other.
    """

    def __init__(self, path: Path, shape: tuple[int, int, int], stride: int) -> None:
        self.eval_callback = native.eval_callback("kvt_hidden_eval")
        self.path, (n_slot, n_rows, n_embd) = path, shape
        self._n_taken = n_rows
        self._rows: np.ndarray | None = np.memmap(path, np.float32, "r+", shape=shape)
        self.handle = native.library().kvt_hidden_new(self._rows.ctypes.data, n_slot, stride, n_rows, n_embd)
        if not self.handle:
            raise NativeError(native.last_error())

    def keep(self) -> None:
        """The next run keeps its hidden states."""
        native.library().kvt_hidden_keep(self.handle)

    def start(self, il: int, tokens: range) -> int:
        """The next run, of these tokens of the text, starts with layer il, or one before it: the one returned, 0 where
        nothing was kept. For a run that is the same as the kept one in all layers before il. A model whose later layers
        read more of the earlier ones than that is run whole."""
        self._n_taken = len(tokens)
        return native.check(native.library().kvt_hidden_start(self.handle, il, tokens.start))

    def check(self) -> None:
        """After a run that started so. Raises NativeError unless it took the hidden states of all its tokens, or of
        none."""
        taken = self.taken
        if taken not in (0, self._n_taken):
            raise NativeError(
                f"a run took {taken} rows of hidden states, need {self._n_taken}: of other tokens than kept."
            )

    @property
    def taken(self) -> int:
        """Tokens whose hidden states the last run took."""
        return int(native.library().kvt_hidden_taken(self.handle))

    def close(self) -> None:
        native.library().kvt_hidden_free(self.handle)
        self.handle = self._rows = None
