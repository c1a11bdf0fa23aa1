"""A calibration that is told to end, at any stage: nothing of the model's copy, its K and V, or its text's logits
stays."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.native,
    pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals"),
    pytest.mark.usefixtures("signals_as_at_start"),
]

CALIBRATE = """
import sys
from kvtuner_gguf.calibrate import pipeline, weights
pipeline.STREAM, pipeline.SEARCH_CTX, weights.GAIN = 256, 128, 0.0
from kvtuner_gguf.cli import main
main(sys.argv[1:])
"""


@pytest.fixture
def model(tiny, tmp_path) -> Path:
    """Of a type of which a copy is searched."""
    from kvtuner_gguf.runtime import Session

    with Session(tiny("llama")) as session:
        session.save_as(tmp_path / "model.gguf", "q4_1")
    return tmp_path / "model.gguf"


def calibrating(model: Path, folder: Path) -> subprocess.Popen[str]:
    """A process that calibrates, quickly, with the cache in a folder; what it says comes from its stderr."""
    quickly = ["--chunks", "2", "--trials", "12", "-t", "1", "-c", "1024"]
    return subprocess.Popen(
        [sys.executable, "-c", CALIBRATE, "calibrate", str(model), *quickly],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "XDG_CACHE_HOME": str(folder / "cache")},
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
@pytest.mark.parametrize("stage", ["text", "capture", "search: price"])
def test_nothing_stays_but_records(stage, number, model, tmp_path):
    before, cache = model.read_bytes(), tmp_path / "cache" / "kvtuner-gguf"
    with calibrating(model, tmp_path) as process:
        for line in process.stderr:
            if f"] {stage}" in line:
                process.send_signal(number)
                break
        said = process.stderr.read()
    assert process.returncode == (1 if number == signal.SIGINT else 128 + number), said
    assert "Traceback" not in said and "ignored" not in said, said
    assert [path.name for path in cache.iterdir()] == ["calibrate"]
    kept = {path.name for path in cache.rglob("*") if path.is_file()}
    assert all(
        name.endswith((".json", ".jsonl", ".lock")) or name in ("text.npz", "weights.txt", "about.txt") for name in kept
    ), kept
    assert model.read_bytes() == before and [p.name for p in tmp_path.glob("*.gguf")] == ["model.gguf"]


def test_the_cache_folder_is_closed_to_others_at_any_time(model, tmp_path):
    """Also one that was open before: what a 0600 model is copied to must not be read by others."""
    cache = tmp_path / "cache" / "kvtuner-gguf"
    cache.mkdir(parents=True)
    cache.chmod(0o755)
    with calibrating(model, tmp_path) as process:
        for line in process.stderr:
            if "] search: price" in line:
                break
        seen = {path: path.stat().st_mode & 0o777 for path in [cache, *cache.rglob("*")]}
        process.kill()
    assert any(path.name == "weights.gguf" for path in seen) and any(path.name == "search.f16" for path in seen)
    assert all(mode & 0o077 == 0 for mode in seen.values()), seen
    shutil.rmtree(tmp_path / "cache")
