"""What is asked is what is allocated, conditioned and shown: every kind of file under every argument, by every command
and class."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from dataclasses import replace

import pytest
from click.testing import CliRunner
from gguf_bytes import BOOL, F32, array, entry, string, strings, u32, with_entries
from running import feed, mixture, prompt, uniform, vectors

from kvtuner_gguf import Llama, native
from kvtuner_gguf.cli import main
from kvtuner_gguf.errors import CodecError, KvtunerError, NativeError, PlanError
from kvtuner_gguf.gguf_file import weights_hash, write_plan
from kvtuner_gguf.kvectors import KVectors
from kvtuner_gguf.pair import Pair
from kvtuner_gguf.plan import Plan

pytestmark = pytest.mark.native

VECTORS = tuple(vectors(il) for il in range(4))
IN_FILE = Plan(tuple(mixture(4)))
OTHER_WEIGHTS = "the plan was calibrated on other weights"


@pytest.fixture(scope="module")
def files(tiny, tmp_path_factory):
    """name -> (the file, the plan that it puts in force, part of the note that it makes)."""
    folder = tmp_path_factory.mktemp("files")

    def planned(name, plan, **arguments):
        return write_plan(tiny("llama", **arguments), plan, folder / f"{name}.gguf")

    conditioned = replace(IN_FILE, k_vectors=VECTORS)
    foreign = replace(conditioned, calibration={"weights": "0123456789abcdef"})
    off = entry("kvtuner.enabled", BOOL, b"\0")
    short = [u32("kvtuner.schema_version", 1), *(strings(f"kvtuner.type_{side}", [b"q8_0"] * 3) for side in "kv")]
    flipped = [
        *short[:1],
        *(strings(f"kvtuner.type_{side}", [b"q8_0"] * 4) for side in "kv"),
        string("kvtuner.checksum", b"00000000"),
    ]
    return {
        "no plan": (tiny("llama"), None, ""),
        "plan": (planned("plan", IN_FILE), IN_FILE, ""),
        "vectors": (planned("vectors", conditioned), conditioned, ""),
        "disabled": (with_entries(planned("enabled", conditioned), folder / "disabled.gguf", [off]), None, ""),
        "faulty": (
            with_entries(tiny("llama"), folder / "faulty.gguf", short),
            None,
            "has 3 entries, the model has 4 layers",
        ),
        "flipped": (
            with_entries(tiny("llama"), folder / "flipped.gguf", flipped),
            None,
            "kvtuner.checksum is 00000000, the types and vectors have",
        ),
        "other weights": (planned("foreign", foreign), foreign, OTHER_WEIGHTS),
    }


FILES = ["no plan", "plan", "vectors", "disabled", "faulty", "flipped", "other weights"]
FOREIGN = Plan(tuple(uniform("q5_0/q4_0", 4)), calibration={"weights": "fedcba9876543210"})
# what is given -> the plan in force; None = the file's
GIVEN = {
    "None": None,
    "False": False,
    "types": Plan(tuple(uniform("q4_0/q5_0", 4))),
    "types and vectors": Plan(tuple(uniform("q4_0", 4)), k_vectors=VECTORS[::-1]),
    "vectors of one layer": Plan(tuple(uniform("q4_0", 4)), k_vectors=(KVectors(), KVectors(), VECTORS[2], KVectors())),
    "of other weights": FOREIGN,
}
every_file = pytest.mark.parametrize("file", FILES)
every_given = pytest.mark.parametrize("given", GIVEN)


def expected(files, file, given):
    """((type_k, type_v, mean, scale) of each layer, part of the note, where it is from)."""
    _, in_file, note = files[file]
    plan = GIVEN[given]
    if plan is None:
        plan, source = in_file, "file" if in_file else "none"
    else:
        note, source = OTHER_WEIGHTS if plan is FOREIGN else "", "sidecar" if plan else "none"
    if not plan:
        return [("f16", "f16", False, False)] * 4, note, source
    vectors = plan.k_vectors or (KVectors(),) * 4
    return [(p.type_k, p.type_v, bool(v.mean), bool(v.scale)) for p, v in zip(plan.pairs, vectors)], note, source


def allocated(layers):
    return [(layer.type_k, layer.type_v, layer.k_mean, layer.k_scale) for layer in layers]


def assert_notes(notes, part):
    assert len(notes) == bool(part) and all(part in note for note in notes)


@pytest.fixture
def given_as(tmp_path):
    """given_as(kind, given) -> the argument: the Plan, or the path of its sidecar."""

    def make(kind, given):
        plan = GIVEN[given]
        if kind == "path" and isinstance(plan, Plan):
            plan.save(tmp_path / "plan.json")
            return tmp_path / "plan.json"
        return plan

    return make


@every_file
@every_given
@pytest.mark.parametrize("kind", ["record", "path"])
def test_llama(files, given_as, file, given, kind):
    want, note, _ = expected(files, file, given)
    llm = Llama(str(files[file][0]), plan=given_as(kind, given), n_ctx=256, n_threads=1, verbose=False, logits_all=True)
    assert allocated(llm.layers) == want
    assert_notes(llm.plan_notes, note)
    llm.close()


@every_file
@every_given
def test_session(load, files, file, given):
    want, note, _ = expected(files, file, given)
    session = load(files[file][0])
    session.put_in_force(GIVEN[given])
    assert_notes(native.plan_notes(session.model), note)
    with session.context(256) as ctx:
        assert allocated(ctx.layers()) == want and ctx.notes() == []


@pytest.mark.parametrize("given", ["types", "types and vectors"])
def test_a_given_plan_runs_the_same_on_every_file(load, files, given):
    logits = []
    for file in FILES:
        session = load(files[file][0])
        session.put_in_force(GIVEN[given])
        with session.context(256) as ctx:
            logits.append(feed(ctx, prompt(40)).tobytes())
    assert len(set(logits)) == 1


def run(*args):
    result = CliRunner().invoke(main, list(map(str, args)))
    assert result.exit_code == 0, result.output
    return result


@every_file
@every_given
def test_show(files, given_as, file, given):
    if GIVEN[given] is False:
        return  # there is no such option
    want, note, source = expected(files, file, given)
    path = given_as("path", given)
    shown = json.loads(run("show", files[file][0], *(["--plan", path] if path else []), "-c", 256, "--json").stdout)
    assert [(x["type_k"], x["type_v"], x["k_mean"], x["k_scale"]) for x in shown["layers"]] == want
    assert shown["source"] == source and bool(shown["plan"]) == (source != "none")
    assert_notes(shown["notes"], note)


@every_file
@every_given
def test_chat(files, given_as, file, given, monkeypatch):
    opened = []

    class Spy(Llama):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            opened.append((allocated(self.layers), self.plan_notes))

    monkeypatch.setattr("kvtuner_gguf.llama.Llama", Spy)
    want, note, _ = expected(files, file, given)
    path = given_as("path", given)
    option = ["--no-plan"] if path is False else ["--plan", path] if path else []
    result = run("chat", "-m", files[file][0], *option, "-c", 256, "-t", 1, "-n", 1, "--temp", 0, "-p", "hi")
    ((layers, notes),) = opened
    assert layers == want
    assert_notes(notes, note)
    assert (note in result.stderr) if note else "note:" not in result.stderr


def test_evaluate(files, given_as, tmp_path, monkeypatch):
    """One run measures all: the file's plan, sidecars, another file's, a pair. What each context has is looked at."""
    from kvtuner_gguf import runtime

    seen, text = [], tmp_path / "text.txt"
    text.write_text("".join(chr(97 + i * i % 23) for i in range(9000)))
    monkeypatch.setattr("kvtuner_gguf.calibrate.pipeline.STREAM", 64)
    first = runtime.Context.__init__

    def watched(self, session, *args, **kwargs):
        first(self, session, *args, **kwargs)
        seen.append(allocated(self.layers()))

    monkeypatch.setattr(runtime.Context, "__init__", watched)
    sidecars = {}
    for given in ("types", "types and vectors", "of other weights"):
        sidecars[given] = tmp_path / f"{given}.json"
        GIVEN[given].save(sidecars[given])
    names = ["file", *sidecars.values(), files["other weights"][0], "q8_0/q4_0"]
    result = run("evaluate", *names, "-m", files["vectors"][0], "-f", text, "-c", 256, "--chunks", 2, "-t", 1, "--json")
    want = [
        expected(files, "vectors", "None")[0],
        *(expected(files, "no plan", given)[0] for given in sidecars),
        expected(files, "other weights", "None")[0],
        [("q8_0", "q4_0", False, False)] * 4,
    ]
    assert seen[-len(want) :] == want
    shown = json.loads(result.stdout)
    assert [note.split(": ")[0] for note in shown["notes"]] == [
        str(sidecars["of other weights"]),
        str(files["other weights"][0]),
    ]
    assert all(OTHER_WEIGHTS in note for note in shown["notes"])


# ---- refusals


def test_a_plan_of_another_number_of_layers_is_refused_by_all(files, tmp_path, load):
    plan = Plan(tuple(uniform("q8_0", 5)))
    plan.save(tmp_path / "plan.json")
    path = files["vectors"][0]
    with pytest.raises(PlanError, match="plan has 5 layers, the model has 4"):
        Llama(str(path), plan=plan, n_ctx=256, verbose=False)
    session = load(path)
    with pytest.raises(PlanError, match="plan has 5 layers, the model has 4"):
        session.put_in_force(plan)
    for command in (
        ["show", path, "--plan", tmp_path / "plan.json"],
        ["chat", "-m", path, "--plan", tmp_path / "plan.json", "-p", "x"],
    ):
        result = CliRunner().invoke(main, list(map(str, command)))
        assert result.exit_code == 1 and "plan has 5 layers, the model has 4" in result.output


@pytest.mark.parametrize("plan", [IN_FILE, False], ids=["plan", "False"])
@pytest.mark.parametrize("key", ["kvtuner.enabled", "kvtuner.type_k.1", "kvtuner.k_mean"])
def test_overrides_of_a_plan_that_is_given_are_refused(files, plan, key):
    with pytest.raises(PlanError, match=f"kv_overrides: got {key} beside plan="):
        Llama(str(files["plan"][0]), plan=plan, kv_overrides={key: True}, n_ctx=256, verbose=False)


def test_vectors_that_the_model_has_no_use_for_leave_no_plan(load, files):
    session = load(files["no plan"][0])
    wrong = Plan(tuple(uniform("q4_0", 4)), k_vectors=(*VECTORS[:3], vectors(3, head_dim=32)))
    with pytest.raises(NativeError, match="layer 3: mean of K has 64 values, the layer's K has 128"):
        session.put_in_force(wrong)
    assert native.plan_layers(session.model) is None


def test_a_plan_of_these_weights_makes_no_note(load, tiny):
    session = load(tiny("llama"))
    session.put_in_force(Plan(tuple(uniform("q8_0", 4)), calibration={"weights": weights_hash(tiny("llama"))}))
    assert native.plan_notes(session.model) == []


def test_a_model_knows_its_weights(load, tiny, files):
    """By shape, whatever its plan; and by value."""
    one, planned, other = (load(path) for path in (tiny("llama"), files["vectors"][0], tiny("llama", seed=1)))
    for session in (one, planned, other):
        for plan in (None, IN_FILE, False):
            session.put_in_force(plan)
            assert native.weights_hash(session.model) == weights_hash(tiny("llama"))
    assert native.fingerprint(one.model) == native.fingerprint(planned.model) != native.fingerprint(other.model)
    with pytest.raises(NativeError, match="no plan is in force"):
        native.set_plan_weights(one.model, "0")


# ---- the checksum


def test_one_bit_of_the_types_or_vectors_is_seen(load, files, tmp_path):
    """Each of some hundred bits, wherever it leaves a file that can be read: no plan then, or it is seen."""
    data = files["vectors"][0].read_bytes()
    values = struct.pack("<f", VECTORS[0].mean[0])
    start = data.index(values, data.index(b"kvtuner.k_mean"))
    for at in (*range(start, start + 40), data.index(b"q8_0", data.index(b"kvtuner.type_k"))):
        for bit in (0, 4, 7):
            path = tmp_path / "flipped.gguf"
            path.write_bytes(data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :])
            session = load(path)
            (note,) = [n for n in native.plan_notes(session.model) if "checksum" in n]
            assert note.endswith("the plan is ignored") and native.plan_layers(session.model) is None


@pytest.mark.parametrize("old", [True, False])
def test_a_sidecar_that_was_changed_says_so(tmp_path, old):
    path = tmp_path / "plan.json"
    IN_FILE.save(path)
    values = json.loads(path.read_text())
    assert values["checksum"] == IN_FILE.checksum
    values["type_k"][0] = "q4_0"
    if old:  # by a version without checksums, or by hand
        del values["checksum"]
    path.write_text(json.dumps(values))
    if old:
        assert Plan.load(path).type_k[0] == "q4_0"
    else:
        with pytest.raises(PlanError, match="checksum: .* not as they were written"):
            Plan.load(path)


def test_a_name_is_read_up_to_its_nul(load, tiny, tmp_path):
    """In Python as in the run time."""
    from kvtuner_gguf.gguf_file import read_plan

    entries = [
        u32("kvtuner.schema_version", 1),
        *(strings(f"kvtuner.type_{side}", [b"q8_0\0x", b"q4_0", b"\0q8_0", b"q5_1\0"]) for side in "kv"),
    ]
    path = with_entries(tiny("llama"), tmp_path / "nul.gguf", entries)
    names = ["q8_0", "q4_0", "", "q5_1"]
    assert list(read_plan(path).type_k) == names
    assert native.plan_layers(load(path).model) == [(name, name) for name in names]


@pytest.mark.parametrize(("value", "ok"), [(65504.0, True), (-65504.0, True), (65505.0, False), (-1e30, False)])
def test_the_bound_of_a_mean_is_the_run_times(load, tiny, tmp_path, value, ok):
    counts = array("kvtuner.k_mean.n_values", 4, 4, struct.pack("<4I", 128, 0, 0, 0))
    entries = [u32("kvtuner.schema_version", 1), *(strings(f"kvtuner.type_{side}", [b"q8_0"] * 4) for side in "kv")]
    mean = array("kvtuner.k_mean", F32, 128, struct.pack("<128f", value, *[0.0] * 127))
    path = with_entries(tiny("llama"), tmp_path / "mean.gguf", [*entries, mean, counts])
    assert (native.plan_notes(load(path).model) == []) == ok
    if ok:
        KVectors(mean=(value,))
    else:
        with pytest.raises(PlanError, match="k_mean: got .*, need -65504 to 65504"):
            KVectors(mean=(value,))


def test_a_scale_too_wide_within_a_head_is_refused(load, tiny):
    session = load(tiny("llama"))
    wide = KVectors(scale=(1e-4, 1e4) * 64)
    with pytest.raises(
        NativeError, match="layer 0: scale of K in head 0 is 0.0001 to 10000, need a factor of 1e6 at most"
    ):
        session.set_plan(uniform("q4_0", 4), (wide,))
    between = KVectors(scale=(1e-3,) * 63 + (1e3,) + (1e-4,) * 32 + (1e2,) * 32)
    session.set_plan(uniform("q4_0", 4), (between,))


# ---- numbers that no library should get


@pytest.mark.parametrize("number", [24, 12, 16, 99, -1, 2**31, 10**20])
@pytest.mark.parametrize("side", ["type_k", "type_v"])
def test_a_number_that_is_no_cache_type_is_refused(files, side, number):
    with pytest.raises(CodecError, match=f"type {number}: is no cache type"):
        Llama(str(files["plan"][0]), n_ctx=256, verbose=False, **{side: number})


def test_a_number_of_a_cache_type_is_taken(files):
    llm = Llama(str(files["plan"][0]), n_ctx=256, verbose=False, type_k=8, type_v=native.type_number("q3_64"))
    assert llm.plan.pairs == (Pair("q8_0", "q3_64"),) * 4
    llm.close()


@pytest.mark.parametrize("n", [-1, 513, 100_000])
def test_threads_out_of_range_are_refused(files, load, n):
    path = str(files["plan"][0])
    for arguments in ({"n_threads": n}, {"n_threads_batch": n}):
        with pytest.raises(NativeError, match=f"threads: got {n}, need 1 to 512"):
            Llama(path, n_ctx=256, verbose=False, **arguments)
    from kvtuner_gguf.runtime import Session

    with pytest.raises(NativeError, match=f"threads: got {n}, need 1 to 512"):
        Session(path, n_threads=n)
    if n > 0:
        result = CliRunner().invoke(main, ["chat", "-m", path, "-c", "256", "-t", str(n), "-p", "x"])
        assert result.exit_code == 1 and f"threads: got {n}, need 1 to 512" in result.output


# ---- in a process of its own


def python(code, *args, timeout=60):
    """(standard output, standard error) of a program that begins with our import."""
    command = [
        sys.executable,
        "-c",
        f"import sys, os\nfrom kvtuner_gguf import Llama, Plan, Pair\n{code}",
        *map(str, args),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def test_a_construction_that_fails_leaves_no_noise(files, tmp_path):
    (tmp_path / "bad.json").write_text("{}")
    code = """
path, bad = sys.argv[1:]
for kwargs in (dict(plan=True), dict(plan=bad), dict(plan="nope.json"), dict(type_k="q9_9"), dict(type_k=24),
               dict(n_threads=10**6),
               dict(plan=Plan((Pair("q8_0", "q8_0"),) * 5)), dict(kv_overrides={"kvtuner.k_mean": False}, plan=False)):
    try:
        Llama(path, verbose=False, n_ctx=256, **kwargs)
        print("made", kwargs)
    except Exception as error:
        print(type(error).__name__)
try:
    Llama(path + ".none", verbose=False)
except ValueError as error:
    print("ValueError")
"""
    out, err = python(code, files["plan"][0], tmp_path / "bad.json")
    assert out.split() == ["PlanError"] * 3 + ["CodecError"] * 2 + ["NativeError"] + ["PlanError"] * 2 + ["ValueError"]
    assert err == ""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.parametrize("child", ["own", "parent's"])
def test_a_child_of_a_fork_runs_a_model(files, child):
    """As under gunicorn --preload or multiprocessing: the parent has used a Llama of several threads before."""
    code = """
import signal
path, child = sys.argv[1:]
make = lambda: Llama(path, n_ctx=256, n_threads=2, n_threads_batch=2, verbose=False)
go = lambda llm: llm.create_completion("hello there", max_tokens=8, temperature=0.0)["choices"][0]["text"]
llm = make()
want = go(llm)
pid = os.fork()
if pid == 0:
    signal.alarm(30)
    same = go(make() if child == "own" else llm) == want
    os._exit(0 if same else 1)
print(os.waitpid(pid, 0)[1], go(llm) == want)
"""
    assert python(code, files["plan"][0], child, timeout=120)[0].split() == ["0", "True"]


def test_a_state_error_is_ours_and_reads_as_it_is():
    from kvtuner_gguf.errors import StateError

    assert str(StateError("state: it's refused")) == "state: it's refused"
    assert issubclass(StateError, KvtunerError) and issubclass(StateError, KeyError)


def test_a_cache_that_the_machine_cannot_hold_is_refused_before_it_is_allocated(tiny, monkeypatch):
    for module in ("llama", "machine"):
        monkeypatch.setattr(f"kvtuner_gguf.{module}.total_memory", lambda: 300_000)
    with pytest.raises(NativeError, match="context of 4096 tokens: its K/V cache needs .* Use a smaller -c"):
        Llama(tiny("llama"), n_ctx=4096, verbose=False)
    plan = Plan(tuple(uniform("q2_64", 4)))
    Llama(tiny("llama"), n_ctx=256, plan=plan, verbose=False).close()


def test_a_cache_that_fits_in_any_type_is_not_looked_at_twice(tiny, monkeypatch):
    monkeypatch.setattr("kvtuner_gguf.llama.Session", None)
    Llama(tiny("llama"), n_ctx=256, verbose=False).close()
