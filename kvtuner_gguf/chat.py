"""A chat in the terminal over a Llama, with the plan in force."""

from __future__ import annotations

import json
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from types import FrameType
from typing import Any

from .errors import KvtunerError, StoppedError
from .report import MIB, layers_text
from .template import TEMPLATE_ERRORS, Messages, folded, template_error

_QUOTES = '"""'


class TooLongError(KvtunerError):
    """The messages do not fit into the context."""


def answer(
    llm: Any, messages: Messages, *, say: Callable[[str], None] = lambda text: None, **sampling: Any
) -> Iterator[str]:
    """The pieces of the model's answer to the messages, as they come. say gets what the user should know; sampling is
    llama_cpp's: max_tokens, temperature, top_k and so on.

    Raises TooLongError before the first piece, KvtunerError for a template that fails, or a run that does.
    """
    create = partial(llm.create_chat_completion, stream=True, **sampling)
    # nothing is run before the first piece is asked for
    stream = _formatted(create, messages, f"model '{llm.model_path}'", say)
    try:
        for chunk in stream:
            piece = chunk["choices"][0]["delta"].get("content")
            if piece:
                yield piece
    except ValueError as error:
        if "exceed context window" not in str(error):
            raise KvtunerError(f"the answer ended early: {error}.") from None
        raise TooLongError(
            f"message: longer than the context of {llm.n_ctx()} tokens. Shorten it, or use a larger -c."
        ) from None
    except RuntimeError as error:
        raise KvtunerError(f"the answer ended early: {error}.") from None


def _formatted(create: Callable[..., Any], messages: Messages, name: str, say: Callable[[str], None]) -> Any:
    """The stream of an answer, once the chat template has taken the messages."""
    try:
        return create(messages=messages)
    except TEMPLATE_ERRORS as error:
        again = folded(messages)
        if again is None:
            raise template_error(error, name) from None
        stream = _formatted(create, again, name, say)
        say("this model takes no system message: it stands at the start of your first one")
        return stream


def utf8(text: str) -> str:
    """What was typed, with a replacement character for each byte that is no UTF-8."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def chat_loop(
    llm: Any,
    read: Callable[[], str | None],
    write: Callable[[str], None],
    *,
    system: str | None = None,
    **sampling: Any,
) -> None:
    """Read, answer, repeat, until /exit, Ctrl-C at the prompt, or the end of the input. /help lists the commands.

    read   the user's next line, None at the end of the input
    write  prints a piece of text as it is
    Ctrl-C stops an answer. The oldest turns are dropped when the context is full, and the user is told.
    """
    chat = _Chat(llm, write, system, **sampling)
    while (line := _read_all(read, write)) is not None:
        line = utf8(line).strip()
        name, _, rest = line.partition(" ")
        if name == "/exit":
            return
        if re.fullmatch("/[a-z?]+", name):
            chat.command(name, rest.strip())
        elif line:
            chat.ask(line)


def _read_all(read: Callable[[], str | None], write: Callable[[str], None]) -> str | None:
    """The next line, or all of them between two lines that begin and end with three quotes."""
    line = _read(read, write)
    if line is None or not line.strip().startswith(_QUOTES):
        return line
    text = line.strip()[len(_QUOTES) :]
    while not text.endswith(_QUOTES):
        line = _read(read, write)
        if line is None:
            return text
        text += "\n" + line.rstrip()
    return text[: -len(_QUOTES)]


def _read(read: Callable[[], str | None], write: Callable[[str], None]) -> str | None:
    try:
        return read()
    except KeyboardInterrupt:
        write("\n")
        return None


class _Chat:
    """A conversation, which no error and no interruption loses.

    turns  the user's and the model's message of each
    """

    def __init__(self, llm: Any, write: Callable[[str], None], system: str | None, **sampling: Any) -> None:
        self.llm, self.write, self.sampling = llm, write, sampling
        self.system = system or ""
        self.turns: list[tuple[dict[str, str], dict[str, str]]] = []
        self.told: set[str] = set()
        self.last = "no answer yet"  # how fast the last one was
        self.commands: dict[str, tuple[Callable[[str], str], str]] = {
            "/help": (self._help, "this list"),
            "/reset": (self._reset, "forget the conversation"),
            "/regen": (self._regen, "answer the last question again"),
            "/system": (self._system, "TEXT: the system message from now on; none without a text"),
            "/stats": (self._stats, "context in use, speed of the last answer, memory"),
            "/plan": (self._plan, "the K and V types of each layer"),
            "/save": (self._save, "FILE: the conversation and its cache"),
            "/load": (self._load, "FILE: go on there, without reading it again"),
        }

    def command(self, name: str, rest: str) -> None:
        """Do what a line that starts with / says."""
        do, _ = self.commands.get(name, (lambda _: f"({name} is no command; /help lists them)\n", ""))
        self.write(do(rest))

    def _help(self, _: str) -> str:
        lines = {**{name: text for name, (_, text) in self.commands.items()}, "/exit": "end the chat"}
        told = "".join(f"{name:8} {text}\n" for name, text in lines.items())
        return f"{told}{_QUOTES} begins and ends a message of several lines; Ctrl-C stops an answer\n"

    def _reset(self, _: str) -> str:
        self.turns = []
        return "(forgotten)\n"

    def _regen(self, _: str) -> str:
        if not self.turns:
            return "(there is no answer yet)\n"
        last = self.turns.pop()
        if not self.ask(last[0]["content"]):
            self.turns.append(last)
        return ""

    def _system(self, text: str) -> str:
        self.system = text
        return "(the system message is changed)\n" if text else "(no system message)\n"

    def _stats(self, _: str) -> str:
        used = f"{self.llm.n_tokens} of {self.llm.n_ctx()} tokens of context"
        return f"{used}; K/V cache {self.llm.kv_bytes / MIB:.1f} MiB\n{self.last}\n"

    def _plan(self, _: str) -> str:
        return f"{layers_text(self.llm.plan.pairs)}\n"

    def _save(self, path: str) -> str:
        about = json.dumps({"system": self.system, "turns": self.turns})
        return self._with_file(path, lambda: self.llm.save_session(path, about), "saved")

    def _load(self, path: str) -> str:
        def load() -> None:
            kept = self.llm.load_session(path)
            try:
                about = json.loads(kept)
                system, turns = str(about["system"]), [(dict(q), dict(a)) for q, a in about["turns"]]
            except (ValueError, KeyError, TypeError):
                raise KvtunerError(f"'{path}' holds no conversation of a chat.") from None
            self.system, self.turns = system, turns

        return self._with_file(path, load, "loaded")

    @staticmethod
    def _with_file(path: str, do: Callable[[], None], done: str) -> str:
        if not path:
            return "(which file?)\n"
        try:
            do()
        except KvtunerError as error:
            return f"({error})\n"
        return f"({done})\n"

    def say(self, text: str) -> None:
        """Tells the user, once."""
        if text not in self.told:
            self.told.add(text)
            self.write(f"({text})\n")

    def ask(self, text: str) -> bool:
        """One answer, written as it comes. What was said when it ends, however that is, is kept. -> whether anything
        was"""
        question = {"role": "user", "content": text}
        pieces: list[str] = []
        with _Interruption() as interruption:
            self.llm.should_stop = lambda: interruption.asked
            try:
                self._speak(question, pieces, interruption)
                end = "(stopped)\n" if interruption.asked else ""
            except StoppedError:
                end = "(stopped)\n"
            except TooLongError as error:
                end = f"({error})\n"
            except KvtunerError as error:
                end = f"({error})\n"
                self.llm.reset()
            except KeyboardInterrupt:
                end = "(stopped)\n"
                self.llm.reset()  # it may have come between the cache and what is known of it
            finally:
                self.llm.should_stop = None
        self.write(("\n" if pieces or not end else "") + end)
        if pieces:
            self.turns.append((question, {"role": "assistant", "content": "".join(pieces)}))
        return bool(pieces)

    def _speak(self, question: dict[str, str], pieces: list[str], interruption: _Interruption) -> None:
        stream, start = self._opened(question), time.monotonic()
        while (piece := next(stream, None)) is not None:
            if not pieces:
                first = time.monotonic()
            pieces.append(piece)
            self.write(piece)
            if len(pieces) > 1:
                rate = (len(pieces) - 1) / max(time.monotonic() - first, 1e-9)
                self.last = f"the last answer began after {first - start:.1f} s, {rate:.1f} tokens/s"
            if interruption.asked:
                return

    def _opened(self, question: dict[str, str]) -> Iterator[str]:
        """The answer's pieces, with as many of the latest turns before the question as the context holds."""
        start = [{"role": "system", "content": self.system}] if self.system else []
        for n_dropped in range(len(self.turns) + 1):
            earlier = [message for turn in self.turns[n_dropped:] for message in turn]
            stream = answer(self.llm, [*start, *earlier, question], say=self.say, **self.sampling)
            try:
                first = next(stream, None)
            except TooLongError:
                if n_dropped < len(self.turns):
                    continue
                raise
            if n_dropped:
                self.turns = self.turns[n_dropped:]
                self.write(
                    f"(the context is full: the oldest {'turn is' if n_dropped == 1 else f'{n_dropped} turns are'} "
                    "dropped)\n"
                )
            if first is not None:
                yield first
            yield from stream
            return


class _Interruption:
    """Ctrl-C within the block. It is noted, so that an answer ends between two tokens, and a prompt between two steps;
    twice is not."""

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> _Interruption:
        self._before = signal.getsignal(signal.SIGINT)
        is_main = threading.current_thread() is threading.main_thread()  # the only one that gets signals
        self._is_ours = is_main and callable(self._before)  # else it is ignored, or ends the process
        if self._is_ours:
            signal.signal(signal.SIGINT, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        if self._is_ours:
            signal.signal(signal.SIGINT, self._before)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.asked and callable(self._before):
            self._before(number, frame)
        self.asked = True
