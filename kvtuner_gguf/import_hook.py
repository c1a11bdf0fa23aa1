"""What a program that imports llama_cpp gets: the patched library, and flash attention where a plan needs it.

A .pth file imports the package at every start of Python in its environment, so that this module imports nothing of its
own before llama_cpp is asked for.
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False  # typing's is not worth its import
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from pathlib import Path
    from types import ModuleType
    from typing import Any

AS_ASKED = "as_asked_of_kvtuner"  # attribute of llama_cpp's model: plan and flash attention are as its caller said
_NAME, _DISTRIBUTION = "llama_cpp", "llama-cpp-python"


class _Finder:
    """Finds llama_cpp as the others do, and loads it with our library."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """None for all other modules."""
        if name != _NAME:
            return None
        others = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
        spec = next((found for found in others if found), None)
        if spec and spec.loader:
            _load_with_our_library(spec.loader)
        return spec


_FINDER = _Finder()


def install() -> None:
    """Make `import llama_cpp` load the patched library, from now on."""
    if _FINDER not in sys.meta_path:
        sys.meta_path.insert(0, _FINDER)


def _load_with_our_library(loader: Any) -> None:
    """The loader stays what it is, for who asks it for source or data."""
    load = loader.exec_module

    def exec_module(module: Any) -> None:
        folder = _our_library()
        if folder is None:
            load(module)
            return
        from .native import VARIABLE

        before = os.environ.get(VARIABLE)
        os.environ[VARIABLE] = str(folder)
        try:
            load(module)
        finally:  # a child of this process may be of another environment
            if before is None:
                del os.environ[VARIABLE]
            else:
                os.environ[VARIABLE] = before
        if hasattr(module.llama_cpp._lib, "kvt_build_id"):  # the variable may name a stock build
            _load_backends(module.llama_cpp._lib, folder)
            _obey_plans(module)

    loader.exec_module = exec_module


def _load_backends(lib: Any, folder: Path) -> None:
    """Backends that are files of their own, as in a wheel, of which the best for this processor is chosen. Left alone,
    llama.cpp would look for them beside Python, and in the current folder, whoever wrote there."""
    if not any(folder.glob("*ggml-cpu-*")):  # they are linked in, and a GPU's is not to be woken by an import
        return
    from .log import heard

    with heard():  # which one it is, is no news
        lib.ggml_backend_load_all_from_path(os.fsencode(folder))


def _our_library() -> Path | None:
    """The folder of the patched library; None if the package has none, or one for another llama_cpp."""
    from .errors import NativeError
    from .native import lib_dir
    from .threads import wait_briefly

    try:
        folder = lib_dir()
    except NativeError:
        return None
    have, need = _versions()
    if have != need:
        print(
            f"kvtuner-gguf: {_DISTRIBUTION} is {have}, our library is for {need}: left alone, so no plan is obeyed. "
            f"pip install {_DISTRIBUTION}=={need}",
            file=sys.stderr,
        )
        return None
    wait_briefly()
    return folder


def _versions() -> tuple[str, str]:
    """Of llama-cpp-python: that which is installed, and that which our library is for."""
    from importlib.metadata import PackageNotFoundError, requires, version

    try:
        have = version(_DISTRIBUTION)
        pins = [line.partition("==")[2] for line in requires("kvtuner-gguf") or () if line.startswith(_DISTRIBUTION)]
    except PackageNotFoundError:  # run from a folder
        return "", ""
    return have, pins[0] if pins else have


def _obey_plans(llama_cpp: Any) -> None:
    """A context of llama_cpp.Llama has the plan beside the model's file, if that holds none, and flash attention.
    Llama leaves that off if it is not told, and no cache can have a quantized V then: it becomes llama.cpp's own
    default, 'auto', where a plan in force quantizes V."""
    context = llama_cpp._internals.LlamaContext
    init = context.__init__

    def with_plan(self: Any, *, model: Any, params: Any, **kwargs: Any) -> None:
        if not getattr(model, AS_ASKED, False):
            _put_plan_beside_in_force(model)
            is_off = params.flash_attn_type == llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
            if is_off and _quantizes_v(model.model):
                params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_AUTO
        init(self, model=model, params=params, **kwargs)

    context.__init__ = with_plan


def _put_plan_beside_in_force(model: Any) -> None:
    """A stranger's model loads, whatever lies beside it."""
    from .errors import KvtunerError
    from .in_force import put_in_force

    try:
        put_in_force(model.model, None, None if model.params.kv_overrides else model.path_model)
    except KvtunerError as error:
        print(f"kvtuner-gguf: {error} The plan is not used.", file=sys.stderr)


def _quantizes_v(model: int) -> bool:
    from .codecs import codec
    from .native import plan_layers

    return any(v and codec(v).block_size > 1 for _, v in plan_layers(model) or ())
