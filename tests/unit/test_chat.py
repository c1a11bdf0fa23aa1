"""The chat loop over a model that is not there: what ends an answer never ends the conversation."""

from __future__ import annotations

import re
import signal

import pytest

from kvtuner_gguf.chat import answer, chat_loop, utf8
from kvtuner_gguf.errors import KvtunerError, StateError, StoppedError
from kvtuner_gguf.pair import Pair
from kvtuner_gguf.plan import Plan

pytestmark = pytest.mark.usefixtures("signals_as_at_start")


class FakeLlama:
    """Answers with what it was asked; a word is a token. A message may name the fault that answering it has."""

    model_path, should_stop = "m.gguf", None

    def __init__(self, n_ctx: int = 1000, takes_system: bool = True) -> None:
        self.n, self.takes_system, self.seen, self.n_reset = n_ctx, takes_system, [], 0
        self.n_tokens, self.kv_bytes, self.files = 0, 3 << 19, {}
        self.plan = Plan((Pair("q8_0", "q4_0"), Pair("q8_0", "q4_0"), Pair("", "")))

    def n_ctx(self) -> int:
        return self.n

    def reset(self) -> None:
        self.n_reset += 1

    def save_session(self, path: str, about: str) -> None:
        if "/no/" in path:
            raise StateError(f"session '{path}': cannot be written")
        self.files[path] = about

    def load_session(self, path: str) -> str:
        if path not in self.files:
            raise StateError(f"session '{path}': cannot be read")
        return self.files[path]

    def create_chat_completion(self, messages, **_):
        if messages[0]["role"] == "system" and not self.takes_system:
            raise ValueError("System role not supported")
        if "template" in messages[-1]["content"]:
            raise TypeError("unsupported operand")
        return self._stream(messages)

    def _stream(self, messages):
        n_tokens = sum(len(m["content"].split()) for m in messages)
        if n_tokens >= self.n:
            raise ValueError(f"Requested tokens ({n_tokens}) exceed context window of {self.n}")
        self.seen.append([m["content"] for m in messages])
        self.n_tokens = n_tokens
        last = messages[-1]["content"]
        for _ in range(last.count("slow")):
            signal.raise_signal(signal.SIGINT)
        if self.should_stop and self.should_stop():
            raise StoppedError("the prompt was not read")
        for piece in ("", "echo ", *last.partition(" ")):
            yield {"choices": [{"delta": {"content": piece}}]}
            if "stop" in last and piece:
                signal.raise_signal(signal.SIGINT)
            if "decode" in last and piece:
                raise RuntimeError("llama_decode returned -3")
        yield {"choices": [{"delta": {}}]}


def talk(llm, *lines, **kwargs) -> str:
    """What is written while the lines are read; a line may be an exception."""
    rest, out = list(lines), []

    def read():
        line = rest.pop(0) if rest else None
        if isinstance(line, type):
            raise line
        return line

    chat_loop(llm, read, out.append, **kwargs)
    assert not rest or rest == ["never read"]
    return "".join(out)


def test_a_conversation_goes_on_with_what_was_said():
    llm = FakeLlama()
    assert talk(llm, "one", "", "two", "/exit", "never read") == "echo one\necho two\n"
    assert llm.seen[-1] == ["one", "echo one", "two"]


def test_reset_keeps_the_system_message():
    llm = FakeLlama()
    talk(llm, "one", "/reset", "two", system="be brief")
    assert llm.seen == [["be brief", "one"], ["be brief", "two"]]


def test_an_answer_is_made_again_for_the_same_question():
    llm = FakeLlama()
    assert talk(llm, "/regen", "one", "two", "/regen", "three").startswith("(there is no answer yet)\n")
    assert llm.seen[2] == ["one", "echo one", "two"] == llm.seen[1]
    assert llm.seen[3] == ["one", "echo one", "two", "echo two", "three"]


def test_an_answer_that_is_not_made_again_stays():
    class Fails(FakeLlama):
        def _stream(self, messages):
            if len(self.seen) == 1:
                self.seen.append("failed")
                raise RuntimeError("llama_decode returned -3")
            yield from super()._stream(messages)

    llm = Fails()
    assert "ended early" in talk(llm, "one", "/regen", "two")
    assert llm.seen[-1] == ["one", "echo one", "two"]


def test_the_system_message_changes():
    llm = FakeLlama()
    talk(llm, "one", "/system  be brief ", "two", "/system", "three", system="first")
    assert [seen[0] for seen in llm.seen] == ["first", "be brief", "one"]


def test_what_can_be_said_is_listed_and_anything_else_is_no_question():
    llm = FakeLlama()
    told = talk(llm, "/help")
    names = [line.split()[0] for line in told.splitlines()[:-1]]
    assert names == ["/help", "/reset", "/regen", "/system", "/stats", "/plan", "/save", "/load", "/exit"]
    assert talk(llm, "/hlep me") == "(/hlep is no command; /help lists them)\n"
    assert llm.seen == []
    talk(llm, "/usr/bin is what?")
    assert llm.seen == [["/usr/bin is what?"]]


def test_the_state_of_things():
    llm = FakeLlama()
    out = talk(llm, "/stats", "one two", "/stats", "/plan").splitlines()
    assert out[:2] == ["0 of 1000 tokens of context; K/V cache 1.5 MiB", "no answer yet"]
    assert out[3] == "2 of 1000 tokens of context; K/V cache 1.5 MiB"
    assert re.fullmatch(r"the last answer began after [\d.]+ s, [\d.]+ tokens/s", out[4])
    assert [line.split() for line in out[5::2]] == [["layers", "K", "V"], ["0-1", "q8_0", "q4_0"]]
    assert out[8].split() == ["2", "none", "of", "its", "own"]


def test_a_conversation_is_saved_and_gone_on_with():
    llm = FakeLlama()
    assert talk(llm, "one", "/save a file", system="s").endswith("(saved)\n")
    out = talk(llm, "other", "/load a file", "two")
    assert "(loaded)\n" in out and llm.seen[-1] == ["s", "one", "echo one", "two"]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("/save", "which file?"),
        ("/load", "which file?"),
        ("/save /no/folder", "session '/no/folder': cannot be written"),
        ("/load none", "session 'none': cannot be read"),
        ("/load other", "'other' holds no conversation"),
    ],
)
def test_a_file_that_is_none_costs_no_conversation(line, told):
    llm = FakeLlama()
    llm.files["other"] = "[]"
    assert told in talk(llm, "one", line, "two")
    assert llm.seen[-1] == ["one", "echo one", "two"]


def test_a_message_of_several_lines():
    llm = FakeLlama()
    talk(llm, '"""one', "two", 'three"""', '"""four"""', '"""five')
    assert llm.seen[0] == ["one\ntwo\nthree"] and llm.seen[1][-1] == "four" and llm.seen[2][-1] == "five"


def test_the_oldest_turns_make_room():
    llm = FakeLlama(n_ctx=12)
    out = talk(llm, "one two", "three four", "a b c d")
    assert "the oldest turn is dropped" in out and out.endswith("echo a b c d\n")
    assert llm.seen[-1] == ["three four", "echo three four", "a b c d"]


def test_a_line_longer_than_the_context_costs_no_turn():
    llm = FakeLlama(n_ctx=12)
    out = talk(llm, "one", "word " * 20, "two")
    assert "longer than the context of 12 tokens" in out and "dropped" not in out
    assert llm.seen[-1] == ["one", "echo one", "two"] and llm.n_reset == 0


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("template", "chat template fails (TypeError: unsupported operand)"),
        ("decode", "ended early: llama_decode returned -3"),
    ],
)
def test_an_error_in_a_turn_keeps_the_conversation(line, told):
    llm = FakeLlama()
    out = talk(llm, "one", line, "two")
    assert told in out and out.endswith("echo two\n") and llm.n_reset == 1
    assert llm.seen[-1][:2] == ["one", "echo one"] and llm.seen[-1][-1] == "two"


def test_an_interrupted_answer_keeps_what_was_said_and_the_chat():
    llm = FakeLlama()
    out = talk(llm, "one", "stop here", "two")
    assert out == "echo one\necho stop\n(stopped)\necho two\n"  # with the token that was being made
    assert llm.seen[-1] == ["one", "echo one", "stop here", "echo stop", "two"]
    assert llm.n_reset == 0  # it ended between two tokens: what the model has read is known


@pytest.mark.parametrize(("line", "n_reset"), [("slow", 0), ("slow slow", 1)])
def test_an_interruption_while_the_prompt_is_read_keeps_what_the_model_holds_twice_does_not(line, n_reset):
    llm = FakeLlama()
    out = talk(llm, "one", line, "two")
    assert out.count("(stopped)") == 1 and llm.seen[-1] == ["one", "echo one", "two"] and llm.n_reset == n_reset


def test_an_interruption_at_the_prompt_ends_the_chat_and_the_handler_is_as_before():
    before = signal.getsignal(signal.SIGINT)
    assert talk(FakeLlama(), "one", KeyboardInterrupt, "never read") == "echo one\n\n"
    assert signal.getsignal(signal.SIGINT) is before


def test_a_system_message_that_is_refused_stands_in_the_first_question_and_the_user_is_told_once():
    llm = FakeLlama(takes_system=False)
    out = talk(llm, "one", "two", system="be brief")
    assert out.count("takes no system message") == 1
    assert llm.seen == [["be brief\n\none"], ["be brief\n\none", "echo be brief\n\none", "two"]]


def test_the_single_answer_raises_what_the_loop_tells():
    ask = [{"role": "system", "content": "s"}, {"role": "user", "content": "hi"}]
    told = []
    assert (
        "".join(answer(FakeLlama(takes_system=False), ask, max_tokens=1, temperature=0, say=told.append))
        == "echo s\n\nhi"
    )
    assert len(told) == 1
    for content, text in (
        ("word " * 2000, "longer than the context"),
        ("template", "m.gguf.*template fails"),
        ("decode", "ended early"),
    ):
        with pytest.raises(KvtunerError, match=text):
            list(answer(FakeLlama(), [{"role": "user", "content": content}], max_tokens=1, temperature=0))


def test_bytes_that_are_no_utf8_are_replaced():
    assert utf8("caf\udce9 \udcff") == "caf\ufffd \ufffd" and utf8("café 😀") == "café 😀"
