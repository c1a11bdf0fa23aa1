"""A Llama of a tiny model."""

from __future__ import annotations

import pytest
from chats import PLAN

from kvtuner_gguf.gguf_file import write_plan


@pytest.fixture
def llama(tiny):
    """llama(arch, **arguments) -> a Llama of a tiny model in small batches, closed at the end of the test."""
    from kvtuner_gguf import Llama

    opened = []

    def make(arch, *, path=None, **arguments):
        sizes = {"n_ctx": 1024, "n_batch": 64, "n_ubatch": 64, "n_threads": 1, "n_threads_batch": 1} | arguments
        path = path or (tiny("qwen2", images=True) if arch == "qwen2 with images" else tiny(arch))
        opened.append(Llama(path, verbose=False, **sizes))
        return opened[-1]

    yield make
    for llm in opened:
        llm.close()


@pytest.fixture
def objects(llama, tiny, tmp_path):
    """objects(**arguments) -> a Llama of PLAN's file; `seed` of other weights."""

    def make(seed=0, **arguments):
        path = tmp_path / f"{seed}.gguf"
        if not path.exists():
            write_plan(tiny("llama", seed=seed), PLAN, path)
        return llama("llama", path=path, **arguments)

    return make
