"""Damaged records of a calibration: `calibrate` and `solve` come to the same plan, or say what is wrong, never
to another."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import commands
from fault import need
from models import small_text, tiny_qwen2

from kvtuner_gguf.plan import Plan


class Attack:
    def __init__(self, folder: Path) -> None:
        self.folder, self.home, self.cache = folder, folder / "input", folder / "cache"
        self.text = small_text(folder / "text.txt")
        self.model = tiny_qwen2(folder / "model.gguf", k_outlier=40.0)
        self.out = folder / "plan.json"
        self.calibrate = commands.calibrate_args(self.model, self.text, "-o", self.out)
        self.solve = ("solve", self.model, *commands.same_as_calibrated(self.text), "--bits", 5.5, "-o", self.out)
        self.snapshots = {"done": self._snapshot("done"), "interrupted": self._snapshot("interrupted")}
        self._restore("done")
        self.want = {"calibrate": self._plan(self.calibrate), "solve": self._plan(self.solve)}

    def _snapshot(self, name: str) -> Path:
        """The cache folder as a calibration leaves it, or one that was stopped in its search."""
        shutil.rmtree(self.cache, ignore_errors=True)
        ended = commands.command(
            self.folder, *self.calibrate, prepare=_stop_in_the_search if name == "interrupted" else None
        )
        need((ended.code == 0) == (name == "done"), ended.text)
        return Path(shutil.copytree(self.cache, self.folder / name))

    def _restore(self, name: str) -> None:
        shutil.rmtree(self.cache, ignore_errors=True)
        shutil.copytree(self.snapshots[name], self.cache)

    def _plan(self, args: tuple) -> Plan:
        ended = commands.command(self.folder, *args)
        need(ended.code == 0, ended.text)
        return Plan.load(self.out)

    def attempt(self, rng: random.Random) -> str:
        snapshot = rng.choice([*self.snapshots])
        self._restore(snapshot)
        damage = self._damage(rng)
        shutil.rmtree(self.home)
        shutil.copytree(self.cache, self.home)
        ends = []
        jobs = [("calibrate", self.calibrate)]
        if snapshot == "done":
            jobs.insert(rng.randrange(2), ("solve", self.solve))
        for name, args in jobs:
            what = f"{snapshot}, {damage}, {name}"
            self.out.unlink(missing_ok=True)
            ended = commands.command(self.folder, *args)
            commands.held(ended, what)
            if ended.code == 0:
                need(Plan.load(self.out) == self.want[name], f"{what}: another plan")
            ends.append(f"{name} {'right' if ended.code == 0 else 'refused'}")
        return ", ".join(sorted(ends))

    def _damage(self, rng: random.Random) -> str:  # noqa: C901 - one branch for each kind of damage
        """Do something to one or two of the files; what was done."""
        files = sorted(path for path in self.cache.rglob("*") if path.is_file() and path.suffix != ".lock")
        done = []
        for _ in range(rng.choice((1, 1, 2))):
            path, other = rng.choice(files), rng.choice(files)
            if not path.is_file():
                continue
            data = bytearray(path.read_bytes())
            action = rng.choice(
                ("flip", "flip", "byte", "cut", "empty", "swap", "noise", "folder", "gone", "half", "line", "lines")
            )
            if action == "flip" and data:
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            elif action == "byte" and data:
                data[rng.randrange(len(data))] = rng.choice(b'0123456789,]}{["nl \x00\xff')
            elif action == "cut":
                del data[rng.randrange(len(data) + 1) :]
            elif action == "empty":
                data.clear()
            elif action == "swap" and other.is_file():
                data = bytearray(other.read_bytes())
            elif action == "noise":
                data = bytearray(rng.randbytes(rng.choice((1, 100, len(data)))))
            elif action == "half":
                data[len(data) // 2 :] = bytes(len(data) - len(data) // 2)
            elif action in ("line", "lines"):
                rows = data.splitlines(keepends=True)
                rng.shuffle(rows) if action == "lines" else rows and rows.pop(rng.randrange(len(rows)))
                data = bytearray(b"".join(rows))
            path.unlink()
            if action == "folder":
                path.mkdir()
            elif action != "gone":
                path.write_bytes(data)
            done.append(f"{path.name}: {action}")
        return "; ".join(done)


def _stop_in_the_search() -> None:
    """After some runs of the search: the capture and the reference are there still."""
    real, measured = commands.jobs.measure, []

    def stopped(*args: object, **kwargs: object) -> object:
        measured.append(1)
        if len(measured) == 6:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    commands.jobs.measure = stopped
