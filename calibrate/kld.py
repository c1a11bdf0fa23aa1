"""Text + plan -> quality: the KL divergence of a real run on the real quantized cache from the run on an f16 cache."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from kvtuner_gguf.calibrate.records import CURE
from kvtuner_gguf.errors import CalibrationError
from kvtuner_gguf.hidden import Hidden
from kvtuner_gguf.kvectors import KVectors
from kvtuner_gguf.pair import Pair
from kvtuner_gguf.quality import Quality, standard_error
from kvtuner_gguf.room import reserve, write_errors
from kvtuner_gguf.runtime import Context, Session

N_UBATCH = 512  # of all runs that are compared
N_BLOCK = 256  # tokens: neighbours are alike, so a standard error is taken over blocks of them
LEAST_BLOCKS = 8


@dataclass(frozen=True)
class Chunks:
    """A text as equal pieces, each run from an empty cache.

    tokens    (n_chunk, n_ctx) int32
    n_skip    positions at the start of each chunk that are not scored; by default half of it, as llama-perplexity does
    every     each so-many-th of the others is scored, the last one of a chunk among them
    """

    tokens: np.ndarray
    n_skip: int | None = None
    every: int = 1

    def __post_init__(self) -> None:
        if self.tokens.ndim != 2 or self.tokens.shape[1] < 16:
            raise CalibrationError(
                f"chunks {self.tokens.shape}: need (n_chunk, n_ctx) with n_ctx of at least 16. Use a longer text."
            )

    @property
    def n_ctx(self) -> int:
        return self.tokens.shape[1]

    @property
    def positions(self) -> range:
        """Those of a chunk that are scored."""
        n_skip = self.n_ctx // 2 if self.n_skip is None else self.n_skip
        return range(self.n_ctx - 1, n_skip - 1, -self.every)[::-1]

    @property
    def n_positions(self) -> int:
        """Positions that are scored, all chunks together."""
        return len(self.tokens) * len(self.positions)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """(n, n_vocab) float32 -> log-probabilities, same shape."""
    x = logits - logits.max(axis=1, keepdims=True)
    x -= np.log(np.exp(x).sum(axis=1, keepdims=True))
    return x


def check_logits(session: Session, logits: np.ndarray, tokens: Sequence[int]) -> None:
    """Raises CalibrationError unless logits, of an f16 cache after the tokens, are numbers. -inf is one: a token that
    never comes."""
    if np.isfinite(logits.max(axis=1)).all():
        return
    with session.context(len(tokens), None, type_k="bf16", type_v="bf16") as ctx:
        is_the_cache = all(np.isfinite(part.max(axis=1)).all() for part in ctx.logits(tokens, range(len(tokens))))
    if is_the_cache:
        raise CalibrationError(
            f"model '{session.path}': its K or V is beyond the 65504 of f16, so that an f16 cache gives NaN, and "
            "there is nothing to "
            "measure a plan against. Run it with -ctk bf16 -ctv bf16."
        )
    raise CalibrationError(
        f"model '{session.path}': gives NaN, whatever its cache. The file is damaged, or its quantization is. "
        "Get it again, or take another quantization."
    )


def kl_divergence(base: np.ndarray, logits: np.ndarray) -> np.ndarray:
    """KL(base || run) of each position, in nats.

    base    (n, n_vocab) log-probabilities of the f16 cache, float16 or float32
    logits  (n, n_vocab) float32 of the run
    -> (n,) float64, >= 0
    """
    base = base.astype(np.float32)  # float16 log-probabilities do not sum to one
    base -= base.max(axis=1, keepdims=True)
    p = np.exp(base)
    p /= (total := p.sum(axis=1, keepdims=True))
    run = logits - logits.max(axis=1, keepdims=True)
    base -= run
    np.exp(run, out=run)
    base += np.log(run.sum(axis=1, keepdims=True)) - np.log(total)
    base *= p
    return np.maximum(base.sum(axis=1, dtype=np.float64), 0.0)


@dataclass(frozen=True)
class Reference:
    """Log-probabilities of the f16 cache on the scored positions: (n_positions, n_vocab) float16, on disk.

    hidden  its hidden states: runs that leave lower layers at f16 start with the first that they do not
    first   where its chunks begin, in those of the file
    """

    chunks: Chunks
    path: Path
    n_vocab: int
    hidden: Hidden | None = None
    first: int = 0

    def open(self) -> np.ndarray:
        shape = (self.chunks.n_positions, self.n_vocab)
        at = 2 * self.first * len(self.chunks.positions) * self.n_vocab
        return np.memmap(self.path, np.float16, "r", at, shape)

    def of_chunks(self, chunks: range) -> Reference:
        """Of these of its chunks alone."""
        few = replace(self.chunks, tokens=self.chunks.tokens[chunks.start : chunks.stop])
        return replace(self, chunks=few, first=self.first + chunks.start)

    @property
    def tokens(self) -> range:
        """Those of its chunks, in the file's."""
        first = self.first * self.chunks.n_ctx
        return range(first, first + self.chunks.tokens.size)

    def discard(self) -> None:
        """Take it from the disk; it is large."""
        self.path.unlink(missing_ok=True)
        if self.hidden:
            self.hidden.close()
            self.hidden.path.unlink(missing_ok=True)


def make_reference(
    session: Session,
    chunks: Chunks,
    path: Path,
    progress: Callable[[int], None] = lambda n: None,
    hidden: Hidden | None = None,
) -> Reference:
    """Run the text on an f16 cache and keep its log-probabilities in a file. progress gets positions done.

    hidden  gets the hidden states of the run

    Raises CalibrationError if the disk has no room for it: seen before the run, and never by a write into a mapping.
    """
    n_bytes = 2 * chunks.n_positions * session.n_vocab
    with write_errors(path, n_bytes, CURE, CalibrationError), open(path, "wb", opener=_private) as out:
        reserve(out, path.parent, n_bytes)
        if hidden:
            hidden.keep()
        with session.context(chunks.n_ctx, None, n_ubatch=N_UBATCH, watch=hidden) as ctx:
            for tokens in chunks.tokens.tolist():
                for logits in ctx.logits(tokens, chunks.positions):
                    check_logits(session, logits, tokens)
                    for block in _blocks(logits):
                        out.write(log_softmax(block).astype(np.float16).tobytes())
                    progress(len(logits))
    return Reference(chunks, path, session.n_vocab, hidden)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def measure(
    session: Session,
    pairs: Sequence[Pair] | None,
    reference: Reference,
    *,
    k_vectors: Sequence[KVectors] = (),
    flash_attn: bool = True,
    progress: Callable[[int], None] = lambda n: None,
    enough: Callable[[Quality], bool] | None = None,
) -> Quality:
    """Quality of a plan on the reference's text: a real run on the real cache.

    pairs       one per layer; None = f16
    k_vectors   how each layer's K is conditioned; () = none is
    flash_attn  False with pairs=None: the noise floor. The same f16 cache by another attention kernel, so that the
                difference is rounding alone, as the model's other roundings amplify it
    enough      whether what the chunks so far gave will do, so that the others are not run; None = all are
    Raises CalibrationError if the run time did not allocate what was asked for.
    """
    hidden = reference.hidden
    if not (pairs and hidden and hidden.start(_first_changed(pairs), reference.tokens)):
        hidden = None
    options: dict[str, Any] = {"n_ubatch": N_UBATCH, "flash_attn": flash_attn, "watch": hidden}
    with session.context(reference.chunks.n_ctx, pairs, k_vectors, **options) as ctx:
        if pairs is not None and ctx.notes():
            raise CalibrationError(f"the run time left the plan: {' | '.join(ctx.notes())}")
        kld, same_top = compare(
            ctx, reference, n_threads=session.n_threads, progress=progress, enough=enough and _so_far(reference, enough)
        )
    if hidden:
        hidden.check()
    if not np.isfinite(kld).all():
        what = (
            ", ".join(sorted({str(p) for p in pairs if p.type_k}))
            if pairs is not None
            else "f16 without flash attention"
        )
        raise CalibrationError(
            f"{what}: NaN at {np.isnan(kld).sum()} of {len(kld)} positions, where an f16 cache gives numbers. "
            "Choose other types."
        )
    return quality_of(kld, same_top, reference.chunks)


def _so_far(reference: Reference, enough: Callable[[Quality], bool]) -> Callable[[np.ndarray, np.ndarray], bool]:
    """The same, asked of positions."""

    def of_positions(kld: np.ndarray, same_top: np.ndarray) -> bool:
        return bool(np.isfinite(kld).all()) and enough(quality_of(kld, same_top, reference.chunks))

    return of_positions


def quality_of(kld: np.ndarray, same_top: np.ndarray, chunks: Chunks) -> Quality:
    """kld, same_top: (n_positions,) each, in the order of the text, or of its first chunks alone."""
    blocks = _block_means(kld, chunks)
    return Quality(
        kld_mean=float(kld.mean()),
        kld_p999=float(np.quantile(kld, 0.999)),
        same_top=float(same_top.mean()),
        n_positions=len(kld),
        kld_se=standard_error(blocks),
        same_top_se=standard_error(_block_means(same_top, chunks)),
        blocks=tuple(blocks),
    )


def _block_means(values: np.ndarray, chunks: Chunks) -> list[float]:
    """Means over blocks of about N_BLOCK tokens of a chunk; of shorter ones if those were fewer than LEAST_BLOCKS."""
    n_scored = len(chunks.positions)
    n_chunk = len(values) // n_scored
    n_blocks = max(round(n_scored * chunks.every / N_BLOCK), -(-LEAST_BLOCKS // n_chunk))
    parts = np.array_split(values.reshape(n_chunk, n_scored), min(n_blocks, n_scored), axis=1)
    return np.stack([part.mean(axis=1) for part in parts], axis=1).reshape(-1).tolist()


def _first_changed(pairs: Sequence[Pair]) -> int:
    """The first layer that is not at f16; 0 if all are."""
    return next((il for il, pair in enumerate(pairs) if {pair.type_k, pair.type_v} - {"f16", ""}), 0)


def compare(
    ctx: Context,
    reference: Reference,
    *,
    n_threads: int = 1,
    step: int = N_UBATCH,
    progress: Callable[[int], None] = lambda n: None,
    enough: Callable[[np.ndarray, np.ndarray], bool] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Run the reference's text, step tokens at once: the KLD of each scored position, and whether the likeliest token
    is the same; up to the end of the chunk that makes them enough."""
    base, chunks = reference.open(), reference.chunks
    kld, same_top, at = [], [], 0
    with ThreadPoolExecutor(n_threads) as pool:
        for tokens in chunks.tokens.tolist():
            for logits in ctx.logits(tokens, chunks.positions, step):
                kept = base[at : at + len(logits)]
                for of_block in pool.map(_compared, _blocks(kept), _blocks(logits)):
                    kld.append(of_block[0])
                    same_top.append(of_block[1])
                at += len(logits)
                progress(len(logits))
            if enough and enough(np.concatenate(kld), np.concatenate(same_top)):
                break
    return np.concatenate(kld), np.concatenate(same_top)


def _compared(base: np.ndarray, logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    base = base.astype(np.float32)  # whose largest is found sooner
    return kl_divergence(base, logits), base.argmax(axis=1) == logits.argmax(axis=1)


def _blocks(logits: np.ndarray) -> Iterator[np.ndarray]:
    """Rows that stay in the processor's cache while they are worked on."""
    size = max(1, 2**18 // logits.shape[1])
    for start in range(0, len(logits), size):
        yield logits[start : start + size]
