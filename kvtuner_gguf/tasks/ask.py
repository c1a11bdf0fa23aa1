"""Prompts -> what the model writes after each, token by token the likeliest, several sequences at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

from kvtuner_gguf.errors import TaskError
from kvtuner_gguf.plan import Plan
from kvtuner_gguf.runtime import Context, Session

LONG_PREFIX = 256  # tokens that prompts have in common, from which on they are read once for all
_STEP = 512  # tokens of a prompt that are read at once
_PAD = 256  # tokens that llama.cpp rounds a sequence's context up to


@dataclass(frozen=True)
class Prompt:
    """tokens  of the prompt   max_tokens  of the answer"""

    id: str
    tokens: tuple[int, ...]
    max_tokens: int

    @property
    def n_ctx(self) -> int:
        return len(self.tokens) + self.max_tokens


@dataclass(frozen=True)
class Group:
    """Prompts that start alike.

    n_prefix  tokens of each that are read once for all
    """

    prompts: tuple[Prompt, ...]
    n_prefix: int

    @property
    def n_ctx(self) -> int:
        """Tokens of the longest of them, with its answer, as llama.cpp rounds them."""
        return -(-max(p.n_ctx for p in self.prompts) // _PAD) * _PAD


def groups_of(prompts: Sequence[Prompt]) -> list[Group]:
    """The prompts, those together that have a long start in common, and at the end all that have none."""
    runs: list[list[Prompt]] = []
    for prompt in sorted(prompts, key=lambda p: p.tokens):
        if runs and _n_common(runs[-1][-1].tokens, prompt.tokens) >= LONG_PREFIX:
            runs[-1].append(prompt)
        else:
            runs.append([prompt])
    shared = [Group(tuple(run), _n_prefix(run)) for run in runs if len(run) > 1]
    single = [run[0] for run in runs if len(run) == 1]
    return shared + ([Group(tuple(single), 0)] if single else [])


def _n_prefix(run: Sequence[Prompt]) -> int:
    """Tokens that sorted prompts have in common, without the last one of the shortest, whose logits are wanted."""
    shortest = min(len(p.tokens) for p in run)
    return min(_n_common(run[0].tokens, run[-1].tokens), shortest - 1)


def _n_common(a: Sequence[int], b: Sequence[int]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b)))


@dataclass
class _Slot:
    """A sequence that is being answered: what was written, and the token that is to be read next."""

    prompt: Prompt
    written: list[int] = field(default_factory=list)


def write_answers(
    session: Session,
    plan: Plan | None,
    group: Group,
    n_slots: int,
    done: Callable[[Prompt, Sequence[int]], None],
    *,
    flash_attn: bool = True,
) -> None:
    """Answer a group's prompts on the cache of a plan, None = f16. done gets each with its tokens, as it ends.

    n_slots  sequences at once, at most
    Raises TaskError if the run time does not allocate what the plan asks for.
    """
    n_slots = min(n_slots, len(group.prompts))
    n_seq = n_slots + (group.n_prefix > 0)  # the last one holds what all have in common
    options: dict[str, Any] = {"n_seq_max": n_seq, "flash_attn": flash_attn}
    pairs, vectors = (plan.pairs, plan.k_vectors) if plan else (None, ())
    with session.context(n_seq * group.n_ctx, pairs, vectors, **options) as ctx:
        if plan and ctx.notes():
            raise TaskError(f"the run time left the plan: {' | '.join(ctx.notes())}")
        if group.n_prefix:
            _read(ctx, group.prompts[0].tokens[: group.n_prefix], 0, n_slots)
        waiting, slots = list(group.prompts[::-1]), dict[int, _Slot]()
        while waiting or slots:
            for seq in range(n_slots):
                if seq not in slots and waiting:
                    slots[seq] = _started(ctx, waiting.pop(), group.n_prefix, seq, n_slots)
            for seq in [seq for seq, slot in slots.items() if _ended(session, slot)]:
                slot = slots.pop(seq)
                done(slot.prompt, slot.written)
            if slots:
                _step(ctx, slots)


def _started(ctx: Context, prompt: Prompt, n_prefix: int, seq: int, holder: int) -> _Slot:
    """A sequence that has read its prompt, and written a token."""
    ctx.forget(seq)
    if n_prefix:
        ctx.copy(holder, seq)
    return _Slot(prompt, [_read(ctx, prompt.tokens[n_prefix:], n_prefix, seq)])


def _read(ctx: Context, tokens: Sequence[int], pos: int, seq: int) -> int:
    """Read tokens, of which there are some, from a position on -> the likeliest token after them."""
    for start in range(0, len(tokens), _STEP):
        part = tokens[start : start + _STEP]
        rows = [(token, pos + start + i, seq) for i, token in enumerate(part)]
        logits = ctx.decode(rows, [start + i == len(tokens) - 1 for i in range(len(part))])
    return int(logits[-1].argmax())


def _ended(session: Session, slot: _Slot) -> bool:
    return session.is_end(slot.written[-1]) or len(slot.written) >= slot.prompt.max_tokens


def _step(ctx: Context, slots: dict[int, _Slot]) -> None:
    """One more token of each."""
    rows = [(s.written[-1], len(s.prompt.tokens) + len(s.written) - 1, seq) for seq, s in slots.items()]
    logits = ctx.decode(rows, [True] * len(rows))
    for slot, token in zip(slots.values(), logits.argmax(axis=1)):
        slot.written.append(int(token))
