"""A command that is told to end does so in good order: what is open is closed, what is half written goes."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import CodeType, FrameType
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])

_CALLBACKS: set[CodeType] = set()
_IMPORT = "<frozen importlib._bootstrap>"
_AGAIN_S = 0.05


def called_from_c(function: Function) -> Function:
    """Marks a function that C code calls: an exception that a signal raised in it would be lost there."""
    _CALLBACKS.add(function.__code__)
    return function


@contextmanager
def orderly() -> Iterator[None]:
    """Inside the block SIGTERM and SIGHUP raise SystemExit, SIGINT KeyboardInterrupt, so that every `finally` runs.

    They do so after what C code called, and after an import that runs: both may lose an exception (modules in C try
    things and ignore what comes of it). For programs, not for the library: handlers are the process's. A signal that is
    ignored, as under nohup, stays so. Elsewhere than in the main thread nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    names = [name for name in ("SIGTERM", "SIGHUP", "SIGINT") if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in (getattr(signal, name) for name in names)}
    block = sys._getframe(2)  # the frame of the with statement: what it was imported by is none of its business
    for number, handler in before.items():
        if handler in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, partial(_end, block))
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:
                signal.signal(number, handler)


def _end(block: FrameType, number: int, frame: FrameType | None) -> None:
    if _would_be_lost(frame, block):  # once more, when that is over
        again = threading.Timer(_AGAIN_S, _send, (number,))
        again.daemon = True
        again.start()
        return
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    signal.signal(number, signal.SIG_IGN)  # what is told twice must not end the clearing up
    raise SystemExit(128 + number)


def _send(number: int) -> None:
    """The signal to the main thread, which may be asleep."""
    main = threading.main_thread().ident
    if hasattr(signal, "pthread_kill") and main is not None:
        signal.pthread_kill(main, number)
    else:
        signal.raise_signal(number)


def _would_be_lost(frame: FrameType | None, block: FrameType) -> bool:
    """Whether an exception raised in this frame may not get to the block."""
    while frame is not None and frame is not block:
        if frame.f_code in _CALLBACKS or frame.f_code.co_filename == _IMPORT:
            return True
        frame = frame.f_back
    return False
