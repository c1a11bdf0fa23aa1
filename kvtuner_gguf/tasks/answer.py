"""An expected answer, of five kinds, and whether what a model wrote is it. No model here."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from kvtuner_gguf.errors import TaskError
from kvtuner_gguf.values import brief

_NUMBER = r"[-+]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)"
# where a model says that its answer comes: GSM8K's mark, TeX's, and in words
_SAID = (
    re.compile(rf"####\s*\$?({_NUMBER})"),
    re.compile(rf"\\boxed\{{\s*\\?\$?({_NUMBER})"),
)
_CHOICE_SAID = re.compile(r"(?:answer|option|choice)(?:\s+is)?\s*:?\s*[(*\"'`]*([A-Za-z0-9]+)\b", re.IGNORECASE)
_CLOSE = 1e-6  # of numbers, beside their own size


@dataclass(frozen=True)
class Answer:
    """What is expected.

    kind      exact   the whole text, but for white space at its ends
              number  a number: after '####', in '\\boxed{}', or else the last one
              choice  one of `among`: where the text says that its answer comes, or else the first that stands alone
              regex   a regular expression (Python's), anywhere in the text
              json    the first JSON value in the text, valid by `schema`, that has at least the expected values
    expected  the text, number, choice, pattern, or JSON value; None: any that the schema takes
    among     the choices
    schema    a JSON schema
    Raises TaskError for a value that is none of its kind.
    """

    kind: str
    expected: Any
    among: tuple[str, ...] = ()
    schema: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.kind not in _JUDGES:
            raise TaskError(f"kind of answer '{self.kind}' is not known. Use one of: {', '.join(_JUDGES)}.")
        if self.kind == "json":
            _check_schema(self.schema)
            return
        if self.kind == "number":
            if isinstance(self.expected, bool) or _number(str(self.expected)) is None:
                raise TaskError(f"number: got {brief(self.expected)}, need a number.")
            return
        if not isinstance(self.expected, str):
            raise TaskError(f"{self.kind}: got {brief(self.expected)}, need a text.")
        if self.kind == "choice" and self.expected not in self.among:
            raise TaskError(f"choice: '{self.expected}' is none of the choices ({', '.join(self.among)}).")
        if self.kind == "regex":
            try:
                re.compile(self.expected)
            except re.error as error:
                raise TaskError(f"regex '{self.expected}': {error}. Mend it.") from None

    def is_in(self, text: str) -> bool:
        """Whether a model's text gives this answer."""
        return _JUDGES[self.kind](self, text)

    def is_valid(self, text: str) -> bool | None:
        """Whether the text has JSON that the schema takes, be its values right or not; None where none is expected."""
        return _valid_json(self, text)[0] if self.kind == "json" else None


def _exact(answer: Answer, text: str) -> bool:
    return text.strip() == answer.expected.strip()


def _is_number(answer: Answer, text: str) -> bool:
    found = number_in(text)
    expected = _number(str(answer.expected))
    return found is not None and expected is not None and math.isclose(found, expected, rel_tol=_CLOSE, abs_tol=_CLOSE)


def number_in(text: str) -> float | None:
    """The number that a text comes to; None if it has none."""
    for said in _SAID:
        if found := said.findall(text):
            return _number(found[-1])
    found = re.findall(_NUMBER, text)
    return _number(found[-1]) if found else None


def _number(text: str) -> float | None:
    try:
        value = float(text.replace(",", ""))
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _is_choice(answer: Answer, text: str) -> bool:
    said = [c for c in _CHOICE_SAID.findall(text) if c in answer.among]
    if said:
        return said[-1] == answer.expected
    names = "|".join(re.escape(c) for c in sorted(answer.among, key=len, reverse=True))
    alone = re.search(rf"(?<!\w)(?:{names})(?!\w)(?!'\w)", text)
    return alone is not None and alone[0] == answer.expected


def _matches(answer: Answer, text: str) -> bool:
    return re.search(answer.expected, text) is not None


def _is_json(answer: Answer, text: str) -> bool:
    valid, value = _valid_json(answer, text)
    return valid and (answer.expected is None or _has(value, answer.expected))


def _valid_json(answer: Answer, text: str) -> tuple[bool, Any]:
    """(whether there is one that the schema takes, the first JSON object or array in a text)"""
    found, value = json_in(text)
    if not found or answer.schema is None:
        return found, value
    from jsonschema.validators import validator_for

    return validator_for(answer.schema)(answer.schema).is_valid(value), value


def json_in(text: str) -> tuple[bool, Any]:
    """(whether there is one, the first JSON object or array in a text)"""
    decoder = json.JSONDecoder()
    for start in re.finditer(r"[{\[]", text):
        try:
            return True, decoder.raw_decode(text, start.start())[0]
        except (ValueError, RecursionError):
            continue
    return False, None


def _has(value: Any, expected: Any) -> bool:
    """Whether a JSON value is the expected one, or an object that has more."""
    if isinstance(expected, dict):
        return isinstance(value, dict) and all(k in value and _has(value[k], v) for k, v in expected.items())
    if isinstance(expected, list):
        return isinstance(value, list) and len(value) == len(expected) and all(map(_has, value, expected))
    if isinstance(value, bool) or isinstance(expected, bool):
        return value is expected
    return value == expected  # 3 == 3.0


def _check_schema(schema: object) -> None:
    if schema is None:
        return
    from jsonschema.exceptions import SchemaError
    from jsonschema.validators import validator_for

    if not isinstance(schema, dict):
        raise TaskError(f"schema: got {brief(schema)}, need a JSON object.")
    try:
        validator_for(schema).check_schema(schema)
    except SchemaError as error:
        raise TaskError(f"schema: {error.message}. Mend it.") from None


_JUDGES: dict[str, Callable[[Answer, str], bool]] = {
    "exact": _exact,
    "number": _is_number,
    "choice": _is_choice,
    "regex": _matches,
    "json": _is_json,
}
KINDS = tuple(_JUDGES)
