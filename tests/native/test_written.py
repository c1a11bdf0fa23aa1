"""The text that the model writes: the same each time, and gone on with after an end."""

from __future__ import annotations

import numpy as np
import pytest

from kvtuner_gguf.calibrate import text as text_module
from kvtuner_gguf.calibrate.text import write_text

pytestmark = pytest.mark.native

SIZES = {"n_calibration": 900, "n_heldout": 600, "stream": 300, "seed": 3}


def parts(text):
    return text.calibration.tolist(), text.heldout.tolist()


def test_the_text_depends_on_the_seed_alone(load, tiny):
    session = load(tiny("llama"))
    one, again = write_text(session, **SIZES), write_text(session, **SIZES)
    other = write_text(session, **{**SIZES, "seed": 4})
    assert parts(one) == parts(again) != parts(other) and one.sha256 == again.sha256
    assert [len(part) for part in parts(one)] == [900, 600]


@pytest.mark.parametrize("n_parallel", [3, 24])
def test_what_was_written_before_an_end_is_not_written_again(load, tiny, tmp_path, monkeypatch, n_parallel):
    """In the first batch of sequences and in a later one."""
    session, path = load(tiny("llama")), tmp_path / "unfinished.json"
    monkeypatch.setattr(text_module, "N_PARALLEL", n_parallel)
    whole = write_text(session, **SIZES)
    done = []

    def stop(n: int) -> None:
        done.append(n)
        if sum(done) > 1000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_text(session, **SIZES, progress=stop, unfinished=path)
    assert path.stat().st_mode & 0o077 == 0
    more = []
    assert parts(write_text(session, **SIZES, progress=more.append, unfinished=path)) == parts(whole)
    assert more[0] >= 900 and sum(more) == 1500
    assert not path.exists()


def test_a_damaged_record_or_one_of_other_sizes_is_left_alone(load, tiny, tmp_path):
    session, path = load(tiny("llama")), tmp_path / "unfinished.json"
    whole = write_text(session, **SIZES)

    def stop(n: int) -> None:
        done.append(n)
        if len(done) > 9:
            raise KeyboardInterrupt

    done = []
    for damage in (lambda data: data[:-9] + b"}", lambda data: data.replace(b'"stream": 300', b'"stream": 299')):
        with pytest.raises(KeyboardInterrupt):
            write_text(session, **SIZES, progress=stop, unfinished=path)
        path.write_bytes(damage(path.read_bytes()))
        done.clear()
        assert parts(write_text(session, **SIZES, unfinished=path)) == parts(whole)


def test_it_is_saved_now_and_then_for_who_is_killed(load, tiny, tmp_path, monkeypatch):
    session, path = load(tiny("llama")), tmp_path / "unfinished.json"
    monkeypatch.setattr(text_module, "_SAVE_S", 0.0)
    seen = []
    write_text(session, **SIZES, progress=lambda n: seen.append(path.exists()), unfinished=path)
    assert seen[-1] and not path.exists()
    assert np.mean(seen) > 0.9
