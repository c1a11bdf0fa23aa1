"""A calibration whose runs are done by workers of dask: the same plan and the same records as alone, whatever befalls
them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from kvtuner_gguf import api
from kvtuner_gguf.calibrate import crew, delivery
from kvtuner_gguf.calibrate.progress import Silent
from kvtuner_gguf.cli import main
from kvtuner_gguf.errors import CalibrationError, KvtunerError
from kvtuner_gguf.identity import weights_sample

Client = pytest.importorskip("distributed").Client
pytestmark = pytest.mark.native


class Told(Silent):
    def __init__(self):
        self.lines = []

    def say(self, text):
        self.lines.append(text)

    def about(self, *words):
        return [line for line in self.lines if all(word in line for word in words)]


def end(process):
    process.kill()  # one that is stopped, too
    process.wait()


@pytest.fixture
def dask(tmp_path):
    """A scheduler, and workers that are started and killed."""

    class Dask:
        def __init__(self):
            self.file = tmp_path / "scheduler.json"
            self.scheduler = self.start("scheduler", "--scheduler-file", self.file, "--port", "0", "--no-dashboard")
            while not self.file.exists():
                time.sleep(0.05)
            self.address = json.loads(self.file.read_text())["address"]
            self.workers = []

        def start(self, kind, *args, **options):
            command = [sys.executable, "-m", f"distributed.cli.dask_{kind}", *map(str, args)]
            return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **options)

        def worker(self, **options):
            args = (self.address, "--nthreads", "1", "--no-nanny", "--no-dashboard", "--death-timeout", "30")
            self.workers.append(self.start("worker", *args, **options))
            return self.workers[-1]

        def wait(self):
            """For all workers to be known."""
            with Client(self.address, set_as_default=False) as client:
                client.wait_for_workers(len(self.workers), timeout=60)

        def close(self):
            for process in (*self.workers, self.scheduler):
                end(process)

    opened = Dask()
    yield opened
    opened.close()


def calibrated(model, told=None, **options):
    """(the plan's pairs and vectors, the ratio to its rival)"""
    sizes = {"n_ctx": 1024, "n_chunk": 2, "n_threads": 1}
    outcome = api.calibrate(api.Options(model, api.WithinBits(6.0), **sizes | options), told or Silent())
    return outcome.plan.pairs, outcome.plan.k_vectors, outcome.beside


def records(own_cache):
    """What was measured, without its order."""
    (path,) = own_cache.rglob("evaluations.jsonl")
    return sorted(path.read_text().splitlines())


def test_workers_that_are_killed_all_the_while_give_the_plan_and_records_of_one_process(
    tiny, dask, short_chunks, own_cache
):
    model, told = tiny("llama"), Told()
    want = calibrated(model)
    of_one = records(own_cache)
    for _ in range(3):
        dask.worker()
    ended = threading.Event()

    def kill_and_start():
        while not ended.wait(3.0):
            dask.worker()
            end(dask.workers.pop(0))

    killer = threading.Thread(target=kill_and_start)
    killer.start()
    try:
        assert calibrated(model, told, workers=dask.address, fresh=True) == want
    finally:
        ended.set()
        killer.join()
    assert records(own_cache) == of_one


def test_what_came_in_is_kept_when_the_scheduler_is_killed(tiny, dask, short_chunks, own_cache):
    model = tiny("llama")
    want = calibrated(model)
    dask.worker()

    class Killing(Told):
        def bar(self, title, total):
            if "price" in title:  # what prices layers came in
                end(dask.scheduler)
            return super().bar(title, total)

    with pytest.raises(CalibrationError, match="the scheduler is gone. What came in is kept: run the same command"):
        calibrated(model, Killing(), workers=dask.address, fresh=True)
    came_in = records(own_cache)
    assert len(came_in) >= 16
    assert calibrated(model) == want
    assert {*came_in} <= {*records(own_cache)}


def test_a_worker_that_has_another_model_is_refused_by_its_weights(tiny, dask, short_chunks, tmp_path, monkeypatch):
    """The path means another file in each worker's folder; the third finds the model in a folder of its own."""
    folders = {name: tmp_path / name for name in ("right", "wrong", "none", "kept")}
    for folder in folders.values():
        folder.mkdir()
    shutil.copy(tiny("llama"), folders["right"] / "m.gguf")
    shutil.copy(tiny("llama", seed=1), folders["wrong"] / "m.gguf")
    shutil.copy(tiny("llama"), folders["kept"] / "other-name.gguf")
    monkeypatch.chdir(folders["right"])
    model, told = Path("/proc/self/cwd/m.gguf"), Told()
    want = calibrated(model)
    dask.worker(cwd=folders["wrong"])
    dask.worker(cwd=folders["none"], env={**os.environ, "KVTUNER_GGUF_MODELS": str(folders["kept"])})
    dask.wait()
    assert calibrated(model, told, workers=dask.address, fresh=True) == want
    (line,) = told.about("is passed over", "has other weights")
    assert weights_sample(model)[:12] in line
    end(dask.workers[1])
    with pytest.raises(CalibrationError, match="none is left that may do the runs.*has other weights"):
        calibrated(model, workers=dask.address, fresh=True)


def test_a_worker_that_has_not_the_model_is_sent_it_once(tiny, dask, short_chunks, tmp_path, monkeypatch):
    """As on a machine of its own, with a cache of its own; while it is on its way, the other one works."""
    here, there, cache = (tmp_path / name for name in ("here", "there", "cache"))
    for folder in (here, there, cache):
        folder.mkdir()
    shutil.copy(tiny("llama"), here / "m.gguf")
    monkeypatch.chdir(here)
    monkeypatch.setattr(delivery, "PART_BYTES", 1 << 16)
    model = Path("/proc/self/cwd/m.gguf")
    want = calibrated(model)
    dask.worker(cwd=there, env={**os.environ, "XDG_CACHE_HOME": str(cache)})
    dask.wait()
    for sent in (1, 0):
        told = Told()
        assert calibrated(model, told, workers=dask.address, fresh=True) == want
        assert len(told.about("has not the model: it is sent")) == sent, told.lines
    (kept,) = (cache / "kvtuner-gguf").glob("*.gguf")
    assert kept.read_bytes() == model.read_bytes()
    assert not list(cache.rglob("*.part"))


def test_a_part_of_a_model_is_refused_where_it_has_no_room_and_a_model_that_is_another(tiny, own_cache):
    model = tiny("llama").read_bytes()
    sample = weights_sample(tiny("llama", seed=1))
    with pytest.raises(KvtunerError, match=r"no space: \d+ MiB free.*Make room there"):
        delivery.receive(sample, 0, 1 << 60, model)
    with pytest.raises(KvtunerError, match=f"other weights than {sample[:12]}"):
        delivery.receive(sample, 0, len(model), model)
    assert not list(own_cache.rglob("*.part")) and not list(own_cache.rglob("*.gguf"))


def test_a_worker_that_stalls_is_named_and_its_run_done_by_another(tiny, dask, short_chunks, monkeypatch):
    monkeypatch.setattr(crew, "_STALLED", 3.0)
    monkeypatch.setattr(crew, "_STALLED_S", 3.0)
    model, told = tiny("llama"), Told()
    want = calibrated(model)
    dask.worker()
    stalling = dask.worker()
    dask.wait()

    class Stopping(Told):
        def bar(self, title, total):
            if title.startswith("workers"):
                stalling.send_signal(signal.SIGSTOP)
            return super().bar(title, total)

    told = Stopping()
    assert calibrated(model, told, workers=dask.address, fresh=True) == want
    assert told.about("a run takes", "given to others, too")


@pytest.mark.parametrize("method", ["fitted", "paper"])
def test_local_workers(tiny, short_chunks, method):
    how = {"method": method, "n_trials": 60 if method == "paper" else None}
    assert calibrated(tiny("llama"), workers="2", **how) == calibrated(tiny("llama"), fresh=True, **how)


@pytest.mark.parametrize("where", ["tcp://127.0.0.1:9", "nowhere", "tcp://", "0"])
def test_a_scheduler_that_is_not_there_is_told_before_work(tiny, where, monkeypatch):
    monkeypatch.setattr(crew, "CONNECT_S", 1.0)
    found = CliRunner().invoke(main, ["calibrate", str(tiny("llama")), "--workers", where, "-o", "plan.json"])
    assert found.exit_code == 1 and f"workers '{where}'" in found.output and "dask scheduler" in found.output
