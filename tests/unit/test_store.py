import pytest

from kvtuner_gguf import Pair
from kvtuner_gguf.calibrate.store import Store, claimed
from kvtuner_gguf.errors import CalibrationError
from kvtuner_gguf.quality import Quality


def test_a_folder_in_use_is_refused_by_its_name_and_left_alone(tmp_path):
    work = tmp_path / "records"
    work.mkdir()
    (work / "text.npz").write_bytes(b"kept")
    with claimed(work), pytest.raises(CalibrationError, match=str(work)), claimed(work):
        pytest.fail("claimed twice")
    assert (work / "text.npz").read_bytes() == b"kept"


def test_a_claim_ends_with_an_error_inside_it(tmp_path):
    with pytest.raises(ValueError), claimed(tmp_path / "records"):
        raise ValueError
    with claimed(tmp_path / "records"):
        pass


def test_records_of_another_program_model_text_or_place_are_not_mixed(tmp_path, monkeypatch):
    from dataclasses import replace

    from small_gguf import PLAN, make_model

    from kvtuner_gguf.calibrate import store
    from kvtuner_gguf.calibrate.goals import WithinBits, WithinBytes
    from kvtuner_gguf.calibrate.options import Options
    from kvtuner_gguf.gguf_file import write_plan

    monkeypatch.setattr(store.native, "build_id", lambda: "one")
    model, text = make_model(tmp_path / "m.gguf"), tmp_path / "t.txt"
    text.write_text("words")
    options = Options(model, WithinBits(6), text=text)
    first = store.work_dir(options, 1, 2)
    write_plan(model, PLAN)
    assert store.work_dir(replace(options, goal=WithinBytes(5), fresh=True), 1, 2) == first  # the same runs
    others = {
        first,
        store.work_dir(options, 1, 3),
        store.work_dir(replace(options, n_gpu_layers=9), 1, 2),
        store.work_dir(replace(options, seed=1), 1, 2),
    }
    monkeypatch.setattr(store.native, "build_id", lambda: "two")
    others.add(store.work_dir(options, 1, 2))
    monkeypatch.setattr(store, "__version__", "another")
    others.add(store.work_dir(options, 1, 2))
    monkeypatch.setenv("LLAMA_ATTN_ROT_DISABLE", "1")
    others.add(store.work_dir(options, 1, 2))
    text.write_text("other words")
    others.add(store.work_dir(options, 1, 2))
    others.add(store.work_dir(replace(options, model=make_model(tmp_path / "n.gguf", n_layer=4)), 1, 2))
    assert len(others) == 9


def test_every_option_says_whether_it_names_the_runs():
    """A new option that changes what runs mean, and does not say so, would have old records taken for its own."""
    from dataclasses import fields

    from kvtuner_gguf.calibrate.options import Options

    assert not [field.name for field in fields(Options) if "identity" not in field.metadata]


def test_what_is_measured_is_measured_once(tmp_path):
    measured = []

    def measure(pairs):
        measured.append(pairs)
        return Quality(0.1 * len(measured), 0.2, 0.9)

    pairs = (Pair.parse("q8_0/q4_0"), Pair("", ""))
    first = Store(tmp_path).evaluations.get("search", measure, pairs)
    again = Store(tmp_path).evaluations
    assert again.get("search", measure, pairs) == first and again.of("search") == [(pairs, first)]
    assert again.get("heldout", measure, pairs) != first and len(measured) == 2
