"""Disks that fill up at any stage: one error that says so, the model as it was, nothing left; with room again all goes
on."""

from __future__ import annotations

import ctypes
import os
import random
import shutil
from pathlib import Path

import commands
from fault import need
from models import small_text, tiny_qwen2

from kvtuner_gguf.pair import Pair
from kvtuner_gguf.plan import Plan

_CLONE_NEWNS, _MS_REC, _MS_PRIVATE = 0x20000, 0x4000, 1 << 18
DISK = 64 << 20


class Attack:
    def __init__(self, folder: Path) -> None:
        self.folder, self.disk = folder, folder / "disk"
        self.disk.mkdir()
        self.mounted = _mount(self.disk)
        self.model, self.text = self.disk / "model.gguf", small_text(folder / "text.txt")
        self.plain = tiny_qwen2(folder / "plain.gguf", k_outlier=40.0)
        self.sidecar = folder / "plan.json"
        Plan.uniform(Pair("q8_0", "q4_0"), 4).save(self.sidecar)
        new = self.disk / "new.gguf"
        shutil.copyfile(self.plain, self.model)
        os.environ["XDG_CACHE_HOME"] = str(self.disk / "cache")
        calibrate = commands.calibrate_args(self.model, self.text)
        # stage -> the command, and the bytes that it needs at most, by what it writes
        size = self.plain.stat().st_size
        self.jobs = {
            "apply": (("apply", self.model, self.sidecar), size),
            "apply -o": (("apply", self.model, self.sidecar, "-o", new), size),
            "export": (("export", self.model, "-o", self.disk / "out.json"), 4096),
            "solve -o": (
                (
                    "solve",
                    self.model,
                    *commands.same_as_calibrated(self.text),
                    "--bits",
                    5.5,
                    "-o",
                    self.disk / "out.json",
                ),
                8192,
            ),
            "calibrate": (calibrate, 16 << 20),
            "calibrate -o": ((*calibrate, "-o", new), 16 << 20),
            "calibrate again": (calibrate, 4 << 20),
        }
        self._fresh("apply")
        ended = commands.command(folder, *calibrate)
        need(ended.code == 0, ended.text)
        self.cache = Path(shutil.copytree(self.disk / "cache", folder / "saved"))
        self.planned = Path(shutil.copyfile(self.model, folder / "planned.gguf"))

    def _fresh(self, stage: str) -> None:
        for path in self.disk.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        shutil.copyfile(self.planned if stage == "export" else self.plain, self.model)
        if stage in ("solve -o", "calibrate again"):
            shutil.copytree(self.cache, self.disk / "cache")

    def attempt(self, rng: random.Random) -> str:
        stage = rng.choice([*self.jobs])
        args, most = self.jobs[stage]
        self._fresh(stage)
        before, old = commands.names(self.disk), self.model.read_bytes()
        room = int(rng.choice((0, rng.random(), rng.random(), rng.random() ** 3, 1.2)) * most) & ~4095
        ended = self._with_room(room, *args)
        what = f"{stage} with {room >> 10} KiB"
        commands.held(ended, what)
        left = commands.names(self.disk) - before
        if ended.code:
            need(self.model.read_bytes() == old, f"{what}: the model changed")
            need(not {name for name in left if not name.startswith("cache")}, f"{what}: left {left}")
            need(
                not {name for name in left if name.endswith((".gguf", "tmp", ".part", ".part.npz"))},
                f"{what}: left {left}",
            )
        again = commands.command(self.folder, *args)
        if ended.code:
            need(again.code == 0, f"{what}: with room again it ends with {again.code}: {again.text[-1500:]}")
            if stage in ("calibrate", "calibrate again"):
                need(
                    self.model.read_bytes() == self.planned.read_bytes(),
                    f"{what}: with room again it comes to another plan",
                )
        return f"{stage} {'refused' if ended.code else 'done'}"

    def _with_room(self, room: int, *args: object) -> commands.Ended:
        if not self.mounted:
            return commands.command(self.folder, *args, prepare=lambda: commands.limit_files(room))
        disk = os.statvfs(self.disk)
        free = disk.f_bavail * disk.f_frsize
        filler = self.folder / "disk" / ".filler"
        with open(filler, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, max(4096, free - room))
        try:
            return commands.command(self.folder, *args)
        finally:
            filler.unlink()


def _mount(folder: Path) -> bool:
    """A small disk of its own, seen by this process and its children alone; False where that takes rights that we
    lack."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNS) or libc.mount(None, b"/", None, _MS_REC | _MS_PRIVATE, None):
        return False
    return libc.mount(b"tmpfs", str(folder).encode(), b"tmpfs", 0, f"size={DISK}".encode()) == 0
