"""What attention reads and gives, handed to Python node by node: what capture listens to."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from . import native
from .errors import NativeError
from .interrupts import called_from_c


class Tap:
    """Hands every attention node to on_node(TapNode) while it is on. One Context at a time."""

    def __init__(self, on_node: Callable[[native.TapNode], None], n_q_max: int) -> None:
        self._error: BaseException | None = None

        @called_from_c
        def callback(node: Any, _user: object) -> None:
            if self._error is None:
                try:
                    on_node(node.contents)
                except BaseException as e:
                    self._error = e

        self.eval_callback = native.eval_callback("kvt_tap_eval")
        self._callback = native.TapCallback(callback)
        self.handle = native.library().kvt_tap_new(self._callback, None, n_q_max)
        if not self.handle:
            raise NativeError(native.last_error())

    @contextmanager
    def enabled(self) -> Iterator[None]:
        """On inside the block. Raises what on_node raised, or NativeError if a node could not be handed over."""
        lib = native.library()
        lib.kvt_tap_enable(self.handle, True)
        try:
            yield
        finally:
            lib.kvt_tap_enable(self.handle, False)
        if self._error is not None:
            raise self._error
        text = lib.kvt_tap_error(self.handle).decode()
        if text:
            raise NativeError(f"capture: {text}")

    def share(self, il: int) -> float | None:
        """|attention's branch|^2 / |residual stream after it|^2 of a layer, over the last batch; None if it was not
        seen."""
        value = ctypes.c_float()
        return value.value if native.library().kvt_tap_share(self.handle, il, ctypes.byref(value)) == 0 else None

    def close(self) -> None:
        native.library().kvt_tap_free(self.handle)
        self.handle = None
