"""Where the text comes from: a file of the user's, or the model itself. -> streams of tokens, cut in two that never
meet."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import cycle, groupby
from pathlib import Path

import numpy as np

from kvtuner_gguf.calibrate.corpus import Corpus, Document, Piece, file_sha256
from kvtuner_gguf.calibrate.kld import Chunks, check_logits
from kvtuner_gguf.calibrate.progress import Progress
from kvtuner_gguf.calibrate.records import load_arrays, save_arrays
from kvtuner_gguf.errors import CalibrationError, KvtunerError
from kvtuner_gguf.printable import printable
from kvtuner_gguf.runtime import Session

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
) -> Text:
    """Text of a file, or, without one, that the model writes itself. See read_text, write_text."""
    if path is not None:
        return read_text(session, path, n_calibration, n_heldout, progress.say)
    with progress.bar("text: the model writes", n_calibration + n_heldout) as advance:
        return write_text(session, n_calibration, n_heldout, stream=stream, seed=seed, progress=advance)


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
) -> Text:
    """Text that the model writes itself, at temperature 1, from SEED_PROMPTS: no data set, and on its own distribution.

    stream  tokens of one sequence
    The two parts come from different prompts.
    """
    counts = [-(-n_tokens // stream) for n_tokens in (n_calibration, n_heldout)]
    with ThreadPoolExecutor(session.n_threads) as threads:
        writer = _Writer(session, stream, seed, threads)
        streams = writer.write([half for half in (0, 1) for _ in range(counts[half])], progress)
    parts = [s.reshape(-1)[:n] for s, n in zip(np.split(streams, [counts[0]]), (n_calibration, n_heldout))]
    data = np.concatenate(parts).tobytes()
    return Text("written by the model", hashlib.sha256(data).hexdigest(), *parts)


class _Writer:
    """Lets the model write several sequences at once: one batch per token reads the weights once for all."""

    def __init__(self, session: Session, stream: int, seed: int, threads: Executor) -> None:
        self.session, self.stream, self.threads = session, stream, threads
        prompts = [_prompt_tokens(session, p) for p in SEED_PROMPTS]
        self.prompts = (cycle(prompts[0::2]), cycle(prompts[1::2]))  # of the two halves, which share none
        self.rng = np.random.default_rng(seed)

    def write(self, halves: Sequence[int], progress: Callable[[int], None]) -> np.ndarray:
        """One stream for each entry of halves -> (len(halves), stream) int32"""
        done = []
        for start in range(0, len(halves), N_PARALLEL):
            done += self._write_batch(halves[start : start + N_PARALLEL], progress)
        return np.array(done, np.int32)

    def _write_batch(self, halves: Sequence[int], progress: Callable[[int], None]) -> list[list[int]]:
        n_seq = len(halves)
        pending = [next(self.prompts[half]) for half in halves]  # tokens to read before the next one is sampled
        texts: list[list[int]] = [[] for _ in halves]
        written = [0] * n_seq
        with self.session.context(n_seq * self.stream, None, n_seq_max=n_seq) as ctx:
            while any(len(t) < self.stream for t in texts):
                rows, outputs, at = [], [], []
                for i, text in enumerate(texts):
                    part = pending[i][: self.stream - len(text)]
                    rows += [(token, len(text) + j, i) for j, token in enumerate(part)]
                    outputs += [j == len(part) - 1 for j in range(len(part))]
                    at += [i] if part else []
                    text += part
                written_logits = ctx.decode(rows, outputs)
                if len(written_logits):
                    check_logits(self.session, written_logits, texts[at[0]])
                draws = self.rng.random(len(at))
                for i, token in zip(at, self.threads.map(_sample, written_logits, draws)):
                    pending[i], written[i] = [token], written[i] + 1
                    if self.session.is_end(token) or written[i] >= MAX_DOCUMENT:
                        pending[i], written[i] = [token, *next(self.prompts[halves[i]])], 0
                progress(len(rows))
        return texts


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
