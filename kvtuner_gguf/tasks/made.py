"""A set of tasks of our own, made from a seed: what a long chat, a document and an agent ask of a cache."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from itertools import product
from random import Random
from typing import Any

from kvtuner_gguf.errors import TaskError
from kvtuner_gguf.tasks.answer import Answer
from kvtuner_gguf.tasks.task import Task

N_EACH = 25  # tasks of an area
SHORT_TOKENS = 600  # of a document in the short set
LEAST_TOKENS, MOST_TOKENS = 512, 1 << 20
_REST = 200  # tokens of a chat template, the instructions and a question

_FIRST = ("Ta", "Mo", "Ke", "Lu", "Hal", "Bren", "Is", "Ru", "Vel", "Os", "Jor", "Ni")
_MIDDLE = ("vi", "ra", "de", "lo", "mi", "sa", "ne", "ko", "ri", "ta")
_LAST = ("n", "s", "ra", "l", "th", "na", "rik", "d", "va", "m")
_HOUSES = ("berg", "lund", "ford", "sten", "wick", "mar", "holt", "dale", "ros", "heim")
_GOODS = ("barley", "copper wire", "lamp oil", "roof tiles", "salt", "window glass", "wool", "tea", "nails")
_PLACES = ("harbour", "mill", "north gate", "rail yard", "old market", "quarry", "river dock", "upper town")
_DEPOTS = tuple(
    map("".join, product(("Oak", "Stone", "Fern", "Salt", "Wolf"), ("bridge", "gate", "ton", "well", "by")))
)
_VERBS = ("create", "update", "cancel", "find", "export", "approve", "archive", "assign", "schedule", "merge")
_NOUNS = ("invoice", "shipment", "customer", "contract", "ticket", "report", "meeting", "vehicle", "refund")
_Order = tuple[str, dict[str, Any]]  # its number, and what a record holds
_FIELDS: dict[str, tuple[str, Callable[[Random], Any]]] = {
    "reference": ("string", lambda rng: f"{rng.choice('ABCDEFGH')}{rng.choice('KLMNPQR')}-{rng.randint(1000, 9999)}"),
    "quantity": ("integer", lambda rng: rng.randint(2, 98)),
    "owner": ("string", lambda rng: _name(rng)),
    "city": ("string", lambda rng: rng.choice(("Bergen", "Lyon", "Porto", "Graz", "Turku", "Ghent", "Cork", "Parma"))),
    "priority": ("string", lambda rng: rng.choice(("low", "normal", "high"))),
    "days": ("integer", lambda rng: rng.randint(3, 60)),
    "dry_run": ("boolean", lambda rng: rng.choice((True, False))),
}


def made_tasks(spec: str, seed: int, count: Callable[[str], int]) -> tuple[Task, ...]:
    """The tasks of "short", or of "long:N" with N tokens in each prompt.

    arithmetic  (short) sums in two steps
    needle      a code in one line of a document
    copy        a made-up name at the document's start, letter for letter
    json        one of the document's records as a JSON object of a schema
    tools       a call of one of the functions that a prompt describes: its name and its arguments
    All tasks but the first and the last kind share a document, the last a list of functions.

    count  tokens of a text
    Raises TaskError for a spec that is none.
    """
    n_tokens = _n_tokens(spec)
    rng = Random(f"{spec} {seed}")
    about = list(_about_document(rng, n_tokens, count))
    short = list(_arithmetic(rng)) if spec == "short" else []
    return (*short, *about, *_tools(rng, n_tokens, count))


def is_made(spec: str) -> bool:
    """Whether this asks for a set of ours, and names no file."""
    return spec == "short" or spec.startswith("long:")


def _n_tokens(spec: str) -> int:
    if spec == "short":
        return SHORT_TOKENS
    number = spec.removeprefix("long:")
    if not re.fullmatch(r"\d{1,9}", number) or not LEAST_TOKENS <= int(number) <= MOST_TOKENS:
        raise TaskError(
            f"tasks '{spec}': need a number of tokens from {LEAST_TOKENS} to {MOST_TOKENS}. "
            "Write for example long:8192."
        )
    return int(number)


def _name(rng: Random) -> str:
    """First and last name that no text has."""
    first = rng.choice(_FIRST) + rng.choice(_MIDDLE) + rng.choice(_LAST)
    return f"{first} {rng.choice(_FIRST)}{rng.choice(_MIDDLE)}{rng.choice(_HOUSES)}"


def _unlike(make: Callable[[], str], n: int) -> list[str]:
    """n texts, no two alike."""
    found: dict[str, None] = {}
    while len(found) < n:
        found[make()] = None
    return list(found)


def _user(text: str) -> tuple[dict[str, Any], ...]:
    return ({"role": "user", "content": text},)


def _arithmetic(rng: Random) -> Iterator[Task]:
    for i in range(N_EACH):
        boxes, each, good = rng.randint(3, 12), rng.randint(4, 25), rng.choice(_GOODS)
        sold = rng.randint(2, boxes * each - 1)
        text = (
            f"{_name(rng)} has {boxes} boxes with {each} kilograms of {good} in each, and sells {sold} kilograms. How "
            "many kilograms are left? Work it out in one or two short lines, and end with #### and the number."
        )
        yield Task(f"arithmetic-{i}", _user(text), Answer("number", boxes * each - sold), "arithmetic", (), 160)


def _about_document(rng: Random, n_tokens: int, count: Callable[[str], int]) -> Iterator[Task]:
    guests = _unlike(lambda: _name(rng), N_EACH)
    depots = rng.sample(_DEPOTS, N_EACH)
    codes = _unlike(lambda: f"{rng.choice('ABCDEFGH')}{rng.randint(100, 999)}", N_EACH)
    seats = "\n".join(f"Seat {i + 1}: {guest}" for i, guest in enumerate(guests))
    head = f"Seats at the founders' dinner:\n{seats}\n\nOrder book and notes of the depots:\n"
    notes = [f"Note: the door code of the {d} depot is {code}." for d, code in zip(depots, codes)]
    orders, lines = _orders(rng, n_tokens - _REST - sum(map(count, (head, *notes))), count)
    for i, text in enumerate(notes):  # evenly through the book
        lines.insert(round((i + 0.5) * (len(lines) - i) / N_EACH) + i, text)
    document = head + "\n".join(lines) + "\n\n"
    for i, (depot, code) in enumerate(zip(depots, codes)):
        ask = f"What is the door code of the {depot} depot? Answer with the code only."
        yield Task(f"needle-{i}", _user(document + ask), Answer("regex", rf"\b{code}\b"), "needle", (), 24)
    for i, guest in enumerate(guests):
        ask = f"Who has seat {i + 1} at the founders' dinner? Answer with the full name only, spelled as above."
        yield Task(f"copy-{i}", _user(document + ask), Answer("regex", rf"\b{guest}\b"), "copy", (), 32)
    schema = {
        "type": "object",
        "properties": {
            "customer": {"type": "string"},
            "crates": {"type": "integer"},
            "good": {"type": "string"},
            "place": {"type": "string"},
            "paid": {"type": "boolean"},
        },
        "required": ["customer", "crates", "good", "place", "paid"],
    }
    step = max(1, len(orders) // N_EACH)
    for i, (number, order) in enumerate(orders[::step][:N_EACH]):
        ask = (
            f"Write order {number} as one JSON object that is valid by this schema, and nothing else:\n"
            f"{json.dumps(schema)}"
        )
        yield Task(f"json-{i}", _user(document + ask), Answer("json", order, (), schema), "json", (), 128)


def _orders(rng: Random, n_tokens: int, count: Callable[[str], int]) -> tuple[list[_Order], list[str]]:
    """Orders of about so many tokens, but N_EACH at least, and their lines."""
    orders: list[_Order] = []
    lines, have, number = [], 0, rng.randint(1000, 2000)
    while have < n_tokens or len(orders) < N_EACH:
        number += rng.randint(1, 9)
        order = {
            "customer": _name(rng),
            "crates": rng.randint(2, 90),
            "good": rng.choice(_GOODS),
            "place": rng.choice(_PLACES),
            "paid": rng.choice((True, False)),
        }
        lines.append(
            f"Order {number}: {order['customer']} takes {order['crates']} crates of {order['good']} to the "
            f"{order['place']}, {'paid' if order['paid'] else 'not paid yet'}."
        )
        orders.append((str(number), order))
        have += count(lines[-1])
    return orders, lines


def _tools(rng: Random, n_tokens: int, count: Callable[[str], int]) -> Iterator[Task]:
    tools: list[tuple[str, list[str]]] = []
    lines, have = [], 0
    names = [f"{verb}_{noun}" for verb in _VERBS for noun in _NOUNS]
    rng.shuffle(names)
    more = (f"{name}_{i}" for i in range(2, 1 << 16) for name in names)
    for name in (*names, *more):
        if have >= n_tokens - _REST and len(tools) >= 4:
            break
        fields = rng.sample(sorted(_FIELDS), 3)
        tools.append((name, fields))
        properties = {f: {"type": _FIELDS[f][0], "description": f"The {f.replace('_', ' ')} to use."} for f in fields}
        lines.append(
            json.dumps(
                {
                    "name": name,
                    "description": f"{name.replace('_', ' ').capitalize()} by its {fields[0].replace('_', ' ')}.",
                    "parameters": {"type": "object", "properties": properties, "required": fields},
                }
            )
        )
        have += count(lines[-1])
    listed = "You can call these functions:\n" + "\n".join(lines) + "\n\n"
    for i in range(N_EACH):
        name, fields = tools[(i * len(tools)) // N_EACH]
        arguments = {f: _FIELDS[f][1](rng) for f in fields}
        given = ", ".join(f"{f.replace('_', ' ')} {json.dumps(v)}" for f, v in arguments.items())
        ask = (
            f"{name.replace('_', ' ').capitalize()} with {given}. Answer with the call only, as one JSON object "
            '{"name": ..., "arguments": {...}}.'
        )
        expected = {"name": name, "arguments": arguments}
        yield Task(f"tools-{i}", _user(listed + ask), Answer("json", expected), "tools", (), 128)
