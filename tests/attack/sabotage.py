"""The product made faulty on purpose, one function for each kind of attack, which must find that fault."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import BinaryIO

import numpy as np


def parser() -> None:
    """No length is compared with the file."""
    from kvtuner_gguf import gguf_header

    gguf_header.Parser._need = lambda self, n: None


def parser_writes() -> None:
    """The tensor data of a copy starts one byte late."""
    from kvtuner_gguf import gguf_file

    real = gguf_file._spliced
    gguf_file._spliced = lambda header, plan: [*real(header, plan)[:-1], b"\0", real(header, plan)[-1]]
    gguf_file._check_copy = lambda out, header, plan: None


def loader() -> None:
    """A crash for some of the files, as one in C would be."""
    from kvtuner_gguf import runtime

    real = runtime.Session.__init__

    def crashing(self: object, path: Path, **arguments: object) -> None:
        if Path(path).stat().st_size % 7 == 0:
            os.kill(os.getpid(), signal.SIGSEGV)
        real(self, path, **arguments)

    runtime.Session.__init__ = crashing


def hang() -> None:
    """An endless loop."""
    import gguf_parser

    def endless(path: Path) -> None:
        while True:
            pass

    gguf_parser.read_plan = endless


def sidecars() -> None:
    """Vectors are lost when a plan is copied."""
    from kvtuner_gguf.plan import Plan

    Plan.__reduce__ = lambda self: (Plan, (self.pairs,))


def states() -> None:
    """What is refused counts as taken."""
    import states as attack

    real = attack.restore
    attack.restore = lambda ctx, kind, state: real(ctx, kind, state) or len(state)


def objects() -> None:
    """Contexts are never freed."""
    from kvtuner_gguf.runtime import Context, Session

    Context.close = lambda self: None
    Session.close = lambda self: None


def shifts() -> None:
    """Tokens are dropped, and the rest stays where it was, but for the bookkeeping."""
    import running
    import shifts as attack

    def unmoved(ctx: object, n_keep: int, n_drop: int) -> None:
        ctx.clear()
        running.feed(ctx, running.prompt(255 - n_drop, seed=5))

    attack._shift = unmoved


def threads() -> None:
    """Beside other threads the logits are off in the last digits."""
    import threading

    import threads as attack

    real = attack.Attack._run
    attack.Attack._run = lambda self, job: (
        real(self, job) + np.float32(1e-4) * (threading.current_thread() is not threading.main_thread())
    )


def in_place() -> None:
    """What is written is copied over what stands there, piece by piece."""
    from kvtuner_gguf import gguf_file, plan

    @contextlib.contextmanager
    def opened(target: Path, *_: object, **__: object) -> Iterator[BinaryIO]:
        with tempfile.NamedTemporaryFile() as whole:
            yield whole
            whole.seek(0)
            with open(target, "wb", buffering=0) as out:
                while piece := whole.read(1 << 20):
                    need = memoryview(piece)
                    while need:
                        need = need[out.write(need) :]
                    time.sleep(0.001)

    gguf_file.atomic_file = plan.atomic_file = opened


def no_room() -> None:
    """As in_place, and nobody asks for room first."""
    in_place()
    shutil.disk_usage = lambda path: SimpleNamespace(free=1 << 60)


def leftover() -> None:
    """A write leaves a file beside its target."""
    from kvtuner_gguf import gguf_file

    real = gguf_file.atomic_file

    def leaving(target: Path, *args: object, **kwargs: object) -> contextlib.AbstractContextManager[BinaryIO]:
        target.with_suffix(".part").touch()
        return real(target, *args, **kwargs)

    gguf_file.atomic_file = leaving


def noise() -> None:
    """A plan is measured a little differently each time."""
    from kvtuner_gguf.calibrate import jobs

    real = jobs.measure
    jobs.measure = lambda *args, **kwargs: replace(real(*args, **kwargs), kld_p999=os.getpid() / 1e6)
