"""How many threads to run with, and how they wait for each other."""

from __future__ import annotations

import os

from .errors import NativeError

MOST_THREADS = 512  # ggml's GGML_MAX_N_THREADS


# some 25 us: about as long as the parts of an operation differ, and far shorter than a slice of another program's time
_SPINS = 1000
_CHOICES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")


def wait_briefly() -> None:
    """Let OpenMP's threads sleep where the others are long in coming, unless the user has chosen how they wait.

    llama.cpp's threads meet after each operation. By itself libgomp has those that wait spin for milliseconds, which
    another program on the same processors pays for, and then the one that is waited for. Has to be called before the
    library is loaded. Measured by tests/bench/threads.py.
    """
    if not any(name in os.environ for name in _CHOICES):
        os.environ["GOMP_SPINCOUNT"] = str(_SPINS)


def default_threads() -> int:
    """Threads to use if the user names none: the processors that this process may use."""
    found = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(found, MOST_THREADS)


def checked_threads(n_threads: int) -> int:
    """n_threads. Raises NativeError if ggml cannot run as many."""
    if not 1 <= n_threads <= MOST_THREADS:
        raise NativeError(
            f"threads: got {n_threads}, need 1 to {MOST_THREADS}. Use {default_threads()}, the processors there are."
        )
    return n_threads
