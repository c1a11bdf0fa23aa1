"""A conversation in a file: what a Llama held goes on in another object, or is refused in words."""

from __future__ import annotations

import pytest
from chats import LONG, N_LONG, OTHERS, PLAN, SHORT, THIRD, answer, every_arch

from kvtuner_gguf.errors import StateError

pytestmark = pytest.mark.native


def n_evaluated(llm, monkeypatch) -> list[int]:
    """Sizes of what the object reads from now on."""
    sizes, read = [], llm.eval
    monkeypatch.setattr(llm, "eval", lambda tokens: sizes.append(len(tokens)) or read(tokens))
    return sizes


@every_arch
def test_a_session_goes_on_in_another_object_without_reading_again(llama, arch, tmp_path, monkeypatch):
    """Three turns, of which the last is asked of a new object."""
    path, unbroken = tmp_path / "s.session", llama(arch)
    turns = [*LONG, *answer(unbroken, LONG)]
    turns += [*SHORT, *answer(unbroken, [*turns, *SHORT])]
    unbroken.save_session(path)
    held = unbroken.n_tokens
    want = answer(unbroken, [*turns, *THIRD])
    other = llama(arch)
    answer(other, SHORT)
    other.load_session(path)
    assert other.n_tokens == held and list(other.input_ids[:held]) == turns[:held]
    sizes = n_evaluated(other, monkeypatch)
    assert answer(other, [*turns, *THIRD]) == want
    assert sizes[0] == len(turns) + len(THIRD) - held
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_session_is_as_large_as_its_cells(objects, tmp_path):
    """A plan makes it smaller by what it takes less a token."""
    sizes = {}
    for name, plan in (("plan", PLAN), ("f16", False)):
        llm = objects(plan=plan)
        llm.eval(LONG)
        llm.save_session(tmp_path / name)
        cells = llm.kv_bytes * llm.n_tokens // 1024
        assert cells < (tmp_path / name).stat().st_size < cells + 8 * 1024 + 20 * llm.n_tokens
        sizes[name] = (tmp_path / name).stat().st_size
    assert sizes["plan"] < 0.6 * sizes["f16"]


REASONS = {
    "other types": "layer 0: the state has K q8_0, this context has q5_0",
    "no plan": "layer 0: the state has K q8_0, this context has f16",
    "vectors": "layer 0: the state has K q8_0, this context has q8_0 (conditioned)",
    "other weights": "was saved with other weights or settings",
    "other rope": "was saved with other weights or settings",
    "no flash attention": "incompatible V transposition",
}


@pytest.mark.parametrize("case", OTHERS)
def test_a_refused_session_says_why_and_leaves_an_object_as_after_a_reset(objects, case, tmp_path):
    one, other = objects(), objects(**OTHERS[case])
    one.eval(LONG)
    one.save_session(tmp_path / "s")
    answer(other, THIRD)
    with pytest.raises(StateError, match="session: .*Give the prompt again") as error:
        other.load_session(tmp_path / "s")
    assert REASONS[case] in str(error.value)
    assert other.n_tokens == 0
    assert answer(other, [*LONG, *SHORT]) == answer(objects(**OTHERS[case]), [*LONG, *SHORT])


@pytest.mark.parametrize("damage", ["cut", "changed", "other file", "missing", "folder"])
def test_a_session_that_is_none_is_refused(llama, damage, tmp_path):
    llm, path = llama("llama"), tmp_path / "s"
    llm.eval(SHORT)
    llm.save_session(path)
    data = bytearray(path.read_bytes())
    if damage == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif damage == "changed":
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    elif damage == "other file":
        path.write_text("no session")
    elif damage == "missing":
        path.unlink()
    else:
        path.unlink()
        path.mkdir()
    with pytest.raises(StateError, match=r"session '.*': (is none, or is damaged|cannot be read \(No such file)"):
        llm.load_session(path)
    assert llm.n_tokens == 0 and answer(llm, THIRD) == answer(llama("llama"), THIRD)


def test_a_session_that_cannot_be_written_leaves_what_stood_there(llama, tmp_path):
    llm = llama("llama")
    llm.eval(SHORT)
    with pytest.raises(StateError, match="no/s"):
        llm.save_session(tmp_path / "no" / "s")
    (tmp_path / "s").mkdir()
    with pytest.raises(StateError):
        llm.save_session(tmp_path / "s")
    assert (tmp_path / "s").is_dir() and llm.n_tokens == len(SHORT)


def test_an_empty_session_is_one(llama, tmp_path):
    llama("llama").save_session(tmp_path / "s")
    llm = llama("llama")
    llm.eval(LONG)
    llm.load_session(tmp_path / "s")
    assert llm.n_tokens == 0 and answer(llm, SHORT) == answer(llama("llama"), SHORT)


def test_a_session_of_more_tokens_than_the_context_is_refused(llama, tmp_path):
    llm = llama("llama")
    llm.eval(LONG)
    llm.save_session(tmp_path / "s")
    with pytest.raises(StateError, match=f"session: has {N_LONG} tokens, this context 256"):
        llama("llama", n_ctx=256).load_session(tmp_path / "s")
