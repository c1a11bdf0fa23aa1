"""The model to measure on: itself, or a copy of it whose weights the processor multiplies faster."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kvtuner_gguf.calibrate.records import CURE, read_bytes, write_record
from kvtuner_gguf.errors import CalibrationError, NativeError
from kvtuner_gguf.gguf_header import read_header
from kvtuner_gguf.machine import total_memory
from kvtuner_gguf.room import need, write_errors
from kvtuner_gguf.runtime import Session

GAIN = 1.5  # how many times as fast a copy must be, to be worth its disk and memory
SHARE = 0.25  # of the machine's memory that a copy may take
N_TOKENS = 512  # of the prompt that both are timed with
OWN, KINDS = "own", ("bf16", "f16")
CHOICE, COPY = "weights.txt", "weights.gguf"


@contextmanager
def search_session(
    model: Path,
    folder: Path,
    *,
    n_threads: int | None,
    n_gpu_layers: int,
    may_copy: bool = True,
    say: Callable[[str], None],
    scratch: Path | None = None,
    timed: Callable[[Session, float, float], None] | None = None,
) -> Iterator[Session]:
    """A session of the model, or of a copy in 16-bit floats where prompts run GAIN times as fast on it.

    llama.cpp multiplies many quantized types (q4_1, q5_K, iq3_s) slower than bf16 or f16 on a processor. Cached K and V
    are the same but for rounding, and what is measured on a copy is measured against that copy's own f16 cache. The
    noise floor is lower there, as activations are not rounded to 8 bits.
    folder   keeps the choice, so that a search that goes on does so with the same weights
    scratch  keeps the copy, while the session lives; folder by default
    timed    is told the model, and the seconds of a prompt's token on it and on what is searched on, where nothing was
             chosen before
    """
    choice, copy = folder / CHOICE, (scratch or folder) / COPY
    sizes: dict[str, Any] = {"n_threads": n_threads, "n_gpu_layers": n_gpu_layers}
    may_copy = may_copy and not n_gpu_layers
    copy.unlink(missing_ok=True)  # of a run that was killed
    try:
        with Session(model, **sizes) as own:
            if _chosen(choice) is None and (may_copy or timed):
                prompt = _seconds(own)
                kind, gain = _faster(own, prompt, copy, sizes) if may_copy else (OWN, 1.0)
                if kind != OWN:
                    say(
                        f"search and proof on a copy of the model in {kind}, which reads a prompt {gain:.1f} times as "
                        "fast; the plan on the model itself at the end"
                    )
                if may_copy:
                    write_record(choice, kind.encode())
                if timed:
                    per_token = prompt / own.fitting(N_TOKENS)
                    timed(own, per_token, per_token if kind == OWN else per_token / gain)
            kind = _chosen(choice) or OWN if may_copy else OWN
            if kind == OWN:
                copy.unlink(missing_ok=True)  # it was tried, and was no faster
                yield own
                return
            if not copy.exists():
                _make(own, copy, kind)
        with Session(copy, **sizes) as fast:
            yield fast
    finally:
        copy.unlink(missing_ok=True)


@contextmanager
def session_of(
    model: Path, folder: Path, copy_kind: str | None, *, n_threads: int | None, n_gpu_layers: int
) -> Iterator[Session]:
    """A session of the model, or of a copy of that type, which is made in the folder."""
    sizes: dict[str, Any] = {"n_threads": n_threads, "n_gpu_layers": n_gpu_layers}
    if copy_kind is None:
        with Session(model, **sizes) as session:
            yield session
        return
    copy = folder / COPY
    with Session(model, **sizes) as own:
        _make(own, copy, copy_kind)
    try:
        with Session(copy, **sizes) as session:
            yield session
    finally:
        copy.unlink(missing_ok=True)


def _faster(own: Session, prompt: float, copy: Path, sizes: dict[str, Any]) -> tuple[str, float]:
    """The type of a copy that is worth making, and what it gains; OWN if none is. Leaves the copy on disk.

    prompt  seconds of one on the model
    """
    matrices = {t.type_name for t in read_header(own.path).tensors if len(t.shape) > 1}
    n_bytes = 2 * own.n_params
    if (
        matrices <= {"f32", "f16", "bf16"}
        or n_bytes > SHARE * total_memory()
        or 2 * n_bytes > shutil.disk_usage(copy.parent).free
    ):
        return OWN, 1.0
    kind = KINDS["BF16 = 1" not in own.system_info()]
    try:
        _make(own, copy, kind)
        with Session(copy, **sizes) as fast:
            gain = prompt / _seconds(fast)
    except (CalibrationError, NativeError):
        return OWN, 1.0
    return (kind, gain) if gain >= GAIN else (OWN, gain)


def copy_type(session: Session, model: Path, folder: Path) -> str | None:
    """The type of the weights of the copy that this session is of; None if it is of the model itself.

    folder  keeps the choice
    """
    return None if session.path == model else _chosen(folder / CHOICE)


def _chosen(choice: Path) -> str | None:
    """What was chosen before; None if nothing was, or the record is damaged."""
    kinds = {kind.encode(): kind for kind in (OWN, *KINDS)}
    return kinds.get(read_bytes(choice) or b"")


def _make(own: Session, copy: Path, kind: str) -> None:
    """Write the copy, for its owner alone. Raises CalibrationError where there is no room, NativeError."""
    with write_errors(copy, 2 * own.n_params, CURE, CalibrationError):
        need(copy.parent, 2 * own.n_params)
        copy.touch(mode=0o600)
    own.save_as(copy, kind)


def _seconds(session: Session) -> float:
    """Of a prompt; the best of two, after one to warm up."""
    n_tokens = session.fitting(N_TOKENS)
    rows = [(i % session.n_vocab, i, 0) for i in range(n_tokens)]
    outputs = [False] * (n_tokens - 1) + [True]
    times = []
    with session.context(n_tokens, None) as ctx:
        for _ in range(3):
            ctx.clear()
            start = time.perf_counter()
            ctx.decode(rows, outputs)
            times.append(time.perf_counter() - start)
    return min(times[1:])
