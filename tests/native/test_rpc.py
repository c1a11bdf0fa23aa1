"""Models whose layers lie on hosts over RPC: the plan holds there, and a host that ends ends nothing else."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from chats import LONG, PLAN, SHORT, VECTORS
from click.testing import CliRunner
from hosts import Host, Middle

from kvtuner_gguf import native, rpc
from kvtuner_gguf.cli import main
from kvtuner_gguf.errors import NativeError
from kvtuner_gguf.gguf_file import write_plan

pytestmark = pytest.mark.native

CONDITIONED = replace(PLAN, k_vectors=VECTORS)


@pytest.fixture(scope="module")
def hosts():
    opened = [Host() for _ in range(3)]
    yield opened
    for host in opened:
        host.kill()


@pytest.fixture(scope="module")
def model(tiny, tmp_path_factory):
    return write_plan(tiny("llama"), CONDITIONED, tmp_path_factory.mktemp("rpc") / "model.gguf")


def run(model, servers, code, *args):
    """What a program prints as JSON whose models use these hosts: they are the process's."""
    program = f"""
import itertools, json, sys
from kvtuner_gguf import Llama
from kvtuner_gguf.errors import KvtunerError
model, servers, args = sys.argv[1], sys.argv[2] or None, json.loads(sys.argv[3])
def load(**options):
    return Llama(model, n_ctx=1024, n_batch=64, n_ubatch=64, n_threads=1, rpc_servers=servers, verbose=False, **options)
def tokens(llm, prompt, n=12):
    return list(itertools.islice(llm.generate(prompt, temp=0.0), n))
def show(**what):
    print(json.dumps(what), flush=True)
{code}
"""
    servers = ",".join(host.endpoint for host in servers)
    done = subprocess.run(
        [sys.executable, "-c", program, str(model), servers, json.dumps(args)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


ANSWERS = """
llm = load(logits_all=True)
layers = [[l.il, l.type_k, l.type_v, l.bytes_k, l.bytes_v, l.k_mean, l.k_scale] for l in llm.layers]
llm.eval(args[0])
logits = llm.scores[len(args[0]) - 1].tolist()
llm.reset()
show(layers=layers, notes=llm.plan_notes, logits=logits, tokens=[tokens(llm, p) for p in args])
"""


def test_the_plan_holds_on_hosts_as_it_does_here(model, hosts):
    """Same types, bytes and vectors of each layer; one host and three give the same to the bit, and this machine the
    same but for rounding: it multiplies K's matrices and the weights in another order."""
    here, one, three = (run(model, servers, ANSWERS, LONG, SHORT)[0] for servers in ([], hosts[:1], hosts))
    assert here["layers"] == one["layers"] == three["layers"] and here["notes"] == three["notes"] == []
    assert [layer[1:3] for layer in here["layers"]] == [[p.type_k, p.type_v] for p in PLAN.pairs]
    assert three["tokens"] == one["tokens"] and three["logits"] == one["logits"]
    assert np.allclose(three["logits"], here["logits"], rtol=0, atol=0.02 * np.abs(here["logits"]).max())


def test_context_shift_and_sessions_on_hosts(model, hosts, tmp_path):
    """As on one host: a conversation that outgrows the context, one that goes on in another object, and here."""
    code = f"""
llm = load()
shifted = tokens(llm, args[0])
llm._ctx.kv_cache_seq_rm(0, 20, 120)
llm._ctx.kv_cache_seq_shift(0, 120, -1, -100)
llm.n_tokens -= 100
llm.eval([7])
after = tokens(llm, args[1])
llm.save_session({str(tmp_path)!r} + "/" + str(len(servers)) + ".session")
held = llm.n_tokens
other = load()
other.load_session({str(tmp_path)!r} + "/" + str(len(servers)) + ".session")
show(shifted=shifted, after=after, held=held, same=tokens(llm, args[2]) == tokens(other, args[2]))
"""
    one, three = (run(model, servers, code, LONG, SHORT, [*SHORT, 5])[0] for servers in (hosts[:1], hosts))
    assert one == three and three["same"]


def test_a_host_that_ends_in_mid_answer_is_named_and_ends_nothing_else(model, hosts):
    """All that is asked of the model fails in words until it is closed; when the host is back, it is reached again."""
    third = Host()
    code = """
import os, signal, subprocess
def failing(call):
    try:
        call()
    except KvtunerError as error:
        return f"{type(error).__name__}: {error}"
llm = load()
stream = llm.generate(args[0], temp=0.0)
first = list(itertools.islice(stream, 5))
os.kill(args[1], signal.SIGKILL)
show(stage="lost", answer=failing(lambda: list(itertools.islice(stream, 50))), again=failing(lambda: llm.eval(args[0])),
     state=failing(llm.save_state), session=failing(lambda: llm.save_session(args[2])), new=failing(load))
llm.close()
show(stage="away", new=failing(load))
sys.path.insert(0, args[3])
from hosts import Host
back = Host(args[4])
llm = load()
show(stage="back", same=list(itertools.islice(llm.generate(args[0], temp=0.0), 5)) == first)
llm.close()
back.kill()
"""
    lost, away, back = run(
        model,
        [*hosts[:2], third],
        code,
        LONG,
        third.process.pid,
        "/dev/null",
        str(Path(__file__).parent),
        third.port,
    )
    third.kill()
    for name in ("answer", "again", "state", "session"):
        assert f"NativeError: RPC host {third.endpoint}: was lost. Close this model" in lost[name], name
    assert f"RPC host {third.endpoint} is not there, or was lost by a model that is still loaded" in lost["new"]
    assert f"RPC host {third.endpoint}" in away["new"] and "Start 'kvtuner-gguf rpc-server' there" in away["new"]
    assert back["same"]


FAILS = """
try:
    load()
except KvtunerError as error:
    show(error=str(error))
"""


def test_a_host_of_another_build_is_refused_in_words(model, hosts):
    other = Middle(hosts[0], lambda asked, said: b"0123456789ab\0\0\0\0" + said[16:])
    (found,) = run(model, [hosts[1], other], FAILS)
    assert f"RPC host {other.endpoint} is of build 0123456789ab, this program of {native.build_id()}" in found["error"]
    stock = Middle(hosts[0], lambda asked, said: None)
    (found,) = run(model, [stock], FAILS)
    assert f"RPC host {stock.endpoint} runs a llama.cpp without kvtuner-gguf" in found["error"]


def test_a_pair_that_a_host_has_no_kernel_for_stays_f16_there(model, hosts):
    """It is asked before anything is allocated."""
    refused = native.type_number(PLAN.pairs[3].type_k)

    def without(asked, said):
        device, type_k = np.frombuffer(asked, np.int32)[:2]
        return said[:16] + np.int32(1).tobytes() if device >= 0 and type_k == refused else said

    lacking = Middle(hosts[0], without)
    code = (
        "llm = load()\nshow(pairs=[str(p) for p in llm.plan.pairs], notes=llm.plan_notes, n=len(tokens(llm, args[0])))"
    )
    (found,) = run(model, [hosts[1], lacking], code, SHORT)
    pairs = [str(pair) for pair in PLAN.pairs]
    on_it = [il for il, pair in enumerate(found["pairs"]) if pair != pairs[il]]
    assert on_it and all(PLAN.pairs[il].type_k == PLAN.pairs[3].type_k for il in on_it)
    assert all(found["pairs"][il] == "f16/f16" for il in on_it)
    assert any("the layer's device has no kernel for this pair: f16 there" in note for note in found["notes"])
    assert found["n"] == 12


@pytest.mark.parametrize("servers", ["here", "127.0.0.1:", "127.0.0.1:70000", "a b:50052", "", "[::1]:50052"])
def test_a_host_that_cannot_be_one_is_refused(servers):
    with pytest.raises(NativeError, match=r"RPC host '.*': need HOST:PORT"):
        rpc.use(servers)


def test_commands_run_on_hosts(model, hosts, tmp_path):
    """fit counts what the hosts have free, which here is three times the same; evaluate measures there."""
    servers = ",".join(host.endpoint for host in hosts)

    def printed(*args):
        command = [sys.executable, "-m", "kvtuner_gguf", *map(str, args)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    here, there = printed("fit", model, "--json"), printed("fit", model, "--json", "--rpc", servers)
    assert there["available"] > 2.5 * here["available"]
    (tmp_path / "text.txt").write_text("Layers lie on three machines. " * 400)
    text = ("-f", tmp_path / "text.txt", "-c", 256)
    table = printed("evaluate", "-m", model, "q8_0", *text, "--json", "--rpc", servers)
    assert [row["name"] for row in table["rows"]] == ["f16 (noise floor)", "q8_0"]


def test_a_server_runs_on_hosts(model, hosts):
    code = """
from urllib.request import Request, urlopen
from kvtuner_gguf import rpc
from kvtuner_gguf.serve import Server
rpc.use(servers)
with Server(model, port=0, n_ctx=512, n_gpu_layers=rpc.ALL_LAYERS, n_threads=1) as server:
    body = json.dumps({"prompt": args[0], "n_predict": 12, "temperature": 0, "return_tokens": True}).encode()
    answer = json.load(urlopen(Request(server.url + "/completion", body, {"Content-Type": "application/json"})))
    show(layers=[[l["type_k"], l["type_v"]] for l in server.props()["kvtuner"]["layers"]], n=answer["tokens_predicted"])
"""
    (found,) = run(model, hosts, code, SHORT)
    assert found == {"layers": [[p.type_k, p.type_v] for p in PLAN.pairs], "n": 12}


def test_the_command_refuses_a_host_that_is_not_there(model):
    found = CliRunner().invoke(main, ["chat", str(model), "-p", "hello", "--rpc", "127.0.0.1:9"])
    assert found.exit_code == 1 and "RPC host 127.0.0.1:9" in found.output and "rpc-server" in found.output
