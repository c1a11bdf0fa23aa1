"""K/V cache types per layer for GGUF models: calibrate once, run anywhere llama.cpp runs.

Where it is installed, llama_cpp uses the patched library, so that `llama_cpp.Llama` obeys a plan in the file, too: see
import_hook.
"""

from __future__ import annotations

import sys
from importlib import import_module

from . import import_hook

TYPE_CHECKING = False  # typing's is not worth its import
if TYPE_CHECKING:
    from .errors import CalibrationError, CodecError, KvtunerError, NativeError, PlanError
    from .geometry import Geometry
    from .llama import Llama
    from .pair import Pair
    from .plan import Plan
    from .quality import Quality

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

_WHERE = {name: name.lower() for name in __all__ if not name.endswith("Error")}


def __getattr__(name: str) -> object:
    """Imports what is asked for: the package itself is imported at every start of Python."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_WHERE.get(name, 'errors')}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


import_hook.install()
if "llama_cpp" in sys.modules:
    import_module(".native", __name__).check_our_library()
