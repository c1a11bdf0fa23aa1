"""Programs of their own: killed while they write, alone with a folder, on a full disk, refused."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from small_gguf import PLAN, make_model, unchanged

from kvtuner_gguf import cache
from kvtuner_gguf.calibrate.store import claimed
from kvtuner_gguf.gguf_file import read_plan, write_plan

posix = pytest.mark.skipif(os.name == "nt", reason="needs POSIX modes, locks and signals")


@pytest.fixture
def model(tmp_path):
    return make_model(tmp_path / "model.gguf")


@posix
@pytest.mark.parametrize("unnamed", [False, True])
@pytest.mark.parametrize("new_file", [False, True])
def test_a_killed_write_leaves_the_old_file(new_file, unnamed, model, tmp_path):
    original = model.read_bytes()
    target = tmp_path / "new.gguf" if new_file else model
    program = f"""
import sys, time
from kvtuner_gguf import Pair, Plan, atomic, gguf_file
if not {unnamed}:
    atomic._can_name = lambda device, folder: False
real = gguf_file._copy_range
def half(file, pos, end, out):
    real(file, pos, (pos + end) // 2, out)
    if end == {len(original)}:  # the tensor data
        print("half", flush=True)
        time.sleep(60)
    real(file, (pos + end) // 2, end, out)
gguf_file._copy_range = half
gguf_file.write_plan({str(model)!r}, Plan.uniform(Pair("q8_0", "q8_0"), 3), {str(target)!r})
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"half\n"
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert model.read_bytes() == original and target.exists() != new_file
    left = [name for name in os.listdir(tmp_path) if name != "model.gguf"]
    if unnamed and hasattr(os, "O_TMPFILE"):
        assert left == []
    else:
        assert len(left) == 1 and left[0].startswith(target.name) and left[0].endswith(".kvtuner-tmp")
    assert read_plan(write_plan(model, PLAN, target)) == PLAN
    assert set(os.listdir(tmp_path)) == {"model.gguf", target.name}  # the next write takes away what was left


@posix
def test_a_file_that_the_disk_does_not_take_leaves_the_old_one(tmp_path):
    model = make_model(tmp_path / "model.gguf", last=bytes(100_000))
    original = model.read_bytes()
    program = f"""
import resource
from kvtuner_gguf import Pair, Plan, errors, gguf_file
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
try:
    gguf_file.write_plan({str(model)!r}, Plan.uniform(Pair("q8_0", "q8_0"), 3))
except errors.PlanError as err:
    print(err)
"""
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert "File too large" in out and "with -o" in out
    unchanged(model, original)


HOLDER = """
import sys, time
from kvtuner_gguf.cache import scratch
with scratch() as folder:
    (folder / "large").write_bytes(b"x")
    print(folder, flush=True)
    time.sleep(60)
"""


@posix
@pytest.mark.usefixtures("own_cache")
def test_what_a_killed_process_left_goes_and_what_a_living_one_has_stays():
    def holder() -> tuple[subprocess.Popen, Path]:
        process = subprocess.Popen([sys.executable, "-c", HOLDER], stdout=subprocess.PIPE, text=True)
        return process, Path(process.stdout.readline().strip())

    dead, left = holder()
    dead.send_signal(signal.SIGKILL)
    dead.wait()
    living, held = holder()
    try:
        with cache.scratch():
            assert (held / "large").exists() and not left.exists()
    finally:
        living.kill()
        living.communicate()
    dead.stdout.close()
    with cache.scratch():
        assert not held.exists()


CLAIM = (
    "import sys; from pathlib import Path; from kvtuner_gguf.calibrate.store import claimed\nwith "
    "claimed(Path(sys.argv[1])): print('claimed')"
)


def test_another_process_is_refused_and_may_go_on_afterwards(tmp_path):
    command = [sys.executable, "-c", CLAIM, str(tmp_path / "records")]
    with claimed(tmp_path / "records"):
        refused = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert refused.returncode and "is in use" in refused.stderr
    assert subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path).stdout == "claimed\n"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_standard_output_that_is_full_is_an_error(tmp_path):
    model = write_plan(make_model(tmp_path / "m.gguf"), PLAN)
    with open("/dev/full", "wb") as full:
        command = [sys.executable, "-c", "from kvtuner_gguf.cli import main; main()", "export", str(model)]
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert result.returncode == 1 and result.stderr.startswith("Error: standard output: "), result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_nothing_is_measured_for_an_output_that_is_none(model):
    command = [
        sys.executable,
        "-c",
        "from kvtuner_gguf.cli import main; main()",
        "calibrate",
        str(model),
        "-o",
        str(model.parent / "none" / "x.gguf"),
    ]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1 and "none" in result.stderr and not result.stdout
    assert len(result.stderr.splitlines()) == 1  # no stage began
