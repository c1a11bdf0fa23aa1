"""What the machine has."""

from __future__ import annotations

import psutil

from .errors import NativeError


def total_memory() -> int:
    """Bytes of the machine's memory."""
    return psutil.virtual_memory().total


def available_memory() -> int:
    """Bytes that a program can have without others being swapped out."""
    return psutil.virtual_memory().available


def check_memory(n_bytes: int, n_ctx: int) -> None:
    """Raises NativeError if a cache of n_bytes does not fit into the machine's memory, instead of being killed for
    it."""
    total = total_memory()
    if n_bytes > total:
        raise NativeError(
            f"context of {n_ctx} tokens: its K/V cache needs {n_bytes / 2**30:.1f} GiB, the machine has "
            f"{total / 2**30:.1f} GiB. Use a smaller -c, or a plan of fewer bits."
        )
