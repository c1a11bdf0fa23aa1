"""Prompts with expected answers: JSON Lines -> tasks."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvtuner_gguf.errors import TaskError
from kvtuner_gguf.tasks.answer import KINDS, Answer
from kvtuner_gguf.values import brief

MAX_TOKENS = 512
_KEYS = frozenset(("id", "area", "prompt", "messages", "system", "tools", "max_tokens", "choices", "schema", *KINDS))


@dataclass(frozen=True)
class Task:
    """One prompt and what is to come of it.

    messages    the conversation, as a chat template takes it; its last is the user's
    tools       descriptions of functions, as OpenAI's interface has them, for the template
    area        what it is a task of; accuracy is given for each
    max_tokens  of the answer; one that is longer is cut
    """

    id: str
    messages: tuple[dict[str, Any], ...]
    answer: Answer
    area: str = ""
    tools: tuple[dict[str, Any], ...] = ()
    max_tokens: int = MAX_TOKENS


def read_tasks(path: Path) -> tuple[Task, ...]:
    """The tasks of a file, one JSON object on a line; see docs/tasks.md.

    Raises TaskError, which names the line, for what is no task, and for two tasks of one id.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise TaskError(f"tasks '{path}': cannot be read ({error}). Check the path.") from None
    tasks = []
    for i, line in enumerate(lines, 1):
        if line.strip():
            try:
                tasks.append(task_of(_object(line), f"line {i}"))
            except TaskError as error:
                raise TaskError(f"tasks '{path}', line {i}: {error}") from None
    return checked_tasks(tasks, f"tasks '{path}'")


def checked_tasks(tasks: Iterable[Task], what: str) -> tuple[Task, ...]:
    """The tasks, of which there are some, no two of one id. Raises TaskError."""
    found: dict[str, Task] = {}
    for task in tasks:
        if task.id in found:
            raise TaskError(f"{what}: id '{task.id}' stands there twice. Give each task its own, or none.")
        found[task.id] = task
    if not found:
        raise TaskError(f"{what}: holds no task. Give one JSON object on each line.")
    return tuple(found.values())


def _object(line: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise TaskError(f"is no JSON ({error}).") from None
    if not isinstance(value, dict):
        raise TaskError(f"got {brief(value)}, need a JSON object.")
    return value


def task_of(value: Mapping[str, Any], name: str) -> Task:
    """The task that a JSON object describes; name: its id if it gives none. Raises TaskError."""
    unknown = sorted(set(value) - _KEYS)
    if unknown:
        raise TaskError(f"'{unknown[0]}' is not known. Use some of: {', '.join(sorted(_KEYS))}.")
    max_tokens = value.get("max_tokens", MAX_TOKENS)
    if not isinstance(max_tokens, int) or isinstance(max_tokens, bool) or max_tokens < 1:
        raise TaskError(f"max_tokens: got {brief(max_tokens)}, need a whole number above 0.")
    area, tools = value.get("area", ""), value.get("tools", [])
    if not isinstance(area, str):
        raise TaskError(f"area: got {brief(area)}, need a text.")
    if not isinstance(tools, list) or not all(isinstance(t, dict) for t in tools):
        raise TaskError(f"tools: got {brief(tools)}, need a list of objects.")
    return Task(str(value.get("id", name)), _messages(value), _answer(value), area, tuple(tools), max_tokens)


def _messages(value: Mapping[str, Any]) -> tuple[dict[str, Any], ...]:
    """The conversation, from "messages", or or from "system" and "prompt"."""
    if ("messages" in value) == ("prompt" in value):
        raise TaskError('need either "prompt" or "messages".')
    messages = value.get("messages")
    if messages is None:
        system = [{"role": "system", "content": _text(value, "system")}] if "system" in value else []
        return (*system, {"role": "user", "content": _text(value, "prompt")})
    if not isinstance(messages, list) or not messages or not all(_is_message(m) for m in messages):
        raise TaskError(f'messages: got {brief(messages)}, need a list of objects with "role" and "content".')
    if messages[-1]["role"] != "user":
        raise TaskError(f"messages: the last is of {brief(messages[-1]['role'])}, need the user's.")
    return tuple(messages)


def _is_message(value: object) -> bool:
    return isinstance(value, dict) and isinstance(value.get("role"), str) and isinstance(value.get("content"), str)


def _text(value: Mapping[str, Any], key: str) -> str:
    if not isinstance(value[key], str):
        raise TaskError(f"{key}: got {brief(value[key])}, need a text.")
    return value[key]


def _answer(value: Mapping[str, Any]) -> Answer:
    kinds = [kind for kind in KINDS if kind in value]
    if not kinds and "schema" in value:
        kinds = ["json"]
    if len(kinds) != 1:
        raise TaskError(f"need one expected answer, of: {', '.join(KINDS)}; got {', '.join(kinds) or 'none'}.")
    choices = value.get("choices", ["A", "B", "C", "D"])
    if not isinstance(choices, list) or not all(isinstance(c, str) and c for c in choices):
        raise TaskError(f"choices: got {brief(choices)}, need a list of texts.")
    return Answer(kinds[0], value.get(kinds[0]), tuple(choices) if kinds[0] == "choice" else (), value.get("schema"))
