"""Models and contexts made and freed over and over: the process stays as large as it was."""

from __future__ import annotations

import ctypes
import gc
import os
import random
from pathlib import Path

import numpy as np
from fault import need
from models import tiny_llama
from running import feed, mixture, prompt, vectors

from kvtuner_gguf import Llama, Plan
from kvtuner_gguf.gguf_file import write_plan
from kvtuner_gguf.runtime import Session

WARM_UP = 12  # objects; until then the process may grow
MOST_GROWTH = 8 << 20  # bytes from then on, of the 200 to 600 objects of a long attack: one context is as large


class Attack:
    def __init__(self, folder: Path) -> None:
        import llama_cpp

        plain = tiny_llama(folder / "a.gguf", n_layer=2)
        self.plan = Plan(tuple(mixture(2)), k_vectors=(vectors(0), vectors(1)))
        self.path = write_plan(plain, self.plan, folder / "b.gguf")
        self.makers = {
            "Session": self._session,
            "kvtuner_gguf.Llama": lambda rng: self._llama(Llama),
            "llama_cpp.Llama": lambda rng: self._llama(llama_cpp.Llama),
        }
        self.made, self.base, self.texts = 0, 0, set()

    def attempt(self, rng: random.Random) -> str:
        name = [*self.makers][self.made % len(self.makers)]
        self.makers[name](rng)
        self.made += 1
        size = _resident()
        if self.made <= WARM_UP:
            self.base = max(self.base, size)
        need(
            size <= self.base + MOST_GROWTH, f"{self.made} objects: {size >> 20} MiB, {self.base >> 20} after {WARM_UP}"
        )
        return name

    def _session(self, rng: random.Random) -> None:
        with Session(self.path, n_threads=1) as session, session.context(2048) as ctx:
            if rng.random() < 0.5:
                session.set_plan(self.plan.pairs, self.plan.k_vectors)
            need(bool(np.isfinite(feed(ctx, prompt(16))).all()), "logits that are not finite")

    def _llama(self, kind: type) -> None:
        llm = kind(str(self.path), n_ctx=2048, n_threads=1, n_threads_batch=1, flash_attn=True, verbose=False)
        answer = llm.create_completion("river stone", max_tokens=4, temperature=0.0)["choices"][0]["text"]
        llm.close()
        self.texts.add(answer)
        need(len(self.texts) == 1, f"the same prompt gave {sorted(self.texts)}")


def _resident() -> int:
    """Bytes that the process holds, once what is free is given back."""
    gc.collect()
    if hasattr(ctypes.CDLL(None), "malloc_trim"):
        ctypes.CDLL(None).malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
