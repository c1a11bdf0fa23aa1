"""Models over RPC hosts in network namespaces of their own, which are what machines are: the same tokens, caches,
context shift and sessions over three as over one; then one is killed in mid-answer, and another one's cable is pulled.

python tests/integrations/namespaces.py MODEL.planned.gguf [...]    on Linux, as root
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

PORT = 50052
START_S = 60.0
LOST_S = 90.0  # a machine that is gone is found out before

COMMON = """
import itertools, json, subprocess, sys, time
from kvtuner_gguf import Llama
from kvtuner_gguf.errors import KvtunerError
model, servers, folder, commands = sys.argv[1], sys.argv[2], sys.argv[3], json.loads(sys.argv[4])
def load():
    return Llama(model, n_ctx=2048, rpc_servers=servers, verbose=False)
def tokens(llm, prompt, n):
    return list(itertools.islice(llm.generate(prompt, temp=0.0), n))
def show(**what):
    print(json.dumps(what), flush=True)
def prompt_of(llm, text):
    return llm.tokenize(text.encode())
STORY = "It was a long winter, and the village by the lake had little left. "
"""

ALIKE = """
llm = load()
layers = [[l.il, l.type_k, l.type_v, l.bytes_k, l.bytes_v, l.k_mean, l.k_scale] for l in llm.layers]
prompt = prompt_of(llm, STORY * 20)
start = time.monotonic()
answer = tokens(llm, prompt, 60)
seconds = time.monotonic() - start
llm._ctx.kv_cache_seq_rm(0, 20, 120)
llm._ctx.kv_cache_seq_shift(0, 120, -1, -100)
llm.n_tokens -= 100
llm.eval([prompt[-1]])
shifted = tokens(llm, prompt_of(llm, STORY), 20)
llm.save_session(folder + "/one.session")
other = load()
other.load_session(folder + "/one.session")
more = prompt_of(llm, STORY + "Then")
show(layers=layers, notes=llm.plan_notes, answer=answer, shifted=shifted, seconds=seconds,
     session=tokens(llm, more, 20) == tokens(other, more, 20))
"""

LOST = """
llm = load()
prompt = prompt_of(llm, STORY * 20)
stream = llm.generate(prompt, temp=0.0)
first = list(itertools.islice(stream, 10))
subprocess.run(commands[0], shell=True, check=True)
start, said = time.monotonic(), None
try:
    list(itertools.islice(stream, 1000))
except KvtunerError as error:
    said = str(error)
show(said=said, seconds=time.monotonic() - start)
llm.close()
subprocess.run(commands[1], shell=True, check=True)
for _ in range(60):
    try:
        llm = load()
        break
    except KvtunerError:
        time.sleep(1)
show(back=tokens(llm, prompt, 10) == first)
"""


def ip(*args: object) -> None:
    subprocess.run(["ip", *map(str, args)], check=True)


class Machine:
    """A network namespace, a cable to it, and a host in it."""

    def __init__(self, number: int) -> None:
        self.name, self.cable, self.address = f"kvt{number}", f"kvt{number}c", f"10.77.{number}.2"
        self.endpoint = f"{self.address}:{PORT}"
        self.remove()
        ip("netns", "add", self.name)
        ip("link", "add", self.cable, "type", "veth", "peer", "name", "eth0", "netns", self.name)
        ip("addr", "add", f"10.77.{number}.1/24", "dev", self.cable)
        ip("link", "set", self.cable, "up")
        for args in (("addr", "add", f"{self.address}/24", "dev", "eth0"), ("link", "set", "eth0", "up")):
            ip("-n", self.name, *args)

    @property
    def start_command(self) -> str:
        host = f"{sys.executable} -m kvtuner_gguf rpc-server --host {self.address} --port {PORT} -t 1"
        return f"setsid ip netns exec {self.name} {host} > /dev/null 2>&1 &"

    @property
    def kill_command(self) -> str:
        return f"ip netns pids {self.name} | xargs kill -9"

    def start(self) -> None:
        subprocess.run(self.start_command, shell=True, check=True)
        end = time.monotonic() + START_S
        while time.monotonic() < end:
            with suppress(OSError), socket.create_connection((self.address, PORT), timeout=1):
                return
            time.sleep(0.1)
        sys.exit(f"{self.name}: no host listens at {self.endpoint}")

    def remove(self) -> None:
        subprocess.run(f"{self.kill_command}; ip netns del {self.name}", shell=True, stderr=subprocess.DEVNULL)


@contextmanager
def machines(n: int) -> Iterator[list[Machine]]:
    made: list[Machine] = []
    try:
        for number in range(1, n + 1):
            made.append(Machine(number))
            made[-1].start()
        yield made
    finally:
        for machine in made:
            machine.remove()


def run(model: Path, hosts: Sequence[Machine], code: str, *commands: str) -> list[dict[str, Any]]:
    """What a program prints as JSON whose models use these hosts: they are the process's."""
    servers = ",".join(host.endpoint for host in hosts)
    with TemporaryDirectory() as folder:
        args = [str(model), servers, folder, json.dumps(commands)]
        done = subprocess.run([sys.executable, "-c", COMMON + code, *args], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"{model.name} over {servers}: exit status {done.returncode}")
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def main() -> None:
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    with machines(3) as hosts:
        for model in map(Path, sys.argv[1:]):
            (one,), (three,) = run(model, hosts[:1], ALIKE), run(model, hosts, ALIKE)
            seconds = one.pop("seconds"), three.pop("seconds")
            assert one == three, (one, three)
            assert three["session"] and not three["notes"]
            pairs = {f"{layer[1]}/{layer[2]}" for layer in three["layers"]}
            n_bytes = sum(layer[3] + layer[4] for layer in three["layers"])
            print(
                f"{model.name}: {len(pairs)} pairs, {n_bytes / 2**20:.1f} MiB; one host {seconds[0]:.2f} s, three "
                f"{seconds[1]:.2f} s: the same tokens, layers, shift and session",
                flush=True,
            )
            cable = f"ip link set {hosts[1].cable}"
            for what, away, back in (
                ("killed", hosts[1].kill_command, hosts[1].start_command),
                ("its cable pulled", f"{cable} down", f"{cable} up"),
            ):
                lost, again = run(model, hosts, LOST, away, back)
                assert lost["said"] and hosts[1].endpoint in lost["said"], lost
                assert lost["seconds"] < LOST_S and again["back"], (lost, again)
                print(f"{what}: after {lost['seconds']:.0f} s '{lost['said']}'; loaded again, it goes on", flush=True)


if __name__ == "__main__":
    main()
