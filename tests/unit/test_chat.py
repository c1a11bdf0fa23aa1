"""The chat loop over a model that is not there: what ends an answer never ends the conversation."""

from __future__ import annotations

import signal

import pytest

from kvtuner_gguf.chat import answer, chat_loop, utf8
from kvtuner_gguf.errors import KvtunerError, StoppedError

pytestmark = pytest.mark.usefixtures("signals_as_at_start")


class FakeLlama:
    """Answers with what it was asked; a word is a token. A message may name the fault that answering it has."""

    model_path, should_stop = "m.gguf", None

    def __init__(self, n_ctx: int = 1000, takes_system: bool = True) -> None:
        self.n, self.takes_system, self.seen, self.n_reset = n_ctx, takes_system, [], 0

    def n_ctx(self) -> int:
        return self.n

    def reset(self) -> None:
        self.n_reset += 1

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
