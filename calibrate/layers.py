"""Work on layers that do not need each other, several at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

MOST_AT_ONCE = 4  # each holds a layer's Q, K and V, and NumPy's products run on several threads by themselves

Made = TypeVar("Made")


def of_layers(work: Callable[[int], Made], il: Sequence[int], n_threads: int = 1) -> Iterator[Made]:
    """work(il) of each layer, in their order. An error, or an end of the iteration, leaves those out that have not
    begun."""
    n_at_once = min(n_threads, MOST_AT_ONCE)
    if n_at_once < 2:
        yield from map(work, il)
        return
    pool = ThreadPoolExecutor(n_at_once)
    try:
        yield from pool.map(work, il)
    finally:
        pool.shutdown(cancel_futures=True)
