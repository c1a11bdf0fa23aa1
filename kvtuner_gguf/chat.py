"""A chat in the terminal over a Llama, with the plan in force."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any


def answer(llm: Any, messages: list[dict[str, str]], *, max_tokens: int | None, temperature: float) -> Iterator[str]:
    """The pieces of the model's answer to the messages, as they come."""
    stream = llm.create_chat_completion(messages=messages, stream=True, max_tokens=max_tokens, temperature=temperature)
    for chunk in stream:
        piece = chunk["choices"][0]["delta"].get("content")
        if piece:
            yield piece


def chat_loop(
    llm: Any,
    read: Callable[[], str | None],
    write: Callable[[str], None],
    *,
    system: str | None = None,
    max_tokens: int | None = None,
    temperature: float = 0.7,
) -> None:
    """Read, answer, repeat, until /exit or the end of the input. /reset forgets the conversation.

    read   the user's next line, None at the end of the input
    write  prints a piece of text as it is
    The oldest turns are dropped when the context is full, and the user is told.
    """
    start = [{"role": "system", "content": system}] if system else []
    messages = list(start)
    while (line := read()) is not None:
        line = line.strip()
        if line == "/exit":
            return
        if line == "/reset":
            messages = list(start)
            write("(forgotten)\n")
        elif line:
            messages = _turn(llm, [*messages, {"role": "user", "content": line}], len(start), write, max_tokens, temperature)


def _turn(
    llm: Any, messages: list[dict[str, str]], n_start: int, write: Callable[[str], None], max_tokens: int | None, temperature: float
) -> list[dict[str, str]]:
    """One answer, written as it comes; the messages with it."""
    while True:
        try:
            pieces = []
            for piece in answer(llm, messages, max_tokens=max_tokens, temperature=temperature):
                pieces.append(piece)
                write(piece)
            write("\n")
            return [*messages, {"role": "assistant", "content": "".join(pieces)}]
        except ValueError as error:
            if "exceed" not in str(error) or pieces:
                raise
            if len(messages) <= n_start + 1:
                write("(this message is longer than the context: start with a larger -c)\n")
                return messages[:n_start]
            messages = messages[:n_start] + messages[n_start + 2 :]
            write("(the context is full: the oldest turn is dropped)\n")
