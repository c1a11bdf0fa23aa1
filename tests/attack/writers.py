"""Several commands at once on one model: it ends as one of them made it, whole, and each of them says how it ended."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import commands
from fault import need
from models import small_text, tiny_llama

from kvtuner_gguf.gguf_file import write_plan
from kvtuner_gguf.pair import Pair
from kvtuner_gguf.plan import Plan

N_WRITERS = 5


class Attack:
    def __init__(self, folder: Path) -> None:
        self.folder, self.home, self.cache = folder, folder / "input", folder / "cache"
        self.model, self.text = self.home / "model.gguf", small_text(folder / "text.txt")
        plain = tiny_llama(folder / "plain.gguf", n_layer=2)
        self.jobs, self.files = [("strip", self.model)], {"plain": plain}
        for i, name in enumerate(("q8_0/q4_0", "q4_0/q8_0")):
            plan = Plan.uniform(Pair.parse(name), 2)
            plan.save(sidecar := folder / f"{i}.json")
            self.jobs.append(("apply", self.model, sidecar))
            self.files[name] = write_plan(plain, plan, folder / f"{i}.gguf")
        self.calibrate = commands.calibrate_args(self.model, self.text)
        shutil.copyfile(plain, self.model)
        need(commands.command(folder, *self.calibrate).code == 0, "a calibration alone fails")
        self.files["calibrated"] = Path(shutil.copyfile(self.model, folder / "calibrated.gguf"))
        self.right = [path.read_bytes() for path in self.files.values()]

    def attempt(self, rng: random.Random) -> str:
        shutil.copyfile(self.files[rng.choice(("plain", "q8_0/q4_0"))], self.model)
        shutil.rmtree(self.cache, ignore_errors=True)
        jobs = rng.choices(self.jobs, k=N_WRITERS) + [self.calibrate] * rng.choice((0, 0, 0, 1, 2))
        rng.shuffle(jobs)
        ends = [commands.finish(running) for running in [commands.start(self.folder, *job) for job in jobs]]
        for job, ended in zip(jobs, ends):
            commands.held(ended, f"{job[0]} among {[job[0] for job in jobs]}")
        need(
            self.model.read_bytes() in self.right,
            f"{[job[0] for job in jobs]}: the model is none that one of them made",
        )
        need(commands.names(self.home) == {"model.gguf"}, f"left {commands.names(self.home)}")
        return f"{sum(ended.code == 0 for ended in ends)} of {len(jobs)} wrote"
