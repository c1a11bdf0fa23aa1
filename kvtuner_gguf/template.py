"""A model's chat template: messages -> the text that the model reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError as TemplateError

from .errors import KvtunerError

Messages = Sequence[dict[str, Any]]

# A template is a program of the model's maker: what its own checks raise, and what its mistakes do.
TEMPLATE_ERRORS = (TemplateError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)


def folded(messages: Messages) -> list[dict[str, Any]] | None:
    """The messages with the system's in front of the user's first, for a template that takes no system message; None if
    there is none."""
    if len(messages) < 2 or messages[0]["role"] != "system" or messages[1]["role"] != "user":
        return None
    system, first, *rest = messages
    return [{**first, "content": f"{system['content']}\n\n{first['content']}"}, *rest]


def template_error(error: Exception, what: str) -> KvtunerError:
    """What to tell of an error that the template of `what` ended in."""
    return KvtunerError(
        f"{what}: its chat template fails ({type(error).__name__}: {error}). "
        "Give the file another tokenizer.chat_template, or take one whose template works."
    )


class ChatTemplate:
    """The template in a model's file. Raises KvtunerError if it does not parse."""

    def __init__(self, source: str, bos: str, eos: str) -> None:
        from llama_cpp.llama_chat_format import Jinja2ChatFormatter

        try:
            self._formatter, self._prompter = (
                Jinja2ChatFormatter(source, eos_token=eos, bos_token=bos, add_generation_prompt=prompt)
                for prompt in (False, True)
            )
        except TEMPLATE_ERRORS as error:
            raise template_error(error, "the model") from None

    def text(self, messages: Messages) -> str:
        """A conversation as the model reads it, special tokens written out. Raises KvtunerError if the template cannot
        take it."""
        return self._formatted(self._formatter, messages, ())

    def prompt(self, messages: Messages, tools: Sequence[dict[str, Any]] = ()) -> str:
        """The same, up to where the model's answer starts. tools: the functions that it may call."""
        return self._formatted(self._prompter, messages, tools)

    def _formatted(self, formatter: Any, messages: Messages, tools: Sequence[dict[str, Any]]) -> str:
        try:
            return formatter(messages=list(messages), tools=list(tools) or None).prompt
        except TEMPLATE_ERRORS as error:
            again = folded(messages)
            if again is None:
                raise template_error(error, "the model") from None
            return self._formatted(formatter, again, tools)
