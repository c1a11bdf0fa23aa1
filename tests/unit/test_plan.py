"""Plan: invariants, both stored forms, and a message for every fault that names the value and the cure."""

import base64
import copy
import json
import os
import pickle
import stat
import struct
import zlib
from functools import partial

import numpy as np
import pytest

from kvtuner_gguf.atomic import atomic_file
from kvtuner_gguf.errors import PlanError
from kvtuner_gguf.kvectors import KVectors, where_quantized
from kvtuner_gguf.pair import Pair
from kvtuner_gguf.plan import PREFIX, Plan
from kvtuner_gguf.quality import Quality

Q8, Q4, NONE = Pair("q8_0", "q4_0"), Pair("q4_0", "q4_0"), Pair("", "")
QUALITY = Quality(0.0123, 1.25, 0.975, n_positions=4096, kld_se=0.0005, same_top_se=0.004)


def full_plan():
    return Plan(
        pairs=(Q8, Q8, NONE, Q4),
        bits_per_value=5.1,
        quality=QUALITY,
        rival=Pair.parse("q5_0"),
        rival_quality=Quality(0.02, 2.5, 0.96, 4096),
        rival_bits=5.5,
        calibration={"text": "Größe", "seed": 7, "n_ctx": 2048, "llama_cpp_commit": "0c1e57098", "rotation.k": 1},
    )


def values(**changes):
    """A plan's JSON object with these keys changed; None takes one away."""
    changes = {key.replace("__", "."): value for key, value in changes.items()}
    both = json.loads(full_plan().to_json()) | changes
    return {key: value for key, value in both.items() if value is not None}


def fault(call, *parts):
    """The message of the PlanError that call raises; it must hold all parts and end with a cure."""
    with pytest.raises(PlanError) as caught:
        call()
    message = str(caught.value)
    assert all(part in message for part in parts), message
    assert message.endswith(".") and message.count(". ") + message.count("for example") >= 1, f"no cure: {message}"
    return message


VECTORS = (KVectors((0.1, -2.0), (1.0, 1 / 3)), KVectors(), KVectors(scale=(0.5, 2.0, 1.0)))
BASIS, ROWS = bytes([127, 128, 3, 255]), (0.5, 1 / 3)  # one head of two channels: 127 -128 / 3 -1
BASES = (KVectors((0.1, -2.0), (1.0, 1 / 3), BASIS, ROWS), KVectors(), KVectors((), (), BASIS * 2, ROWS * 2))


def conditioned(k_vectors=VECTORS):
    return Plan((Q8, NONE, Q4), k_vectors=k_vectors)


@pytest.mark.parametrize(
    "plan",
    [
        full_plan(),
        Plan((Q8,)),
        Plan((Q8, Q4), calibration={"text": ""}),
        conditioned(),
        conditioned((KVectors(),) * 3),
        conditioned(BASES),
    ],
)
def test_both_forms_round_trip_exactly(plan, tmp_path):
    assert Plan.from_json(plan.to_json()) == plan
    assert Plan.from_metadata({key: value for key, _, value in plan.to_metadata()}) == plan
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan


def test_metadata_has_the_names_and_kinds_of_the_format():
    assert [(key, kind) for key, kind, _ in full_plan().to_metadata()] == [
        ("kvtuner.schema_version", "u32"),
        ("kvtuner.type_k", "arr_str"),
        ("kvtuner.type_v", "arr_str"),
        ("kvtuner.checksum", "str"),
        ("kvtuner.bits_per_value", "f32"),
        ("kvtuner.kld_mean", "f32"),
        ("kvtuner.kld_p999", "f32"),
        ("kvtuner.same_top", "f32"),
        ("kvtuner.n_positions", "u32"),
        ("kvtuner.kld_se", "f32"),
        ("kvtuner.same_top_se", "f32"),
        ("kvtuner.rival", "str"),
        ("kvtuner.rival.bits_per_value", "f32"),
        ("kvtuner.rival.kld_mean", "f32"),
        ("kvtuner.rival.kld_p999", "f32"),
        ("kvtuner.rival.same_top", "f32"),
        ("kvtuner.rival.n_positions", "u32"),
        ("kvtuner.rival.kld_se", "f32"),
        ("kvtuner.rival.same_top_se", "f32"),
        ("kvtuner.calibration.text", "str"),
        ("kvtuner.calibration.seed", "u32"),
        ("kvtuner.calibration.n_ctx", "u32"),
        ("kvtuner.calibration.llama_cpp_commit", "str"),
        ("kvtuner.calibration.rotation.k", "u32"),
    ]


def test_json_and_metadata_hold_the_same_fields():
    metadata = {key: value for key, _, value in full_plan().to_metadata()}
    assert {PREFIX + key: value for key, value in values().items()} == metadata
    assert metadata["kvtuner.rival"] == "q5_0/q5_0"
    assert metadata["kvtuner.type_k"] == ["q8_0", "q8_0", "", "q4_0"]


def test_a_plan_is_one_value():
    plan = full_plan()
    assert hash(plan) == hash(full_plan())
    assert pickle.loads(pickle.dumps(plan)) == plan == copy.deepcopy(plan)
    with pytest.raises(TypeError):
        plan.calibration["seed"] = 8
    assert Plan([Q8, Q4]).pairs == (Q8, Q4)


def test_floats_are_kept_as_the_file_keeps_them():
    assert Quality(0.1 + 1e-12, 1, 1).kld_mean == 0.1
    assert Plan((Q8,), bits_per_value=1 / 3).bits_per_value == 0.33333334
    for value in np.random.default_rng(0).random(1000) * 10.0 ** np.arange(-500, 500).clip(-40, 38):
        kept = Quality(value, 1, 1).kld_mean
        assert np.float32(kept) == np.float32(value)
        assert Quality(float(np.float32(value)), 1, 1).kld_mean == kept  # what a GGUF gives back


def test_numbers_of_numpy_are_numbers():
    quality = Quality(np.float64(1), np.float32(2), 1, np.int64(3))
    plan = Plan((Q8,), np.float32(5.5), quality, calibration={"seed": np.int32(4)})
    assert Plan.from_json(plan.to_json()) == plan


def test_uniform_and_sides():
    plan = Plan.uniform(Q8, 3, has_kv=[True, False, True])
    assert plan.pairs == (Q8, NONE, Q8) and plan.n_layer == 3
    assert plan.type_k == ("q8_0", "", "q8_0") and plan.type_v == ("q4_0", "", "q4_0")
    assert Plan.uniform(Q4, 2).pairs == (Q4, Q4)
    fault(lambda: Plan.uniform(Q4, 2, has_kv=[True]), "has_kv", "1 flags", "2")


def test_runs_join_equal_neighbours():
    assert full_plan().runs() == [(0, 1, Q8), (2, 2, NONE), (3, 3, Q4)]
    assert Plan((Q8,)).runs() == [(0, 0, Q8)]


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (lambda: Plan(()), ["0 layers"]),
        (lambda: Plan((Q8, Pair("q8_0", ""))), ["layer 1", "q8_0/"]),
        (lambda: Plan((Q8,), rival_bits=5.5), ["rival"]),
        (lambda: Plan((Q8,), rival_quality=QUALITY), ["rival"]),
        (lambda: Plan((Q8,), rival=NONE), ["rival", "'/'"]),
        (lambda: Plan((Q8,), bits_per_value=float("nan")), ["bits_per_value", "nan"]),
        (lambda: Plan((Q8,), calibration={"seed": -1}), ["calibration.seed", "-1", "2^32"]),
        (lambda: Plan((Q8,), calibration={"seed": 1 << 32}), ["calibration.seed", "4294967296"]),
        (lambda: Plan((Q8,), calibration={"seed": True}), ["calibration.seed", "True"]),
        (lambda: Plan((Q8,), calibration={"kld": 0.5}), ["calibration.kld", "0.5"]),
        (lambda: Plan((Q8,), calibration={"Bad key": 1}), ["'Bad key'"]),
        (lambda: Plan((Q8,), calibration={"text": "\x1b[31m"}), ["calibration.text", "\\x1b"]),
        (lambda: Plan((Q8,), calibration={"text": "\udc80"}), ["calibration.text"]),
        (lambda: Quality(float("inf"), 1, 1), ["kld_mean", "inf"]),
        (lambda: Quality(1e39, 1, 1), ["kld_mean", "1e+39"]),
        (lambda: Quality(0, 1, 1.5), ["same_top", "1.5"]),
        (lambda: Quality(0, 1, 1, -3), ["n_positions", "-3"]),
        (lambda: Quality(0, 1, 1, 3, -0.5), ["kld_se", "-0.5"]),
    ],
)
def test_a_plan_that_cannot_be_is_refused(make, parts):
    fault(make, *parts)


FAULTS = [
    (values(schema_version=2), ["schema_version", "got 2"]),
    (values(schema_version=None), ["schema_version", "None"]),
    (values(type_k=None), ["type_k", "missing"]),
    (values(type_v=None), ["type_v", "missing"]),
    (values(type_k=["q8_0"]), ["type_v: got 4 layers", "type_k has 1"]),
    (values(type_k=[], type_v=[]), ["0 layers"]),
    (values(type_k="q8_0"), ["type_k", "'q8_0'", "array of strings"]),
    (values(type_k=[1, 2, 3, 4]), ["type_k", "[1, 2, 3, 4]"]),
    (values(type_v=["q4_0", "q4_0", "", "Q9_9"]), ["type_v: layer 3", "Q9_9", "q8_0"]),
    (values(type_k=["q8_0", "x" * 9999, "", "q4_0"]), ["type_k: layer 1", "xxx"]),
    (values(type_k=["", "q8_0", "", "q4_0"]), ["layer 0", "/q4_0"]),
    (values(bits_per_value="5"), ["bits_per_value", "'5'"]),
    (values(kld_mean=True), ["kld_mean", "True"]),
    (values(kld_mean=10**400), ["kld_mean", "1000"]),
    (values(kld_p999=None), ["quality", "kld_p999 missing"]),
    (values(rival="q5_0/q9"), ["rival", "q9"]),
    (values(rival="a/b/c"), ["rival", "a/b/c"]),
    (values(rival=None), ["rival", "without its pair"]),
    (values(rival__same_top=7), ["same_top", "7"]),
    (values(calibration__seed=1.5), ["calibration.seed", "1.5"]),
]


@pytest.mark.parametrize(("stored", "parts"), FAULTS)
def test_a_stored_fault_is_named_in_both_forms(stored, parts, tmp_path):
    assert len(fault(lambda: Plan.from_metadata({PREFIX + k: v for k, v in stored.items()}), *parts)) < 400
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(stored))
    fault(lambda: Plan.load(path), str(path), *parts)


@pytest.mark.parametrize(
    ("data", "part"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"type_k": "\xff"}', "not JSON"),
        (b"[1]", "[1]"),
        (b"null", "None"),
        (b"GGUF\x03\x00\x00\x00", "GGUF model"),
        (b" " * (65 << 20), "64 MiB"),
    ],
    ids=["empty", "half", "deep", "latin1", "list", "null", "gguf", "huge"],
)
def test_a_file_that_is_no_plan_is_named(data, part, tmp_path):
    path = tmp_path / "plan.json"
    path.write_bytes(data)
    fault(lambda: Plan.load(path), str(path), part)


def test_load_names_a_path_that_cannot_be_read(tmp_path):
    fault(lambda: Plan.load(tmp_path / "none.json"), "none.json", "No such file")
    fault(lambda: Plan.load(tmp_path), str(tmp_path))


def test_a_byte_order_mark_is_no_fault(tmp_path):
    (tmp_path / "plan.json").write_text(full_plan().to_json(), encoding="utf-8-sig")
    assert Plan.load(tmp_path / "plan.json") == full_plan()


def test_metadata_without_a_plan_is_no_plan():
    assert Plan.from_metadata({"general.architecture": "llama", "kvtuner.enabled": True}) is None


def test_keys_of_a_later_version_are_left_out():
    assert Plan.from_json(json.dumps(values(v_scale=[0.5], type_k__7="q8_0"))) == full_plan()


@pytest.mark.parametrize("step", ["fsync", "replace", "chmod"])
@pytest.mark.parametrize("error", [OSError(28, "No space left"), KeyboardInterrupt()], ids=["oserror", "ctrl-c"])
def test_a_save_that_fails_leaves_the_old_file_alone(step, error, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise error

    path = tmp_path / "plan.json"
    Plan((Q4,)).save(path)
    monkeypatch.setattr(os, step, fail)
    with pytest.raises(PlanError if isinstance(error, OSError) else KeyboardInterrupt):
        full_plan().save(path)
    monkeypatch.undo()
    assert Plan.load(path) == Plan((Q4,))
    assert os.listdir(tmp_path) == ["plan.json"]


def test_save_names_a_folder_that_is_not_there(tmp_path):
    fault(lambda: full_plan().save(tmp_path / "none" / "plan.json"), "none", "No such file")


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX modes and links")
def test_save_keeps_mode_and_link(tmp_path):
    path, link = tmp_path / "plan.json", tmp_path / "link.json"
    Plan((Q4,)).save(path)
    assert stat.S_IMODE(path.stat().st_mode) & 0o400
    path.chmod(0o640)
    link.symlink_to(path)
    full_plan().save(link)
    assert link.is_symlink() and Plan.load(path) == full_plan()
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_atomic_file_syncs_before_it_renames(tmp_path, monkeypatch):
    steps = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, name=name, real=real: (steps.append(name), real(*args))[1])
    with atomic_file(tmp_path / "x") as out:
        out.write(b"data")
        assert not (tmp_path / "x").exists()
    assert (tmp_path / "x").read_bytes() == b"data"
    assert steps[:2] == ["fsync", "replace"]


# ---- vectors of K


def test_vectors_are_stored_one_layer_after_another():
    rows = {key: (kind, value) for key, kind, value in conditioned().to_metadata()}
    assert rows["kvtuner.k_mean"] == ("arr_f32", [0.1, -2.0])
    assert rows["kvtuner.k_mean.n_values"] == ("arr_u32", [2, 0, 0])
    assert rows["kvtuner.k_scale"] == ("arr_f32", [1.0, 0.33333334, 0.5, 2.0, 1.0])
    assert rows["kvtuner.k_scale.n_values"] == ("arr_u32", [2, 0, 3])
    assert conditioned().vector_bytes == 4 * 7
    only_means = conditioned((KVectors((1.0,)), KVectors(), KVectors()))
    assert not any(key.startswith("kvtuner.k_scale") for key, _, _ in only_means.to_metadata())


def test_no_vectors_are_no_keys():
    for plan in (conditioned(()), conditioned((KVectors(),) * 3)):
        assert plan.k_vectors == () and not any(".k_" in key for key, _, _ in plan.to_metadata())


def test_only_a_quantized_k_keeps_its_vectors():
    v = KVectors((1.0,))
    pairs = (Q8, NONE, Pair.parse("f16/q8_0"), Pair.parse("bf16/q8_0"), Q4)
    assert where_quantized((v,) * 5, pairs) == (v, KVectors(), KVectors(), KVectors(), v)


def test_a_basis_is_stored_as_bytes():
    rows = {key: (kind, value) for key, kind, value in conditioned(BASES).to_metadata()}
    assert rows["kvtuner.k_basis"] == ("arr_i8", BASIS * 3)
    assert rows["kvtuner.k_basis.n_values"] == ("arr_u32", [4, 0, 8])
    assert rows["kvtuner.k_basis_scale"] == ("arr_f32", [0.5, 0.33333334] * 3)
    assert rows["kvtuner.k_basis_scale.n_values"] == ("arr_u32", [2, 0, 4])
    assert json.loads(conditioned(BASES).to_json())["k_basis"] == base64.b64encode(BASIS * 3).decode()
    assert conditioned(BASES).vector_bytes == 4 * (2 + 2 + 6) + 12
    assert [v.head_dim for v in BASES] == [2, 0, 2]


@pytest.mark.parametrize("stored", [BASIS, [127, -128, 3, -1], (127, np.int8(-128), 3, -1), "f4AD/w=="])
def test_a_basis_may_be_given_as_bytes_numbers_or_base64(stored):
    assert KVectors(basis=stored, basis_scale=ROWS) == KVectors((), (), BASIS, ROWS)


def test_the_checksum_covers_the_basis_after_what_it_covered_before():
    def crc(*parts):
        return f"{zlib.crc32(b''.join(parts)):08x}"

    names = b"q8_0\0\0q4_0\0q4_0\0\0q4_0\0"
    means = struct.pack("<2f3I", 0.1, -2, 2, 0, 0)
    scales = struct.pack("<2f3I", 1, 1 / 3, 2, 0, 0)
    bases = BASIS * 3 + struct.pack("<3I", 4, 0, 8)
    rows = struct.pack("<6f3I", *ROWS * 3, 2, 0, 4)
    assert conditioned(()).checksum == crc(names)
    assert conditioned(tuple(v.without_basis for v in BASES)).checksum == crc(names, means, scales)
    assert conditioned(BASES).checksum == crc(names, means, scales, bases, rows)


def test_a_basis_is_in_force_under_types_of_groups_alone():
    v = BASES[0]
    assert v.under("k3_64") == v
    assert v.under("q3_64") == v.under("q8_0") == v.without_basis == KVectors(v.mean, v.scale)
    assert v.under("f16") == v.under("") == KVectors() == KVectors().under("k2_64")
    assert v.basis_alone == KVectors((), (), BASIS, ROWS)
    assert bool(v.basis_alone) and v.n_bytes == v.without_basis.n_bytes + v.basis_alone.n_bytes
    pairs = (Pair.parse("k2_64/q4_0"), NONE, Q8)
    assert where_quantized((v,) * 3, pairs) == (v, KVectors(), v.without_basis)


def test_faulty_bases_are_refused():
    for value in ([128, 0, 0, 0], [-129, 0, 0, 0], [1.0, 0, 0, 0], [True, 0, 0, 0], "f4AD/w=", "f4AD/w==x", 7, None):
        fault(partial(KVectors, basis=value, basis_scale=ROWS), "k_basis: got ", "-128 to 127", "base64")
    for value in (0.0, -1.0, 1e-7, 1e7):
        fault(partial(KVectors, basis=BASIS, basis_scale=(1.0, value)), "k_basis_scale", f"{value:g}", "1e-06 to 1e+06")
    fault(partial(KVectors, basis=BASIS), "4 values", "k_basis_scale has 0", "both or neither")
    fault(partial(KVectors, basis_scale=ROWS), "0 values", "k_basis_scale has 2", "both or neither")
    fault(partial(KVectors, basis=BASIS, basis_scale=(1.0,) * 3), "4 values", "has 3", "square")
    fault(partial(KVectors, basis=BASIS + BASIS, basis_scale=ROWS), "8 values", "has 2", "square")
    fault(partial(KVectors, basis=BASIS, basis_scale=(1.0,) * 8), "4 values", "has 8", "square")
    fault(partial(KVectors, (1.0,) * 4, (), BASIS, ROWS), "k_mean: got 4 values", "k_basis_scale has 2")
    fault(partial(KVectors, (), (1.0,), BASIS, ROWS), "k_scale: got 1 values", "k_basis_scale has 2")


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"k_basis": "not base64"}, ["k_basis: got 'not base64'", "base64"]),
        ({"k_basis": None}, ["k_basis", "n_values"]),
        ({"k_basis_scale.n_values": None}, ["k_basis_scale", "n_values"]),
        ({"k_basis.n_values": [4, 0, 4]}, ["k_basis: got 12 values", "adds up to 8"]),
        ({"k_basis.n_values": [4, 8]}, ["k_basis.n_values: got 2 layers", "k_mean.n_values has 3"]),
        ({"k_basis.n_values": [8, 0, 4]}, ["layer 0", "k_basis: got 8 values", "k_basis_scale has 2"]),
        ({"k_basis_scale.n_values": [0, 2, 4]}, ["layer 0", "k_basis: got 4 values", "k_basis_scale has 0"]),
        ({"k_basis_scale": [0.0] * 6}, ["layer 0", "k_basis_scale", "0"]),
    ],
)
def test_faulty_stored_bases_are_refused(changes, parts):
    stored = {k: v for k, v in (json.loads(conditioned(BASES).to_json()) | changes).items() if v is not None}
    fault(lambda: Plan.from_json(json.dumps(stored)), *parts)


def test_faulty_vectors_are_refused():
    for value in (float("nan"), float("inf"), "1", None, True):
        fault(partial(KVectors, mean=(1.0, value)), "k_mean")
    for value in (0.0, -1.0, 1e-5, 1e5):
        fault(partial(KVectors, scale=(1.0, value)), "k_scale", f"{value:g}", "0.0001 to 10000")
    fault(lambda: KVectors((1.0,), (1.0, 2.0)), "1 values", "2")
    fault(lambda: conditioned(VECTORS[:2]), "2 layers", "3")


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"k_mean": 1.0}, ["k_mean: got 1.0", "an array of floats"]),
        ({"k_mean": ["1"]}, ["k_mean: got '1'"]),
        ({"k_mean": None}, ["k_mean", "n_values"]),
        ({"k_scale.n_values": None}, ["k_scale", "n_values"]),
        ({"k_scale.n_values": [2, 0, 2]}, ["k_scale: got 5 values", "adds up to 4"]),
        ({"k_scale.n_values": [2, -1, 4]}, ["k_scale.n_values: got -1"]),
        ({"k_scale.n_values": [2, 3]}, ["2 layers", "3"]),
        ({"k_mean.n_values": [1, 0, 1]}, ["layer 0", "1 values", "2"]),
        ({"k_scale": [1.0, 0.0, 0.5, 2.0, 1.0]}, ["layer 0", "k_scale", "0"]),
    ],
)
def test_faulty_stored_vectors_are_refused(changes, parts):
    stored = {k: v for k, v in (json.loads(conditioned().to_json()) | changes).items() if v is not None}
    fault(lambda: Plan.from_json(json.dumps(stored)), *parts)
