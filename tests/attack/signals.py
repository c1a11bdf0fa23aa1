"""Signals while a model is written: it is the old one or the new one, whole, and no signal that can be caught leaves
anything behind."""

from __future__ import annotations

import random
import shutil
import signal
from pathlib import Path

import commands
from fault import need
from models import tiny_llama

from kvtuner_gguf.gguf_file import write_plan
from kvtuner_gguf.pair import Pair
from kvtuner_gguf.plan import Plan

FILES = ("kvtuner_gguf/atomic.py", "kvtuner_gguf/gguf_file.py", "kvtuner_gguf/plan.py")


class Attack:
    def __init__(self, folder: Path) -> None:
        self.folder, self.home = folder, folder / "input"
        self.model, self.new = self.home / "model.gguf", self.home / "new.gguf"
        plain = tiny_llama(folder / "plain.gguf")
        with open(plain, "ab") as file:
            file.write(bytes(24 << 20))  # so that the copy takes a while
        self.sidecar = folder / "plan.json"
        plan = Plan.uniform(Pair("q8_0", "q4_0"), 4)
        plan.save(self.sidecar)
        planned = write_plan(plain, plan, folder / "planned.gguf")
        self.files = {"plain": plain, "planned": planned}
        # command -> (the file that it is given, what it makes of it, where that stands)
        self.jobs = {
            "apply": ("plain", "planned", self.model, ("apply", self.model, self.sidecar)),
            "strip": ("planned", "plain", self.model, ("strip", self.model)),
            "apply -o": ("plain", "planned", self.new, ("apply", self.model, self.sidecar, "-o", self.new)),
        }
        self.spans = {name: self._span(job) for name, job in self.jobs.items()}

    def _fresh(self, name: str) -> None:
        shutil.rmtree(self.home)
        self.home.mkdir()
        shutil.copyfile(self.files[name], self.model)

    def _span(self, job: tuple) -> tuple[float, int]:
        """Seconds and lines of the command when it is left alone."""
        self._fresh(job[0])
        ended = commands.command(self.folder, *job[3])
        need(ended.code == 0 and job[2].read_bytes() == self.files[job[1]].read_bytes(), ended.text)
        self._fresh(job[0])
        return ended.seconds, commands.lines_of(self.folder, FILES, *job[3])

    def attempt(self, rng: random.Random) -> str:
        name = rng.choice([*self.jobs])
        given, made, target, args = self.jobs[name]
        self._fresh(given)
        moment = commands.random_moment(rng, *self.spans[name], FILES)
        named = rng.random() < 0.3
        ended = commands.command(self.folder, *args, moment=moment, prepare=_no_unnamed_files if named else None)
        what = f"{name}, {'named' if named else 'unnamed'}, {moment}"
        commands.held(ended, what, codes=(0, 1, 130, 143, 129, -moment.number))
        old, new = (self.files[n].read_bytes() for n in (given, made))
        if target == self.model:
            need(self.model.read_bytes() in (old, new), f"{what}: the model is neither the old nor the new one")
            done = self.model.read_bytes() == new
        else:
            need(self.model.read_bytes() == old, f"{what}: the model that was read is not as it was")
            need(not target.exists() or target.read_bytes() == new, f"{what}: a new file that is not whole")
            done = target.exists()
        need(done or ended.code != 0, f"{what}: exit 0, and nothing written")
        left = commands.names(self.home) - {"model.gguf", "new.gguf"}
        if moment.number != signal.SIGKILL:
            need(not left, f"{what}: left {left}")
        elif left:
            self._removed_by_the_next(what, given, args)
        return f"{moment.number.name}, {'the new one' if done else 'the old one'}"

    def _removed_by_the_next(self, what: str, given: str, args: tuple) -> None:
        """What a kill leaves is gone after the next write beside it."""
        shutil.copyfile(self.files[given], self.model)
        self.new.unlink(missing_ok=True)
        ended = commands.command(self.folder, *args)
        need(ended.code == 0, f"{what}: the next write fails: {ended.text}")
        need(
            commands.names(self.home) <= {"model.gguf", "new.gguf"},
            f"{what}: left {commands.names(self.home)} after the next write, too",
        )


def _no_unnamed_files() -> None:
    """As on a file system whose files have a name from the start."""
    from kvtuner_gguf import atomic

    atomic._can_name = lambda *_: False
