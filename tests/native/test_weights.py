"""The copy that a search may run on: the same model, made only where it pays, and gone afterwards."""

from __future__ import annotations

import pytest
from running import feed, prompt

from kvtuner_gguf.calibrate import weights
from kvtuner_gguf.calibrate.weights import COPY, OWN, search_session
from kvtuner_gguf.errors import NativeError
from kvtuner_gguf.runtime import Session

pytestmark = pytest.mark.native


@pytest.fixture
def quantized(tiny, tmp_path):
    path = tmp_path / "q4_1.gguf"
    with Session(tiny("llama")) as session:
        session.save_as(path, "q4_1")
    return path


def searched_on(model, folder, said=None, **kwargs):
    """Path of the model that a search runs on, and its logits on a short prompt."""
    folder.mkdir(exist_ok=True)
    with (
        search_session(
            model, folder, n_threads=1, n_gpu_layers=0, say=(said if said is not None else []).append, **kwargs
        ) as session,
        session.context(64) as ctx,
    ):
        return session.path, feed(ctx, prompt(32))


@pytest.mark.parametrize(("gain", "is_copy"), [(0.0, True), (1e9, False)])
def test_a_copy_is_used_if_it_is_faster_by_so_much(quantized, tmp_path, monkeypatch, gain, is_copy):
    monkeypatch.setattr(weights, "GAIN", gain)
    said: list[str] = []
    path, logits = searched_on(quantized, tmp_path / "work", said)
    assert (path != quantized) == is_copy == bool(said)
    with Session(quantized, n_threads=1) as session, session.context(64) as ctx:
        own = feed(ctx, prompt(32))
    assert (logits - own).std() < 0.05 * own.std()  # weights as bf16 or f16, activations no longer in 8 bits
    assert not (tmp_path / "work" / COPY).exists()


def test_a_search_that_goes_on_keeps_its_weights(quantized, tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "GAIN", 0.0)
    searched_on(quantized, tmp_path / "work")
    monkeypatch.setattr(weights, "GAIN", 1e9)
    (tmp_path / "work" / COPY).write_bytes(b"half a copy of a run that was killed")
    assert searched_on(quantized, tmp_path / "work")[0] == tmp_path / "work" / COPY


@pytest.mark.parametrize(("gain", "ratio"), [(0.0, None), (1e9, 1.0)])
def test_who_asks_is_told_how_fast_prompts_are(quantized, tmp_path, monkeypatch, gain, ratio):
    monkeypatch.setattr(weights, "GAIN", gain)
    told: list[tuple[float, float]] = []
    for _ in range(2):  # once: a search that goes on is not timed
        searched_on(quantized, tmp_path / "work", timed=lambda model, *seconds: told.append(seconds))
    ((own, searched),) = told
    assert own > 0 and searched > 0
    assert ratio is None or searched == own * ratio


def test_no_copy_is_made_of_floats_or_where_memory_is_short(tiny, quantized, tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "GAIN", 0.0)
    assert searched_on(tiny("llama"), tmp_path / "floats")[0] == tiny("llama")
    monkeypatch.setattr(weights, "total_memory", lambda: quantized.stat().st_size)
    assert searched_on(quantized, tmp_path / "short")[0] == quantized


def test_a_model_that_cannot_be_copied_is_searched_on_itself(quantized, tmp_path, monkeypatch):
    def fails(self, path, type_name):
        raise NativeError("disk full")

    monkeypatch.setattr(weights, "GAIN", 0.0)
    monkeypatch.setattr(Session, "save_as", fails)
    assert searched_on(quantized, tmp_path / "work")[0] == quantized
    assert (tmp_path / "work" / "weights.txt").read_text() == OWN


def test_writing_a_model_fails_with_a_reason(quantized, tmp_path):
    with Session(quantized) as session, pytest.raises(NativeError, match="cannot be written as bf16"):
        session.save_as(tmp_path / "no" / "such" / "folder.gguf", "bf16")
