"""The Python API, without a model: plans are read and written as the commands do."""

from __future__ import annotations

import inspect
import typing

import pytest
from small_gguf import PLAN, make_model

from kvtuner_gguf import api
from kvtuner_gguf.errors import CalibrationError, CodecError, PlanError


def test_a_plan_goes_into_a_model_a_copy_and_a_sidecar_and_comes_back(tmp_path):
    model = make_model(tmp_path / "m.gguf")
    before = model.read_bytes()
    assert api.read_plan(model) is None
    assert api.write_plan(str(model), PLAN, tmp_path / "copy.gguf") == tmp_path / "copy.gguf"
    assert api.write_plan(model, PLAN, tmp_path / "plan.json") == tmp_path / "plan.json"
    assert model.read_bytes() == before
    assert api.write_plan(model, PLAN) == model
    for path in (model, tmp_path / "copy.gguf", str(tmp_path / "plan.json")):
        assert api.read_plan(path) == PLAN
    api.write_plan(model, None)
    assert model.read_bytes() == before


def test_what_must_not_be_written_is_refused_as_by_the_commands(tmp_path):
    model, other = make_model(tmp_path / "m.gguf"), make_model(tmp_path / "other.gguf", n_layer=4)
    kept = other.read_bytes()
    with pytest.raises(PlanError, match="not the same model"):
        api.write_plan(model, PLAN, other)
    with pytest.raises(PlanError, match="a sidecar holds a plan, got none"):
        api.write_plan(model, None, tmp_path / "plan.json")
    assert other.read_bytes() == kept and not (tmp_path / "plan.json").exists()
    api.write_plan(model, PLAN, other, force=True)
    assert api.read_plan(other) == PLAN


def test_options_are_checked_before_work_is_spent():
    with pytest.raises(CodecError, match="q9_9"):
        api.Options("m.gguf", types=("q9_9",))
    with pytest.raises(CalibrationError, match="method 'best' is not known"):
        api.Options("m.gguf", method="best")
    with pytest.raises(CalibrationError, match="not for a KLD"):
        api.Options("m.gguf", api.WithinKld(0.1), method="paper")


def test_a_missing_package_is_named_with_its_cure(monkeypatch):
    monkeypatch.setattr(api, "find_spec", lambda name: None if name == "scipy" else object())
    for call in (api.calibrate, api.solve):
        with pytest.raises(CalibrationError, match=r"needs the package scipy.*kvtuner-gguf\[calibrate\]"):
            call(api.Options("m.gguf"))
    with pytest.raises(CalibrationError, match="scipy"):
        api.evaluate("m.gguf", {})


def test_all_that_is_public_is_typed_and_says_what_it_does():
    for name in api.__all__:
        found = getattr(api, name)
        if inspect.isfunction(found):
            hints = typing.get_type_hints(found)
            assert set(inspect.signature(found).parameters) <= hints.keys() and "return" in hints, name
        if inspect.isfunction(found) or inspect.isclass(found):
            assert inspect.getdoc(found), name
