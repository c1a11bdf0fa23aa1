"""What llama.cpp logs: kept, so that a failure can be explained."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

from . import native
from .interrupts import called_from_c
from .printable import printable

_WARNING, _ERROR = 3, 4  # ggml_log_level
_MOST = 20  # lines that are kept


class Log:
    """The last warnings and errors of llama.cpp, once it takes the process's log."""

    def __init__(self) -> None:
        native.library()
        from llama_cpp import llama_cpp

        self.lines: list[str] = []
        self.callback = llama_cpp.llama_log_callback(self._add)

    @called_from_c
    def _add(self, level: int, text: bytes, _user: object) -> None:
        if level in (_WARNING, _ERROR):
            self.lines = [*self.lines[1 - _MOST :], printable(text.decode(errors="replace").strip())]

    def take(self) -> None:
        """All that llama.cpp logs from now on."""
        from llama_cpp import llama_cpp

        llama_cpp.llama_log_set(self.callback, ctypes.c_void_p(0))

    def reason(self) -> str:
        """What llama.cpp said last, for the end of an error message."""
        return " | ".join(self.lines[-3:]) or "llama.cpp gave no reason"


@cache
def process_log() -> Log:
    """The log of the whole process, from the first call on. Never freed: llama.cpp keeps a pointer to its callback."""
    log = Log()
    log.take()
    return log


@contextmanager
def heard() -> Iterator[Log]:
    """What llama.cpp logs inside the block, which goes nowhere else; after it the log goes where it went before."""
    log = Log()
    from llama_cpp import llama_cpp

    before, user = llama_cpp.llama_log_callback(), ctypes.c_void_p()
    llama_cpp.llama_log_get(ctypes.byref(before), ctypes.byref(user))
    log.take()
    try:
        yield log
    finally:
        llama_cpp.llama_log_set(before, user)
