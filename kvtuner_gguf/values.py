"""Values on their way into a plan: checked, kept as they are stored, and named in an error."""

from __future__ import annotations

import base64
import re
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from numbers import Integral, Real
from typing import Any

import numpy as np

from .errors import CodecError, PlanError

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")  # would garble a terminal, or has no UTF-8


@contextmanager
def blamed_on(where: object) -> Iterator[None]:
    """Turns a CodecError or PlanError of the block into a PlanError that starts with where."""
    try:
        yield
    except (CodecError, PlanError) as err:
        raise PlanError(f"{where}: {err}") from err


def checked(key: str, kind: str, value: Any) -> Any:
    """The value as it is stored, or PlanError if it is not of this kind."""
    if kind == "arr_str" and isinstance(value, (list, tuple)) and all(map(_is_text, value)):
        return list(value)
    if kind == "arr_f32" and isinstance(value, (list, tuple)):
        if all(type(x) is float for x in value) and np.isfinite(kept := _f32(value)).all():
            return [float(str(x)) for x in kept]
        return [checked(key, "f32", x) for x in value]
    if kind == "arr_u32" and isinstance(value, (list, tuple)):
        return [checked(key, "u32", x) for x in value]
    if kind == "arr_i8" and (found := _int8_bytes(value)) is not None:
        return found
    if kind == "str" and _is_text(value):
        return value
    if kind == "u32" and isinstance(value, Integral) and not isinstance(value, bool) and 0 <= int(value) < 1 << 32:
        return int(value)
    if kind == "f32" and isinstance(value, Real) and not isinstance(value, bool):
        with suppress(OverflowError):
            if np.isfinite(kept := _f32([float(value)])[0]):
                return float(str(kept))
    need = {
        "arr_str": "an array of strings",
        "arr_f32": "an array of floats",
        "arr_u32": "an array of whole numbers",
        "arr_i8": "whole numbers from -128 to 127, or the base64 of their bytes",
        "str": "one line of text",
        "f32": "a finite 32-bit float",
    }
    raise PlanError(f"{key}: got {brief(value)}, need {need.get(kind, 'a whole number below 2^32')}. Calibrate again.")


def as_json(values: bytes) -> str:
    """An array of 8-bit numbers as JSON holds it."""
    return base64.b64encode(values).decode()


def _int8_bytes(value: object) -> bytes | None:
    """An array of 8-bit numbers as it is kept, one byte each; None if the value is none."""
    if isinstance(value, bytes):
        return value
    with suppress(ValueError, struct.error):  # no base64; no whole number, or out of range
        if isinstance(value, str):
            return base64.b64decode(value, validate=True)
        if isinstance(value, (list, tuple)) and not any(isinstance(x, bool) for x in value):
            return struct.pack(f"{len(value)}b", *value)
    return None


def _is_text(value: object) -> bool:
    return isinstance(value, str) and not _CONTROL.search(value)


def _f32(values: Sequence[float]) -> np.ndarray:
    """As f32, whose str() is the decimal with the fewest digits that is the same, so that JSON and GGUF read back
    alike; infinite if too large."""
    with np.errstate(over="ignore"):
        return np.array(values, np.float32)


def brief(value: object) -> str:
    """The value as an error shows it, 60 characters at most."""
    try:
        text = repr(value)
    except RecursionError:
        text = f"a {type(value).__name__} of many levels"
    return text if len(text) <= 60 else text[:57] + "..."
