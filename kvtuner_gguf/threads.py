"""How many threads to run with."""

from __future__ import annotations

import os

from .errors import NativeError

MOST_THREADS = 512  # ggml's GGML_MAX_N_THREADS


def default_threads() -> int:
    """Threads to use if the user names none: the processors that this process may use."""
    found = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(found, MOST_THREADS)


def checked_threads(n_threads: int) -> int:
    """n_threads. Raises NativeError if ggml cannot run as many."""
    if not 1 <= n_threads <= MOST_THREADS:
        raise NativeError(f"threads: got {n_threads}, need 1 to {MOST_THREADS}. Use {default_threads()}, the processors there are.")
    return n_threads
