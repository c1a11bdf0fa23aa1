"""What native and model tests share: the patched library, tiny models, the default model."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from kvtuner_gguf.runtime import Session

# Matrices here are small: numpy's OpenBLAS takes twice the time with two threads, and five times beside other programs
# on the same processors, which its threads spin for. It reads this as it is loaded, which is after this file.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    needs_library = [item for item in items if item.get_closest_marker("native") or item.get_closest_marker("model")]
    missing = _missing() if needs_library else ""
    if missing:
        for item in needs_library:
            item.add_marker(pytest.mark.skip(reason=missing))


def _missing() -> str:
    """What a test that runs a model lacks; "" if nothing. Loads nothing."""
    from kvtuner_gguf import native
    from kvtuner_gguf.errors import NativeError

    try:
        folder = native.lib_dir()
    except NativeError as e:
        return str(e)
    if not any(folder.glob("*llama.*")):
        return f"no libllama in {folder}"
    return "" if find_spec("llama_cpp") else "no llama-cpp-python"


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """tiny("llama", head_dim=96) -> the file of models.tiny_llama(head_dim=96), written once. Do not change it."""
    import models

    folder, made = tmp_path_factory.mktemp("tiny"), {}

    def write(arch: str, **arguments: object) -> Path:
        key = f"{arch} {sorted(arguments.items())}"
        if key not in made:
            made[key] = getattr(models, f"tiny_{arch}")(folder / f"{len(made)}.gguf", **arguments)
        return made[key]

    return write


@pytest.fixture
def load() -> Iterator[Callable[..., Session]]:
    """load(path, **arguments of Session) -> a Session, closed at the end of the test.

    One thread if nothing else is said: the models are tiny, and the results are then the same in every run.
    """
    from kvtuner_gguf.runtime import Session

    sessions = []

    def open_session(path: Path, **arguments: object) -> Session:
        sessions.append(Session(path, **{"n_threads": 1} | arguments))
        return sessions[-1]

    yield open_session
    for session in sessions:
        session.close()


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder, not there yet, that holds this test's cache folder and is its home."""
    for name in ("XDG_CACHE_HOME", "LOCALAPPDATA", "HOME"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def short_chunks(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A calibration of texts that a tiny model reads in moments, with this test's cache folder."""
    from kvtuner_gguf.calibrate import pipeline

    monkeypatch.setattr(pipeline, "STREAM", 256)
    monkeypatch.setattr(pipeline, "SEARCH_CTX", 128)


@pytest.fixture
def signals_as_at_start() -> Iterator[None]:
    """SIGHUP and SIGINT as a program in the foreground has them: under nohup, and in the background of a script, they
    are ignored, which children inherit."""
    names = [name for name in ("SIGHUP", "SIGINT") if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in (getattr(signal, name) for name in names)}
    for number in before:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def smol() -> Path:
    """The default small model; the test is skipped where it cannot be fetched."""
    from kvtuner_gguf.default_model import default_model
    from kvtuner_gguf.errors import KvtunerError

    try:
        return default_model()
    except KvtunerError as e:
        pytest.skip(str(e))
