"""Signals in a calibration: the model is the old or the new one, and the same command again comes to the same plan and
leaves what it always leaves."""

from __future__ import annotations

import random
import shutil
import signal
from pathlib import Path

import commands
from fault import need
from models import small_text, tiny_qwen2

FILES = (
    "atomic.py",
    "calibrate/store.py",
    "calibrate/results.py",
    "calibrate/pipeline.py",
    "calibrate/weights.py",
    "calibrate/text.py",
)


class Attack:
    def __init__(self, folder: Path) -> None:
        self.folder, self.home, self.cache = folder, folder / "input", folder / "cache"
        self.model, self.text = self.home / "model.gguf", small_text(folder / "text.txt")
        self.plain = tiny_qwen2(folder / "plain.gguf", k_outlier=40.0)
        self.args = commands.calibrate_args(self.model, self.text)
        self._fresh()
        ended = commands.command(folder, *self.args)
        need(ended.code == 0, ended.text)
        self.seconds, self.planned, self.records = ended.seconds, self.model.read_bytes(), commands.names(self.cache)
        self._fresh()
        self.n_lines = commands.lines_of(folder, FILES, *self.args)

    def _fresh(self) -> None:
        for path in (self.home, self.cache):
            shutil.rmtree(path, ignore_errors=True)
        self.home.mkdir()
        shutil.copyfile(self.plain, self.model)

    def attempt(self, rng: random.Random) -> str:
        self._fresh()
        moment = commands.random_moment(rng, self.seconds, self.n_lines, FILES)
        ended = commands.command(self.folder, *self.args, moment=moment)
        what = f"calibrate, {moment}"
        commands.held(ended, what, codes=(0, 1, 130, 143, 129, -moment.number))
        self._whole(what, caught=moment.number != signal.SIGKILL)
        if moment.number != signal.SIGKILL:
            left = {
                name for name in commands.names(self.cache) if name.endswith((".gguf", "tmp", ".part", ".part.npz"))
            }
            need(not left, f"{what}: left {left} in the cache folder")
        ended = commands.command(self.folder, *self.args)
        need(ended.code == 0, f"{what}: the same again ends with {ended.code}: {ended.text[-1500:]}")
        need(self.model.read_bytes() == self.planned, f"{what}: the same again comes to another plan")
        self._whole(f"{what}, again", caught=False)
        more = commands.names(self.cache) - self.records
        need(not more, f"{what}: after the same again there is still {more} in the cache folder")
        return moment.number.name

    def _whole(self, what: str, *, caught: bool) -> None:
        need(
            self.model.read_bytes() in (self.plain.read_bytes(), self.planned),
            f"{what}: the model is neither the old nor the new one",
        )
        left = commands.names(self.home) - {"model.gguf"}
        need(not caught or not left, f"{what}: left {left} beside the model")
