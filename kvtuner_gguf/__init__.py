"""K/V cache types per layer for GGUF models: calibrate once, run anywhere llama.cpp runs.

Importing this package makes llama_cpp use the patched library, so that `llama_cpp.Llama` obeys a plan in the file, too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .errors import CalibrationError, CodecError, KvtunerError, NativeError, PlanError
from .geometry import Geometry
from .pair import Pair
from .plan import Plan
from .quality import Quality

if TYPE_CHECKING:
    from .llama import Llama

__version__ = "0.1.0"

__all__ = [
    "CalibrationError",
    "CodecError",
    "Geometry",
    "KvtunerError",
    "Llama",
    "NativeError",
    "Pair",
    "Plan",
    "PlanError",
    "Quality",
]


def _prepare_library() -> None:
    """Point llama_cpp at our library; a package without one (built for its Python part alone) can still read plans."""
    from . import native

    try:
        native.lib_dir()
    except NativeError:
        return
    native.use_our_library()


def __getattr__(name: str) -> object:
    if name == "Llama":  # imports llama_cpp, which takes a moment
        from .llama import Llama

        return Llama
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


_prepare_library()
