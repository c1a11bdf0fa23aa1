"""Where the text comes from: a file of the user's, or the model itself. -> streams of tokens, cut in two that never meet."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import CalibrationError
from ..runtime import Session
from .evaluate import Chunks

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


@dataclass(frozen=True)
class Text:
    """A text as tokens, and what names it in a plan.

    calibration heldout  (n,) int32 each; of different documents, or of different halves of the file
    """

    name: str
    sha256: str
    calibration: np.ndarray
    heldout: np.ndarray


def chunks_of(tokens: np.ndarray, n_ctx: int, n_chunk: int, what: str) -> Chunks:
    """The first n_chunk pieces of n_ctx tokens. Raises CalibrationError if the text is too short."""
    if len(tokens) < n_ctx * n_chunk:
        raise CalibrationError(
            f"{what}: {len(tokens)} tokens, need {n_chunk} chunks of {n_ctx} = {n_ctx * n_chunk}. "
            "Give a longer text with -f, or fewer --chunks."
        )
    return Chunks(tokens[: n_ctx * n_chunk].reshape(n_chunk, n_ctx))


def read_text(session: Session, path: Path, n_calibration: int, n_heldout: int) -> Text:
    """Text of a file: .jsonl with a "text" field in each line, anything else as plain text.

    The first part is for calibration, the last for proof. Raises CalibrationError if the file cannot be read, or is too short.
    """
    try:
        data = path.read_bytes()
        text = data.decode("utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise CalibrationError(f"text '{path}' cannot be read: {e}. Give a UTF-8 text file.") from None
    if path.suffix == ".jsonl":
        text = "\n\n".join(_json_lines(path, text))
    tokens = np.array(session.tokenize(text), np.int32)
    need = n_calibration + n_heldout
    if len(tokens) < need:
        raise CalibrationError(
            f"text '{path}' has {len(tokens)} tokens, need {need}: {n_calibration} to calibrate and {n_heldout} to prove. "
            "Give a longer text, or fewer --chunks."
        )
    return Text(path.name, hashlib.sha256(data).hexdigest(), tokens[:n_calibration], tokens[-n_heldout:])


def _json_lines(path: Path, text: str) -> list[str]:
    documents = []
    for number, line in enumerate(filter(str.strip, text.splitlines()), 1):
        try:
            documents.append(json.loads(line)["text"])
        except (ValueError, KeyError, TypeError):
            raise CalibrationError(f"text '{path}', line {number}: need a JSON object with a \"text\" field.") from None
    return documents


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

    stream  tokens of one sequence; a chunk never crosses two
    Even prompts are for calibration, odd ones for proof.
    """
    parts = []
    for half, n_tokens in enumerate((n_calibration, n_heldout)):
        prompts = SEED_PROMPTS[half::2]
        writer = _Writer(session, prompts, stream, seed + half)
        parts.append(writer.write(-(-n_tokens // stream), progress).reshape(-1)[:n_tokens])
    data = np.concatenate(parts).tobytes()
    return Text("written by the model", hashlib.sha256(data).hexdigest(), *parts)


class _Writer:
    """Lets the model write several sequences at once: one batch per token reads the weights once for all."""

    def __init__(self, session: Session, prompts: Sequence[str], stream: int, seed: int) -> None:
        self.session, self.stream = session, stream
        self.prompts = [_prompt_tokens(session, p) for p in prompts]
        self.rng = np.random.default_rng(seed)
        self.next_prompt = 0

    def write(self, n_stream: int, progress: Callable[[int], None]) -> np.ndarray:
        """-> (n_stream, stream) int32"""
        done = []
        while len(done) < n_stream:
            done += self._write_batch(min(8, n_stream - len(done)), progress)
        return np.array(done, np.int32)

    def _write_batch(self, n_seq: int, progress: Callable[[int], None]) -> list[list[int]]:
        self.session.set_plan(None)
        pending = [self._prompt() for _ in range(n_seq)]  # tokens that are to be read before the next one is sampled
        texts: list[list[int]] = [[] for _ in range(n_seq)]
        written = [0] * n_seq
        with self.session.context(n_seq * self.stream, n_seq_max=n_seq) as ctx:
            while any(len(t) < self.stream for t in texts):
                rows, outputs, at = [], [], []
                for i, text in enumerate(texts):
                    part = pending[i][: self.stream - len(text)]
                    rows += [(token, len(text) + j, i) for j, token in enumerate(part)]
                    outputs += [j == len(part) - 1 for j in range(len(part))]
                    at += [i] if part else []
                    text += part
                for i, logits in zip(at, ctx.decode(rows, outputs)):
                    pending[i] = self._next(logits, written, i)
                progress(len(rows))
        return texts

    def _prompt(self) -> list[int]:
        self.next_prompt += 1
        return self.prompts[(self.next_prompt - 1) % len(self.prompts)]

    def _next(self, logits: np.ndarray, written: list[int], i: int) -> list[int]:
        """The token that the model writes, or the next prompt where it ends its document."""
        token = int((logits + self.rng.gumbel(size=logits.shape)).argmax())  # a sample at temperature 1
        written[i] += 1
        if self.session.is_end(token) or written[i] >= MAX_DOCUMENT:
            written[i] = 0
            return [token, *self._prompt()]
        return [token]


def _prompt_tokens(session: Session, prompt: str) -> list[int]:
    """A prompt as the chat template of the model has it, or plain where there is none."""
    formatted = session.chat_prompt(prompt)
    if formatted is None:
        return session.tokenize(prompt + "\n\n")
    return session.tokenize(formatted, parse_special=True)
