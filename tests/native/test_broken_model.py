"""Models that give no numbers: the user is told at the first run, and told which of two it is."""

from __future__ import annotations

import re

import models
import numpy as np
import pytest
from click.testing import CliRunner

from kvtuner_gguf.calibrate import pipeline
from kvtuner_gguf.calibrate.kld import Chunks, make_reference, measure
from kvtuner_gguf.cli import main
from kvtuner_gguf.errors import CalibrationError
from kvtuner_gguf.pair import Pair

pytestmark = pytest.mark.native


def set_nan(x):
    x[0, 0] = np.nan


def enlarge(x):
    x[5] *= np.float16(30000)


FAULTS = {
    "NaN weight": ("blk.1.ffn_down", set_nan, "gives NaN, whatever its cache"),
    "K beyond f16": ("blk.1.attn_k", enlarge, "beyond the 65504 of f16.*-ctk bf16"),
}


@pytest.fixture
def broken(request, tmp_path, monkeypatch):
    """A model with one fault, and what is told of it."""
    name, change, told = FAULTS[request.param]

    class Writer(models._Writer):
        def matrix(self, at, *shape, gain=1.0):
            x = self.normal(*shape, std=gain / shape[-1] ** 0.5).astype(np.float16)
            if at == name:
                change(x)
            self.tensor(f"{at}.weight", x)

    monkeypatch.setattr(models, "_Writer", Writer)
    return models.tiny_llama(tmp_path / "broken.gguf", n_layer=2), told


@pytest.mark.parametrize("broken", FAULTS, indirect=True)
@pytest.mark.parametrize("text", ["own", "file"])
@pytest.mark.parametrize("command", ["calibrate", "evaluate"])
def test_what_is_wrong_with_a_model_is_told_at_the_first_run(broken, tmp_path, monkeypatch, command, text):
    model, told = broken
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(pipeline, "STREAM", 64)
    monkeypatch.setattr(pipeline, "SEARCH_CTX", 64)
    words = tmp_path / "words.txt"
    words.write_text("a few words " * 200)
    args = (
        ["calibrate", model, "-o", tmp_path / "x.json", "--trials", 8]
        if command == "calibrate"
        else ["evaluate", "-m", model, "q8_0"]
    )
    args += ["--chunks", 2, "-t", 1, *(["-f", words] if text == "file" else [])]
    result = CliRunner().invoke(main, [str(a) for a in args])
    assert result.exit_code == 1 and re.search(f"Error: model '{model}': .*{told}", result.output), result.output
    assert "Calibrate again" not in result.output and "search" not in result.output


@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_types_that_give_nan_are_named_and_not_the_plan(load, tiny, tmp_path, monkeypatch):
    session = load(tiny("llama", n_layer=2))
    tokens = np.random.default_rng(0).integers(models.FIRST_BYTE, models.FIRST_BYTE + 256, (1, 64)).astype(np.int32)
    reference = make_reference(session, Chunks(tokens), tmp_path / "f16")
    monkeypatch.setattr("kvtuner_gguf.calibrate.kld.kl_divergence", lambda base, logits: np.full(len(logits), np.nan))
    with pytest.raises(CalibrationError, match="^q4_0/q4_0: NaN at 32 of 32 positions"):
        measure(session, [Pair("q4_0", "q4_0")] * 2, reference)
