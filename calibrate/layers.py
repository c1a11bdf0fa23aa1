"""Work on layers that do not need each other, several at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

MOST_AT_ONCE = 4  # each holds a layer's Q, K and V

Made = TypeVar("Made")


def of_layers(work: Callable[[int], Made], il: Sequence[int], n_threads: int = 1) -> Iterator[Made]:
    """work(il) of each layer, in their order. An error, or an end of the iteration, leaves those out that have not
    begun.

    NumPy's products run on one thread meanwhile: two layers whose products share all processors wait for each other,
    and take half as long again as one after the other.
    """
    n_at_once = min(n_threads, MOST_AT_ONCE)
    if n_at_once < 2:
        yield from map(work, il)
        return
    from threadpoolctl import threadpool_limits

    pool = ThreadPoolExecutor(n_at_once)
    with threadpool_limits(1, "blas"):
        try:
            yield from pool.map(work, il)
        finally:
            pool.shutdown(cancel_futures=True)
