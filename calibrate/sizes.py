"""How much text the stages of one calibration work on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Sizes:
    """Chunks, and their tokens.

    n_chunk      pieces of text, which all stages scale with
    stream       tokens of a captured and of a held-out chunk, and of a text that the model writes
    search_ctx   tokens of a chunk that plans are tried on
    search_skip  of them not scored
    """

    n_chunk: int
    stream: int
    search_ctx: int
    search_skip: int

    def fitting(self, fit: Callable[[int], int]) -> Sizes:
        """The same for a model that can read fit(n) of n tokens."""
        stream = fit(self.stream)
        search_ctx = min(self.search_ctx, stream // 2)
        return replace(self, stream=stream, search_ctx=search_ctx, search_skip=min(self.search_skip, search_ctx // 4))

    @property
    def n_calibration(self) -> int:
        return self.n_captured * self.stream + self.n_searched * self.search_ctx

    @property
    def n_heldout(self) -> int:
        return self.n_chunk * self.stream * 3 // 2

    @property
    def n_captured(self) -> int:
        """Chunks that are captured: K's vectors need many tokens, a basis of large heads above all."""
        return self.n_chunk

    @property
    def n_errors(self) -> int:
        """Chunks of these whose errors are measured."""
        return max(1, self.n_chunk // 2)

    @property
    def n_searched(self) -> int:
        """Chunks that plans are tried on, which no vector of K was made from."""
        return max(1, self.n_chunk * 3 // 4)

    @property
    def n_scored(self) -> int:
        """Positions of the larger of the two references."""
        heldout = self.n_heldout // self.stream * (self.stream - self.stream // 2)
        return max(self.n_searched * (self.search_ctx - self.search_skip), heldout)
