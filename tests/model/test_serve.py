"""The patched llama-server, as its operator and its clients meet it."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
from click.testing import CliRunner

from kvtuner_gguf import Pair, Plan
from kvtuner_gguf.cli import main
from kvtuner_gguf.errors import NativeError
from kvtuner_gguf.gguf_file import write_plan
from kvtuner_gguf.native import lib_dir
from kvtuner_gguf.serve import Server

pytestmark = [
    pytest.mark.native,
    pytest.mark.model,
    pytest.mark.skipif(not (lib_dir() / "llama-server").is_file(), reason="built without llama-server"),
]

PLAN = Plan((Pair("q8_0", "q4_0"), Pair("q4_0", "q2_64"), Pair("f16", "q5_1")) * 10)
KEY = "of-this-test"
PROMPTS = [f"Tell me {n} things about {what}." for n in (2, 5) for what in ("cats", "rain", "Rome", "tea")]


@pytest.fixture(scope="module")
def planned(smol, tmp_path_factory) -> Path:
    return write_plan(smol, PLAN, tmp_path_factory.mktemp("served") / "planned.gguf")


@pytest.fixture(scope="module")
def server(planned, tmp_path_factory):
    """Each slot has cells of its own, so that what the others do changes no sum."""
    slots = tmp_path_factory.mktemp("slots")
    extra = ("--no-kv-unified",)
    with Server(planned, port=0, n_ctx=8192, n_parallel=8, api_key=KEY, slots=slots, extra=extra) as server:
        yield server


def post(url: str, path: str, *, key: str = KEY, **body: Any):
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    with urlopen(Request(url + path, json.dumps(body).encode(), headers), timeout=300) as answer:
        return json.load(answer)


def completion(server: Server, prompt: str, n: int = 48, **more: Any):
    asked: dict[str, Any] = {
        "prompt": prompt,
        "n_predict": n,
        "temperature": 0,
        "cache_prompt": False,
        "return_tokens": True,
    }
    return post(server.url, "/completion", **asked | more)["tokens"]


def test_props_tell_of_the_plan_and_its_bytes(server):
    ours = server.props()["kvtuner"]
    assert ours["plan"] == "file" and ours["notes"] == []
    assert [Pair(layer["type_k"], layer["type_v"]) for layer in ours["layers"]] == list(PLAN.pairs)
    assert ours["bytes"] == sum(layer["bytes"] for layer in ours["layers"]) < 90 << 20 < 180 << 20


def test_eight_clients_get_what_one_gets(server):
    alone = [completion(server, prompt) for prompt in PROMPTS]
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        assert list(pool.map(lambda prompt: completion(server, prompt), PROMPTS)) == alone


def test_a_slot_goes_on_where_it_was_saved(server):
    prompt = "Once upon a time there was a king who had three daughters, and the eldest of them"
    whole = completion(server, prompt, 40, id_slot=0)
    begun = completion(server, prompt, 20, id_slot=1, cache_prompt=True)
    assert begun == whole[:20]
    saved = post(server.url, "/slots/1?action=save", filename="king")
    completion(server, "Something else.", id_slot=1)
    restored = post(server.url, "/slots/1?action=restore", filename="king")
    assert restored["n_restored"] == saved["n_saved"] > 20
    text = post(server.url, "/detokenize", tokens=begun)["content"]
    asked = {"prompt": prompt + text, "n_predict": 20, "temperature": 0, "id_slot": 1, "return_tokens": True}
    rest = post(server.url, "/completion", **asked, cache_prompt=True)
    assert rest["tokens"] == whole[20:] and rest["timings"]["prompt_n"] <= 2


def test_a_wrong_key_is_refused(server):
    with pytest.raises(HTTPError, match="401"):
        post(server.url, "/completion", key="another", prompt="Hello", n_predict=1)


def test_a_client_that_goes_away_harms_no_other(server):
    host = server.url.removeprefix("http://")
    gone = http.client.HTTPConnection(host, timeout=60)
    body = json.dumps({"prompt": "A very long story:", "n_predict": 4000, "stream": True, "ignore_eos": True})
    gone.request("POST", "/completion", body, {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"})
    gone.getresponse().read(10)
    gone.close()
    assert completion(server, PROMPTS[0])


def test_a_server_that_is_killed_is_started_again(planned, monkeypatch):
    said = []
    monkeypatch.setattr("kvtuner_gguf.serve._STEADY_S", 0.0)
    with Server(planned, port=0, n_ctx=512, say=said.append) as server, ThreadPoolExecutor(1) as pool:
        first = server.pid
        watching = pool.submit(server.watch)
        os.kill(first, signal.SIGKILL)
        deadline = time.monotonic() + 60
        while len(said) < 3 and time.monotonic() < deadline:
            time.sleep(0.1)
        assert "was ended by SIGKILL" in said[1] and said[2] == said[0]
        assert server.pid != first and server.props()["kvtuner"]["plan"] == "file"
        os.kill(server.pid, signal.SIGTERM)  # in good order
        watching.result(60)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_it_ends_with_the_command(planned, how, signals_as_at_start):
    if how == signal.SIGKILL and sys.platform != "linux":
        pytest.skip("a parent's death is told to its child on Linux alone")
    command = [sys.executable, "-m", "kvtuner_gguf", "serve", str(planned), "--port", "0", "-c", "512"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as program:
        first = program.stderr.readline()
        port = re.match(r"http://127\.0\.0\.1:(\d+): 4 slots of up to 512 tokens, \S+ MiB, under a plan", first)
        assert port, first
        program.send_signal(how)
        program.wait(60)
    assert program.returncode == {signal.SIGINT: 0, signal.SIGTERM: 143, signal.SIGKILL: -9}[how]
    deadline = time.monotonic() + 30
    with suppress(ConnectionRefusedError):
        while time.monotonic() < deadline:
            socket.create_connection(("127.0.0.1", int(port[1])), 5).close()
            time.sleep(0.1)
        pytest.fail("llama-server still listens")


def test_it_outlives_the_thread_that_started_it(planned):
    with ThreadPoolExecutor(1) as pool:
        server = pool.submit(Server, planned, port=0, n_ctx=512).result()
    with server:
        time.sleep(0.5)
        assert post(server.url, "/completion", prompt="Hello", n_predict=1)["tokens_predicted"] == 1


def test_a_plan_beside_the_model_is_obeyed(smol, tmp_path):
    model = tmp_path / "model.gguf"
    model.symlink_to(smol)
    PLAN.save(tmp_path / "model.gguf.kvtuner.json")
    for plan, source in ((None, "environment"), (False, "none")):
        with Server(model, plan=plan, port=0, n_ctx=512) as server:
            assert server.props()["kvtuner"]["plan"] == source


FAULTS = {
    "unknown model": ("{tmp}/none.gguf", (), "does not exist"),
    "broken model": ("{tmp}/broken.gguf", (), "cannot be loaded"),
    "taken port": (
        "{planned}",
        ("--port", "{port}"),
        "port {port} of 127.0.0.1: cannot be had (Address already in use). Give another",
    ),
    "no memory": ("{planned}", (), "at 8192 tokens: takes 0.3 GiB, 0.1 are free."),
    "no key": ("{planned}", ("--host", "0.0.0.0"), "no key is asked"),
    "unknown option": ("{planned}", ("--port", "0", "--", "--no-such-option"), "--no-such-option"),
    "wrong plan": ("{planned}", ("--plan", "{planned}"), "JSON"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_cannot_work_is_told_before_it_is_waited_for(fault, planned, tmp_path, monkeypatch):
    if fault == "no memory":
        monkeypatch.setattr("kvtuner_gguf.serve.available_memory", lambda: 100 << 20)
    (tmp_path / "broken.gguf").write_bytes(planned.read_bytes()[:50_000_000])
    with socket.create_server(("127.0.0.1", 0)) as taken:
        names = {"tmp": tmp_path, "planned": planned, "port": taken.getsockname()[1]}
        model, options, text = FAULTS[fault]
        command = ["serve", model, *options]
        result = CliRunner().invoke(main, [word.format(**names) for word in command])
    assert result.exit_code and text.format(**names) in result.output, result.output
    assert "Traceback" not in result.output and len(result.output) < 1000


def test_a_build_without_it_says_so(planned, monkeypatch, tmp_path):
    monkeypatch.setattr("kvtuner_gguf.native.lib_dir", lambda: tmp_path)
    with pytest.raises(NativeError, match="has no llama-server"):
        Server(planned)
