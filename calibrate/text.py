"""Where the text comes from: a file of the user's, or the model itself. -> streams of tokens, cut in two that never
meet."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from kvtuner_gguf.calibrate.corpus import Corpus, Document, Piece, file_sha256
from kvtuner_gguf.calibrate.kld import Chunks, check_logits
from kvtuner_gguf.calibrate.progress import Progress
from kvtuner_gguf.calibrate.records import load_arrays, load_json, save_arrays, save_json
from kvtuner_gguf.errors import CalibrationError, KvtunerError
from kvtuner_gguf.printable import printable
from kvtuner_gguf.runtime import Context, Session

# what the model is asked for when it writes its own text; ours, of several kinds
SEED_PROMPTS = (
    "Tell me about a day in the life of a lighthouse keeper.",
    "Write a Python function that parses a date in several formats, and explain it.",
    "Explain step by step how to solve 3x^2 - 12x + 9 = 0, then give three more such problems with solutions.",
    "Make a shopping list for a week of vegetarian dinners for four people, sorted by shop section.",
    "Schreibe einen Brief an eine Freundin über einen Umzug in eine neue Stadt.",
    "Give a short history of the printing press and what it changed.",
    "Write a dialogue between a customer and a repair shop about a broken bicycle.",
    "Describe how a bill becomes law, for a twelve-year-old.",
    "Escribe una receta de sopa de tomate y comenta cada paso.",
    "Write a C program that reads lines and prints them sorted, and comment on its complexity.",
    "Compare trains and planes for a trip of 800 kilometres: cost, time, comfort, emissions.",
    "Summarize the causes of the tides and of the seasons.",
    "Write a short story in which a map is wrong on purpose.",
    "List ten questions to ask before you rent a flat, each with the reason.",
    "A tank holds 240 litres and loses 3 percent a day. When is it half empty? Show the work.",
    "Explique comment fonctionne un moteur électrique.",
    "Write an e-mail that declines an invitation and proposes another date.",
    "What should a beginner know about bread dough? Go through the stages.",
    "Write a SQL schema for a library and five useful queries on it.",
    "Discuss whether homework helps children learn, with arguments for both sides.",
    "Write meeting notes for a team that plans the launch of a small web shop.",
    "Explain what an eclipse is and how ancient peoples predicted it.",
    "Write a poem of five stanzas about a river that crosses a border.",
    "Give me a bash script that backs up a folder every night, with error handling.",
)

_UNFINISHED = "unfinished text"
_SAVE_S = 20.0  # between two saves of what is written so far
_STEP = 512  # tokens that are read at once where a stopped run goes on
MAX_DOCUMENT = 700  # tokens the model writes before the next prompt
N_PARALLEL = 24  # sequences written at once


@dataclass(frozen=True)
class Text:
    """A text as tokens, and what names it in a plan.

    calibration heldout  (n,) int32 each; of different documents, or of different halves of the file
    """

    name: str
    sha256: str
    calibration: np.ndarray
    heldout: np.ndarray

    def save(self, path: Path) -> None:
        save_arrays(path, **vars(self))

    @classmethod
    def load(cls, path: Path) -> Text:
        """Raises CalibrationError if the file does not hold what `save` wrote."""
        arrays = load_arrays(path)
        return cls(str(arrays["name"]), str(arrays["sha256"]), arrays["calibration"], arrays["heldout"])


def chunks_of(
    tokens: np.ndarray, n_ctx: int, n_chunk: int, what: str, n_skip: int | None = None, every: int = 1
) -> Chunks:
    """The first n_chunk pieces of n_ctx tokens. Raises CalibrationError if the text is too short."""
    if len(tokens) < n_ctx * n_chunk:
        raise CalibrationError(
            f"{what}: {len(tokens)} tokens, need {n_chunk} chunks of {n_ctx} = {n_ctx * n_chunk}. "
            "Give a longer text with -f, or fewer --chunks."
        )
    return Chunks(tokens[: n_ctx * n_chunk].reshape(n_chunk, n_ctx), n_skip, every)


def source_text(
    session: Session,
    path: Path | None,
    n_calibration: int,
    n_heldout: int,
    *,
    stream: int,
    seed: int,
    progress: Progress,
    unfinished: Path | None = None,
) -> Text:
    """Text of a file, or, without one, that the model writes itself. See read_text, write_text."""
    if path is not None:
        return read_text(session, path, n_calibration, n_heldout, progress.say)
    with progress.bar("text: the model writes", n_calibration + n_heldout) as advance:
        return write_text(
            session, n_calibration, n_heldout, stream=stream, seed=seed, progress=advance, unfinished=unfinished
        )


def read_text(
    session: Session, path: Path, n_calibration: int, n_heldout: int, say: Callable[[str], None] = lambda text: None
) -> Text:
    """Text of a file: the documents of JSON Lines, or anything else as plain text. See Corpus.

    The first part is for calibration, the last for proof; what lies between is not looked at.
    Raises CalibrationError if the file cannot be read, or is too short.
    """
    with Corpus(path) as corpus:
        head, rest = _tokens(session, corpus, n_calibration, front=True)
        tail, _ = _tokens(session, corpus, n_heldout, front=False)
        if corpus.n_skipped:
            say(
                f"text '{path.name}': {corpus.n_skipped} of the {corpus.n_lines} lines read have a null or empty "
                "text and are left out."
            )
    if len(tail) < n_heldout:  # the two ends have met
        tail = np.concatenate([rest, tail])
    need = n_calibration + n_heldout
    if len(head) + len(tail) < need:
        raise CalibrationError(
            f"text '{path}' has {len(head) + len(tail)} tokens, need {need}: {n_calibration} to calibrate and "
            f"{n_heldout} to prove. "
            "Give a longer text, or fewer --chunks."
        )
    return Text(printable(path.name), file_sha256(path), head, tail[len(tail) - n_heldout :])


def _tokens(session: Session, corpus: Corpus, n: int, *, front: bool) -> tuple[np.ndarray, np.ndarray]:
    """The next n tokens of the corpus, or the last n, in the order of the text, and what was read beyond them; fewer if
    it ends."""
    pieces, have = [], 0
    for piece in (corpus.front() if front else corpus.back()) if n else ():
        pieces.append(np.array(_tokenized(session, piece, corpus), np.int32))
        have += len(pieces[-1])
        if have >= n:
            break
    tokens = np.concatenate([np.empty(0, np.int32), *(pieces if front else reversed(pieces))])
    return (tokens[:n], tokens[n:]) if front else (tokens[max(0, have - n) :], tokens[: max(0, have - n)])


def _tokenized(session: Session, piece: Piece, corpus: Corpus) -> list[int]:
    """Plain documents as one text with an empty line between two, conversations as the model's chat template has
    them."""
    tokens: list[int] = []
    for is_chat, group in groupby(piece.documents, key=lambda d: bool(d.messages)):
        if is_chat:
            for document in group:
                tokens += session.tokenize(_chat_text(session, document, corpus), add_special=False, parse_special=True)
            continue
        text, begins = "\n\n".join(d.text for d in group), piece.is_first and not tokens
        tokens += session.tokenize(text if begins or not corpus.is_json else f"\n\n{text}", add_special=begins)
    return tokens


def _chat_text(session: Session, document: Document, corpus: Corpus) -> str:
    try:
        if session.chat_template is None:
            raise CalibrationError('it holds "messages", and the model has no chat template. Give rows with a "text".')
        return session.chat_template.text(document.messages)
    except KvtunerError as error:
        raise CalibrationError(f"text '{corpus.path}': {error}") from None


def write_text(
    session: Session,
    n_calibration: int,
    n_heldout: int,
    *,
    stream: int,
    seed: int,
    progress: Callable[[int], None] = lambda n: None,
    unfinished: Path | None = None,
) -> Text:
    """Text that the model writes itself, at temperature 1, from SEED_PROMPTS: no data set, and on its own distribution.

    stream      tokens of one sequence
    unfinished  a file that keeps what is written so far, and is gone on with; it goes when all is written
    The two parts come from different prompts.
    """
    counts = [-(-n_tokens // stream) for n_tokens in (n_calibration, n_heldout)]
    with ThreadPoolExecutor(session.n_threads) as threads:
        writer = _Writer(session, stream, seed, threads, unfinished)
        streams = writer.write([half for half in (0, 1) for _ in range(counts[half])], progress)
    parts = [s.reshape(-1)[:n] for s, n in zip(np.split(streams, [counts[0]]), (n_calibration, n_heldout))]
    data = np.concatenate(parts).tobytes()
    return Text("written by the model", hashlib.sha256(data).hexdigest(), *parts)


@dataclass
class _Sequences:
    """What is being written at once.

    texts    tokens that the model has read
    pending  of each, tokens to read before the next one is sampled
    written  of each, tokens since its last prompt
    """

    texts: list[list[int]]
    pending: list[list[int]]
    written: list[int]


class _Writer:
    """Lets the model write several sequences at once: one batch per token reads the weights once for all."""

    def __init__(
        self, session: Session, stream: int, seed: int, threads: Executor, unfinished: Path | None = None
    ) -> None:
        self.session, self.stream, self.threads, self.unfinished = session, stream, threads, unfinished
        prompts = [_prompt_tokens(session, p) for p in SEED_PROMPTS]
        self.prompts = (prompts[0::2], prompts[1::2])  # of the two halves, which share none
        self.n_begun = [0, 0]  # documents, of each half
        self.rng = np.random.default_rng(seed)
        self.done: list[list[int]] = []

    def write(self, halves: Sequence[int], progress: Callable[[int], None]) -> np.ndarray:
        """One stream for each entry of halves -> (len(halves), stream) int32"""
        now = self._restored()
        progress(sum(map(len, [*self.done, *(now.texts if now else [])])))
        while len(self.done) < len(halves):
            at_once = halves[len(self.done) : len(self.done) + N_PARALLEL]
            if now is None or len(now.texts) != len(at_once):
                now = _Sequences([[] for _ in at_once], [self._prompt(half) for half in at_once], [0] * len(at_once))
            self._write(at_once, now, progress)
            self.done, now = [*self.done, *now.texts], None
        if self.unfinished:
            self.unfinished.unlink(missing_ok=True)
        return np.array(self.done, np.int32)

    def _prompt(self, half: int) -> list[int]:
        """The next one."""
        self.n_begun[half] += 1
        return self.prompts[half][(self.n_begun[half] - 1) % len(self.prompts[half])]

    def _write(self, halves: Sequence[int], now: _Sequences, progress: Callable[[int], None]) -> None:
        saved = time.monotonic()
        with self.session.context(len(halves) * self.stream, None, n_seq_max=len(halves)) as ctx:
            for i, text in enumerate(now.texts):  # of a run that was stopped
                for start in range(0, len(text), _STEP):
                    part = text[start : start + _STEP]
                    ctx.decode([(token, start + j, i) for j, token in enumerate(part)], [False] * len(part))
            while any(len(t) < self.stream for t in now.texts):
                before = self._state(now)
                if time.monotonic() - saved > _SAVE_S:
                    self._save(before)
                    saved = time.monotonic()
                try:
                    progress(self._step(ctx, halves, now))
                except BaseException:  # told to end, anywhere in the step
                    self._save(before)
                    raise

    def _step(self, ctx: Context, halves: Sequence[int], now: _Sequences) -> int:
        """One more token of each that has not ended. -> tokens read"""
        rows, outputs, at = [], [], []
        parts = [pending[: self.stream - len(text)] for text, pending in zip(now.texts, now.pending)]
        for i, (text, part) in enumerate(zip(now.texts, parts)):
            rows += [(token, len(text) + j, i) for j, token in enumerate(part)]
            outputs += [j == len(part) - 1 for j in range(len(part))]
            at += [i] if part else []
        logits = ctx.decode(rows, outputs)
        for text, part in zip(now.texts, parts):
            text += part
        if len(logits):
            check_logits(self.session, logits, now.texts[at[0]])
        draws = self.rng.random(len(at))
        for i, token in zip(at, self.threads.map(_sample, logits, draws)):
            now.pending[i], now.written[i] = [token], now.written[i] + 1
            if self.session.is_end(token) or now.written[i] >= MAX_DOCUMENT:
                now.pending[i], now.written[i] = [token, *self._prompt(halves[i])], 0
        return len(rows)

    def _state(self, now: _Sequences) -> dict[str, Any]:
        """Copies of all that a step changes."""
        return {
            "stream": self.stream,
            "rng": self.rng.bit_generator.state,
            "n_begun": list(self.n_begun),
            "done": self.done,
            "texts": [list(text) for text in now.texts],
            "pending": list(now.pending),
            "written": list(now.written),
        }

    def _save(self, state: dict[str, Any]) -> None:
        if self.unfinished and (self.done or any(state["texts"])):
            save_json(self.unfinished, _UNFINISHED, state)

    def _restored(self) -> _Sequences | None:
        """Where a run that was stopped had got to; None if there is none, or its record is damaged."""
        if self.unfinished is None or not self.unfinished.exists():
            return None
        with suppress(CalibrationError):
            state = load_json(self.unfinished, _UNFINISHED, dict)
            if state["stream"] == self.stream:
                self.rng.bit_generator.state = state["rng"]
                self.n_begun, self.done = state["n_begun"], state["done"]
                return _Sequences(state["texts"], state["pending"], state["written"])
        return None


def _sample(logits: np.ndarray, draw: float) -> int:
    """A token at temperature 1. draw: in 0..1"""
    cumulative = np.exp(logits - logits.max()).cumsum(dtype=np.float64)
    return min(int(cumulative.searchsorted(draw * cumulative[-1])), len(logits) - 1)


def _prompt_tokens(session: Session, prompt: str) -> list[int]:
    """A prompt as the chat template of the model has it, or plain where there is none."""
    formatted = session.chat_prompt(prompt)
    if formatted is None:
        return session.tokenize(prompt + "\n\n")
    return session.tokenize(formatted, parse_special=True)
