"""How much text the stages of one calibration work on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Sizes:
    """Chunks, and their tokens.

    n_chunk       pieces of text, which all stages scale with
    stream        tokens of a captured and of a held-out chunk
    search_ctx    tokens of a chunk that plans are tried on
    search_every  of those that are scored, each so-many-th is: what neighbours have tells little more than one of them
    """

    n_chunk: int
    stream: int
    search_ctx: int
    search_every: int

    def fitting(self, fit: Callable[[int], int]) -> Sizes:
        """The same for a model that can read fit(n) of n tokens."""
        stream = fit(self.stream)
        return replace(self, stream=stream, search_ctx=min(self.search_ctx, stream))

    @staticmethod
    def skipped(n_ctx: int) -> int:
        """Tokens of a chunk's start that are not scored: three chunks so tell as much as four without their half."""
        return n_ctx // 4

    @property
    def n_calibration(self) -> int:
        return self.n_captured * self.stream

    @property
    def n_heldout(self) -> int:
        return self.n_chunk * self.stream

    @property
    def n_vectors(self) -> int:
        """Chunks that K's vectors are made from: a basis of a large head needs many tokens."""
        return self.n_chunk

    @property
    def n_captured(self) -> int:
        """Chunks that are captured: those, and others to measure errors on, in which the vectors fit no better than
        they will."""
        return self.n_vectors + max(1, self.n_chunk // 2)

    @property
    def n_searched(self) -> int:
        """Chunks that plans are tried on, of the text that errors are measured on."""
        return self.n_captured - self.n_vectors

    @property
    def n_own(self) -> int:
        """Chunks of the held-out text that the model itself is run on, where the proof ran on a faster copy."""
        return -(-self.n_chunk // 2)

    @property
    def n_scored_search(self) -> int:
        """Scored positions of what plans are tried on."""
        return self.n_searched * -(-(self.search_ctx - self.skipped(self.search_ctx)) // self.search_every)

    @property
    def n_scored_heldout(self) -> int:
        """Scored positions of the held-out text."""
        return self.n_chunk * (self.stream - self.skipped(self.stream))

    @property
    def n_scored(self) -> int:
        """Positions of the larger of the two references."""
        return max(self.n_scored_search, self.n_scored_heldout)
