"""The records: what they refuse, and that they come back from disk as they were."""

import json
from dataclasses import replace

import numpy as np
import pytest
import samples

from kvtuner_gguf.calibrate import records
from kvtuner_gguf.calibrate.error import MEASURES
from kvtuner_gguf.calibrate.results import Conditions, ErrorTable, Groups, Menus, Trial, Trials, non_dominated
from kvtuner_gguf.calibrate.samples import Capture, sample_path, save_sample
from kvtuner_gguf.errors import CalibrationError
from kvtuner_gguf.pair import Pair

Q8, Q84, Q4 = Pair.parse("q8_0"), Pair.parse("q8_0/q4_0"), Pair.parse("q4_0")
NONE = Pair("", "")
NAMES = (*MEASURES, "stream_error")


def make_sample(il=3, **fields):
    return samples.make_sample(il, **{"n_head": 4, "n_q": 3, "n_kv": 5, "head_dim_v": 32, **fields})


def make_table(il=(1, 4), pairs=(Q8, Q84, Q4), **measures):
    table = np.arange(len(il) * len(pairs), dtype=np.float64).reshape(len(il), len(pairs)) / 3
    return ErrorTable(pairs, il, {name: table + i for i, name in enumerate(NAMES)} | measures)


def make_trial(n_bytes, kld, pair=Q8):
    return Trial((pair, NONE, pair), kld, 8.5, n_bytes)


@pytest.mark.parametrize(
    "fields",
    [
        {"sinks": np.arange(4, dtype=np.float32), "logit_softcap": 50.0, "max_bias": 8.0, "rot_k": 64, "rot_v": 32},
        {"output": np.ones((4, 3, 32), np.float32)},
    ],
)
def test_sample_comes_back_as_it_was(tmp_path, fields):
    sample = make_sample(**fields)
    save_sample(tmp_path / "new", 7, sample)
    Capture(tmp_path / "new", n_layer=6, il=(3,), n_sample=8).save()
    loaded = Capture.load(tmp_path / "new").sample(3, 7)
    for name, value in vars(sample).items():
        np.testing.assert_array_equal(getattr(loaded, name), value, err_msg=name)  # K and V held float16 already
        assert type(getattr(loaded, name)) is type(value)
    assert [p.name for p in sorted((tmp_path / "new").iterdir())] == ["capture.json", "l003_s07.npz"]


def test_sample_keeps_k_and_v_in_half_the_space(tmp_path):
    save_sample(tmp_path, 0, make_sample())
    with np.load(sample_path(tmp_path, 3, 0)) as file:
        assert {name: str(file[name].dtype) for name in "qkv"} == {"q": "float32", "k": "float16", "v": "float16"}


def test_sample_refuses_what_float16_cannot_hold(tmp_path):
    sample = make_sample()
    sample.k[0, 0, 0] = 1e5
    with pytest.raises(CalibrationError, match="layer 3: k holds values outside float16"):
        save_sample(tmp_path, 0, sample)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_head": 3}, "3 heads, need a multiple of its 2 KV heads"),
        ({"q": np.zeros((4, 3), np.float32)}, r"q has shape \(4, 3\)"),
        ({"v": np.zeros((2, 6, 32), np.float32)}, r"v is float32 of shape \(2, 6, 32\), need float32 of \(2, 5, 32\)"),
        ({"k": np.zeros((2, 5, 64))}, "k is float64"),
        ({"mask": np.zeros((5, 3), np.float32)}, "mask is"),
        ({"sinks": np.zeros(2, np.float32)}, "sinks is"),
        ({"output": np.zeros((4, 3, 64), np.float32)}, "output is"),
        ({"rot_k": 48}, "rot_k is 48, need 0 or a power of two that divides head_dim 64"),
        ({"rot_v": 64}, "rot_v is 64, need 0 or a power of two that divides head_dim 32"),
    ],
)
def test_sample_refuses_shapes_that_do_not_fit(fields, message):
    with pytest.raises(CalibrationError, match=message):
        make_sample(**fields)


def test_sample_knows_values_that_lie_in_its_keys():
    sample = make_sample()
    assert not sample.v_in_k
    assert replace(sample, v=sample.k[..., :32]).v_in_k
    assert not replace(sample, v=sample.k).v_in_k  # equal, but a tensor of its own


def test_capture_reads_one_sample_at_a_time(tmp_path):
    for il in (0, 2):
        save_sample(tmp_path, 0, make_sample(il))
    capture = Capture(tmp_path, n_layer=3, il=(0, 2), n_sample=1)
    sample_path(tmp_path, 0, 0).unlink()
    assert capture.sample(2, 0).il == 2
    with pytest.raises(CalibrationError, match="need sample 0 of layer 0"):
        capture.sample(0, 0)


@pytest.mark.parametrize(("il", "n_sample"), [((), 1), ((2, 1), 1), ((0, 0), 1), ((0, 3), 1), ((-1, 0), 1), ((0,), 0)])
def test_capture_refuses_layers_that_are_none(tmp_path, il, n_sample):
    with pytest.raises(CalibrationError):
        Capture(tmp_path, n_layer=3, il=il, n_sample=n_sample)


def test_error_table_comes_back_with_its_holes(tmp_path):
    hole = np.array([[0.1, np.nan, 0.3], [0.25, 0.5, 1 / 3]])
    table = make_table(**dict.fromkeys(NAMES, hole))
    table.save(tmp_path / "errors.json")
    loaded = ErrorTable.load(tmp_path / "errors.json")
    assert (loaded.pairs, loaded.il) == (table.pairs, table.il)
    for name in NAMES:
        np.testing.assert_array_equal(loaded.measure(name), hole)
    assert "NaN" not in (tmp_path / "errors.json").read_text()


@pytest.mark.parametrize(
    ("measures", "message"),
    [
        ({"key_error": np.zeros((2, 2))}, r"key_error has shape \(2, 2\), need \(2, 3\)"),
        ({"score_error": np.full((2, 3), -1.0)}, "score_error holds a value that is negative"),
        ({"output_nrmse": np.full((2, 3), np.inf)}, "infinite"),
        ({"value_error": np.full((2, 3), np.nan)}, "NaN where key_error is not"),
        ({"pairs": (Q8, Q8, Q4)}, "need each once"),
        ({"il": (4, 1)}, "ascending"),
        (dict.fromkeys(NAMES, np.array([[0, 0, 0], [np.nan] * 3])), "layer 4 has no pair"),
    ],
)
def test_error_table_refuses(measures, message):
    with pytest.raises(CalibrationError, match=message):
        make_table(**measures)


def test_error_table_names_its_measures():
    with pytest.raises(CalibrationError, match="measure 'loss' is not known. Use one of: key_error, value_error"):
        make_table().measure("loss")


@pytest.mark.parametrize("pairs", [((Q4,),), ((Q4,), ()), ((Q4,), (Q8, Q8))])
def test_menus_refuse(pairs):
    with pytest.raises(CalibrationError, match="Prune again"):
        Menus((1, 4), pairs)


def test_menus_have_none_for_a_layer_without_kv():
    with pytest.raises(CalibrationError, match="layer 0: has no menu"):
        Menus((1, 4), ((Q4,), (Q8,))).menu(0)


@pytest.mark.parametrize("layers", [((0, 1), (1, 2)), ((0,), (2,)), ((0, 1, 2, 3),), ((0, 1, 2), ()), ()])
def test_groups_refuse_what_is_no_partition(layers):
    with pytest.raises(CalibrationError, match="not a partition of layers"):
        Groups((0, 1, 2), layers)


def test_groups_refuse_a_published_slip():
    # KVTuner's Qwen2.5-14B per-channel tables hold layer 25 twice
    with pytest.raises(CalibrationError):
        Groups(tuple(range(48)), (tuple(range(26)), tuple(range(25, 48))))


@pytest.mark.parametrize("kld", [float("nan"), float("inf")])
def test_trial_refuses_a_kld_that_is_no_number(kld):
    with pytest.raises(CalibrationError, match="need a finite KLD"):
        make_trial(100, kld)


def test_trials_refuse_two_models():
    with pytest.raises(CalibrationError, match="need one model"):
        Trials((make_trial(1, 1.0), Trial((Q8,), 1.0, 8.5, 1)))


def test_front_worked_by_hand():
    points = [(100, 0.1), (50, 0.5), (50, 0.4), (70, 0.4), (60, 0.6), (100, 0.1), (40, 0.9), (120, 0.05), (130, 0.05)]
    front = non_dominated(*zip(*points, strict=True))
    assert [points[i] for i in front] == [(40, 0.9), (50, 0.4), (100, 0.1), (120, 0.05)]


def test_non_dominated_keeps_the_first_of_equals():
    assert non_dominated([2, 1, 2, 1], [0.5, 0.7, 0.5, 0.7]) == [1, 0]
    assert non_dominated([], []) == []


def sealed(body: dict) -> str:
    """A record as it is written, whatever its data."""
    return json.dumps({**body, "sha256": records._seal_of_json(body)})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"record": "Capture", "n_layer": 1}', "holds Capture, need Conditions"),
        (sealed({"record": "Conditions", "k_vectors": []}), "damaged .*errors"),
        (sealed({"record": "Conditions", "k_vectors": 0, "errors": {}}), "damaged"),
        ('{"record": "Conditions", "k_vectors": [], "errors": {}}', "damaged .*seal"),
        (sealed({"record": "Conditions", "k_vectors": [], "errors": {"0": {"none": 1}}}).replace("1", "2", 1), "seal"),
        ("[]", "damaged"),
        ('{"record": "Cond', "damaged"),
        (None, "there is no such file, need Conditions"),
    ],
)
def test_load_refuses_another_file(tmp_path, text, message):
    path = tmp_path / "conditions.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(CalibrationError, match=message):
        Conditions.load(path)


def test_failed_save_leaves_the_old_file(tmp_path):
    path = tmp_path / "table.json"
    make_table().save(path)
    before = path.read_text()
    broken = make_table()
    object.__setattr__(broken, "il", (object(),))  # nothing that JSON knows
    with pytest.raises(TypeError):
        broken.save(path)
    assert path.read_text() == before
    assert json.loads(before)["record"] == "ErrorTable"
    assert [p.name for p in tmp_path.iterdir()] == ["table.json"]
