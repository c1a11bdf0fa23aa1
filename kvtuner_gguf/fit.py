"""What a model takes of memory at a context, and the largest context that fits: asked of the run time, without loading
weights."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from . import rpc
from .in_force import asked_plan
from .machine import available_memory
from .native import Memory
from .pair import USUAL, Pair, allocated_pairs
from .plan import Plan
from .runtime import Session
from .shown import shown

STEP = 256  # tokens that llama.cpp's caches grow by
F16, PLAN = "f16", "plan"  # names of rows


@dataclass(frozen=True)
class FitRow:
    """One cache.

    bits_per_value  as its plan counts them, with K's vectors as the file holds them
    memory          at the context asked for; the run time adds the inverses of K's vectors
    most_ctx        the largest context that fits, up to what the model was trained for; 0 = none does
    """

    name: str
    bits_per_value: float
    memory: Memory
    most_ctx: int


@dataclass(frozen=True)
class Fit:
    """What fits.

    n_ctx        the context asked for   n_ctx_train  what the model was trained for
    available    bytes that all of it may take
    left         bytes that are left at n_ctx for K and V; below 0 where weights and buffers alone are too large
    left_bits    the same in bits per cached value; 0 for a model that caches nothing
    rows         f16, the usual pairs that every layer can take, and the plan if there is one
    notes        what was wrong with the plan, one line each
    """

    n_ctx: int
    n_ctx_train: int
    available: int
    left: int
    left_bits: float
    rows: tuple[FitRow, ...]
    notes: tuple[str, ...] = ()


def fit(
    model: Path,
    plan: Plan | str | os.PathLike[str] | None = None,
    *,
    n_ctx: int = 8192,
    memory: int | None = None,
    n_gpu_layers: int = 0,
) -> Fit:
    """What each cache takes at n_ctx tokens of one sequence, and how many tokens fit.

    plan    instead of the one in the file
    memory  bytes that weights, cache and buffers may take together; None = what the machine has free, or, with layers
            on RPC hosts, what these have free together
    Raises NativeError for a model or a context that cannot be had, PlanError for a plan that is not the model's.
    """
    limit = memory if memory is not None else _free(n_gpu_layers)
    of_plan = shown(model, plan, n_ctx=n_ctx, n_gpu_layers=n_gpu_layers)
    notes = list(of_plan.notes)
    with Session(model, no_alloc=True, n_gpu_layers=n_gpu_layers) as session:
        n_ctx_train = session.fitting(session.n_ctx_train or n_ctx)

        def row(name: str, n_bytes: int, memory: Memory) -> FitRow:
            """Of what is in force, whose K and V take so many bytes."""

            def total(n: int) -> int:
                with session.context(n) as ctx:
                    return ctx.memory().total

            return FitRow(name, of_plan.geometry.bits_of(n_bytes), memory, largest(total, limit, n_ctx_train))

        planned = []
        if of_plan.source != "none":
            session.put_in_force(asked_plan(plan))
            with session.context(n_ctx) as ctx:
                of_it = ctx.memory()
            planned.append(row(PLAN, of_plan.geometry.bytes(of_plan.pairs) + of_plan.vector_bytes, of_it))
        rows = []
        for pair in (Pair(F16, F16), *USUAL):
            session.set_plan([pair] * session.n_layer)
            with session.context(n_ctx) as ctx:
                pairs, of_it, fallbacks = allocated_pairs(ctx.layers(), session.n_layer), ctx.memory(), ctx.notes()
            if fallbacks:
                notes.append(f"{pair}: left out, as not every layer of this model can take it")
            else:
                rows.append(row(F16 if pair.type_k == F16 else str(pair), of_plan.geometry.bytes(pairs), of_it))
    n_f16 = 2 * of_plan.geometry.n_values
    left = limit - (rows[0].memory.total - n_f16)  # f16's is the first
    left_bits = of_plan.geometry.bits_of(left)
    return Fit(n_ctx, n_ctx_train, limit, left, left_bits, (*rows, *planned), tuple(notes))


def _free(n_gpu_layers: int) -> int:
    hosts = rpc.in_use() if n_gpu_layers else ()
    return sum(host.free for host in hosts) or available_memory()


def largest(n_bytes: Callable[[int], int], limit: int, most: int) -> int:
    """The largest context of whole STEPs whose bytes are within the limit, or `most` if that is; 0 if none is.

    n_bytes  of a context: more for a larger one, nearly in proportion
    """
    if (of_most := n_bytes(most)) <= limit:
        return most
    low, high = 1, -(-most // STEP)  # in steps: fits, does not
    of_low, of_high = n_bytes(STEP), of_most
    if high == low or of_low > limit:
        return 0
    while high - low > 1:
        step = low + (limit - of_low) * (high - low) // max(1, of_high - of_low)
        step = min(max(step, low + 1), high - 1)
        of_step = n_bytes(step * STEP)
        if of_step <= limit:
            low, of_low = step, of_step
        else:
            high, of_high = step, of_step
    return low * STEP
