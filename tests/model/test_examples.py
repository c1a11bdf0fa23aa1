"""The examples, as an app author runs them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from kvtuner_gguf import Pair, Plan
from kvtuner_gguf.gguf_file import write_plan

pytestmark = [pytest.mark.native, pytest.mark.model]

STREAM = Path(__file__).resolve().parents[2] / "examples" / "stream.py"


def test_ctrl_c_ends_an_answer_and_not_the_program(smol, tmp_path, signals_as_at_start):
    planned = write_plan(smol, Plan((Pair("q8_0", "q4_0"),) * 30), tmp_path / "planned.gguf")
    questions = ("Write a very long story about the sea.", "Say hello.")
    command = [sys.executable, str(STREAM), str(planned), *questions]
    program = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    os.read(program.stdout.fileno(), 100)  # the story has begun
    program.send_signal(signal.SIGINT)
    out, err = program.communicate(timeout=300)
    assert program.returncode == 0, err
    assert len(out.decode().strip().splitlines()) >= 1 and b"Traceback" not in err
    assert err.decode().startswith("cache: ") and len(err.splitlines()) == 1
