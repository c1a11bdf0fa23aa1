"""A chat in the terminal over a Llama, with the plan in force."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from functools import partial
from types import FrameType
from typing import Any

from .errors import KvtunerError, StoppedError
from .template import TEMPLATE_ERRORS, Messages, folded, template_error


class TooLongError(KvtunerError):
    """The messages do not fit into the context."""


def answer(
    llm: Any,
    messages: Messages,
    *,
    max_tokens: int | None,
    temperature: float,
    say: Callable[[str], None] = lambda text: None,
) -> Iterator[str]:
    """The pieces of the model's answer to the messages, as they come. say gets what the user should know.

    Raises TooLongError before the first piece, KvtunerError for a template that fails, or a run that does.
    """
    create = partial(llm.create_chat_completion, stream=True, max_tokens=max_tokens, temperature=temperature)
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
    max_tokens: int | None = None,
    temperature: float = 0.7,
) -> None:
    """Read, answer, repeat, until /exit, Ctrl-C at the prompt, or the end of the input. /reset forgets the
    conversation.

    read   the user's next line, None at the end of the input
    write  prints a piece of text as it is
    Ctrl-C stops an answer. The oldest turns are dropped when the context is full, and the user is told.
    """
    chat = _Chat(llm, write, system, max_tokens=max_tokens, temperature=temperature)
    while (line := _read(read, write)) is not None:
        line = utf8(line).strip()
        if line == "/exit":
            return
        if line == "/reset":
            chat.turns = []
            write("(forgotten)\n")
        elif line:
            chat.turn({"role": "user", "content": line})


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
        self.start = [{"role": "system", "content": system}] if system else []
        self.turns: list[tuple[dict[str, str], dict[str, str]]] = []
        self.told: set[str] = set()

    def say(self, text: str) -> None:
        """Tells the user, once."""
        if text not in self.told:
            self.told.add(text)
            self.write(f"({text})\n")

    def turn(self, question: dict[str, str]) -> None:
        """One answer, written as it comes. What was said when it ends, however that is, is kept."""
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

    def _speak(self, question: dict[str, str], pieces: list[str], interruption: _Interruption) -> None:
        stream = self._opened(question)
        while (piece := next(stream, None)) is not None:
            pieces.append(piece)
            self.write(piece)
            if interruption.asked:
                return

    def _opened(self, question: dict[str, str]) -> Iterator[str]:
        """The answer's pieces, with as many of the latest turns before the question as the context holds."""
        for n_dropped in range(len(self.turns) + 1):
            earlier = [message for turn in self.turns[n_dropped:] for message in turn]
            stream = answer(self.llm, [*self.start, *earlier, question], say=self.say, **self.sampling)
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
