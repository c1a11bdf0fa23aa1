"""Six threads, each with a model, a plan and a context of its own: each gets what it gets alone."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from fault import need
from models import tiny_gemma3, tiny_hybrid, tiny_qwen2
from running import feed, mixture, prompt, uniform, vectors

from kvtuner_gguf.runtime import Session

N_THREADS = 6
PLANS = ("mixture", "f16", "q8_0", "q4_0", "q3_64/q2_64", "q8_0/q4_0", "iq4_nl")


class Attack:
    def __init__(self, folder: Path) -> None:
        self.paths = [make(folder / f"{make.__name__}.gguf") for make in (tiny_gemma3, tiny_hybrid, tiny_qwen2)]
        self.alone: dict[tuple, np.ndarray] = {}

    def attempt(self, rng: random.Random) -> str:
        jobs = [
            (rng.randrange(len(self.paths)), rng.choice(PLANS), rng.random() < 0.5, rng.randrange(3))
            for _ in range(N_THREADS)
        ]
        want = [self._alone(job) for job in jobs]
        with ThreadPoolExecutor(N_THREADS) as pool:
            have = list(pool.map(self._run, jobs))
        for job, a, b in zip(jobs, want, have):
            need(
                np.array_equal(a, b),
                f"{job} of {jobs}: other logits beside other threads, by up to {np.abs(a - b).max():g}",
            )
        return "as alone"

    def _alone(self, job: tuple) -> np.ndarray:
        if job not in self.alone:
            self.alone[job] = self._run(job)
        return self.alone[job]

    def _run(self, job: tuple[int, str, bool, int]) -> np.ndarray:
        """Logits of a prompt and 8 single tokens."""
        model, name, conditioned, seed = job
        with Session(self.paths[model], n_threads=1) as session:
            pairs = mixture(session.n_layer) if name == "mixture" else uniform(name, session.n_layer)
            session.set_plan(
                pairs, [vectors(il) for il in range(session.n_layer)] if conditioned and model == 2 else ()
            )
            with session.context(256) as ctx:
                parts = [feed(ctx, prompt(48, seed))]
                parts += [feed(ctx, [token], 48 + i) for i, token in enumerate(prompt(8, seed + 1))]
        return np.concatenate(parts)
