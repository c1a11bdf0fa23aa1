"""What the machine has."""

from __future__ import annotations

import math
import os

from .errors import NativeError


def total_memory() -> float:
    """Bytes of the machine's memory; infinite where the system does not tell."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else math.inf


def check_memory(n_bytes: int, n_ctx: int) -> None:
    """Raises NativeError if a cache of n_bytes does not fit into the machine's memory, instead of being killed for
    it."""
    total = total_memory()
    if n_bytes > total:
        raise NativeError(
            f"context of {n_ctx} tokens: its K/V cache needs {n_bytes / 2**30:.1f} GiB, the machine has "
            f"{total / 2**30:.1f} GiB. Use a smaller -c, or a plan of fewer bits."
        )
