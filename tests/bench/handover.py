"""What it takes to hand a session over to another process: bytes, and times of saving, sending and restoring it.

python tests/bench/handover.py [MODEL.gguf] [--pairs f16/f16,q8_0/q8_0,q4_0/q4_0] [--plan MODEL.planned.gguf]...
    [--contexts 2048,8192] [--rounds 5] [--json FILE]

Saved and restored is llama.cpp's state of one sequence, which holds K and V as they are cached; it is sent through a
socket on this machine, to a thread that reads all of it. Medians; "prefill" is what the receiver is spared, run once.
What is restored must give the logits that the sender gives next, bit for bit.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import numpy as np

from kvtuner_gguf.api import read_plan
from kvtuner_gguf.default_model import default_model
from kvtuner_gguf.pair import Pair
from kvtuner_gguf.plan import Plan
from kvtuner_gguf.runtime import Context, Session

N_SEND = 1 << 20  # bytes handed to the socket at once


@dataclass(frozen=True)
class Row:
    """A line of the table; the figures as JSON has them."""

    cache: str
    n_tokens: int
    n_bytes: int
    save_ms: float
    send_ms: float
    restore_ms: float
    prefill_ms: float

    def __str__(self) -> str:
        times = (self.save_ms, self.send_ms, self.restore_ms, self.save_ms + self.send_ms + self.restore_ms)
        told = " | ".join(f"{ms:.1f}" for ms in times)
        return f"| {self.n_tokens} | {self.cache} | {self.n_bytes / 2**20:.2f} | {told} | {self.prefill_ms:.0f} |"


def timed_ms(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)


class State:
    """A sequence's state in memory that stays: no run pays for pages that are new."""

    def __init__(self, ctx: Context) -> None:
        from llama_cpp import llama_cpp

        self._llama = llama_cpp
        self.n_bytes = llama_cpp.llama_state_seq_get_size(ctx.ctx, 0)
        self.sent, self.got = ((ctypes.c_uint8 * self.n_bytes)() for _ in range(2))

    def save(self, ctx: Context) -> None:
        written = self._llama.llama_state_seq_get_data(ctx.ctx, self.sent, self.n_bytes, 0)
        if written != self.n_bytes:
            raise SystemExit(f"the state has {self.n_bytes} bytes, and {written} were saved.")

    def restore(self, ctx: Context) -> None:
        if not self._llama.llama_state_seq_set_data(ctx.ctx, self.got, self.n_bytes, 0):
            raise SystemExit("the state was refused.")

    def send(self) -> None:
        """From one buffer into the other, through a socket."""
        here, there = socket.socketpair()
        with here, there:
            reader = threading.Thread(target=self._receive, args=(there,))
            reader.start()
            view = memoryview(self.sent).cast("B")
            for start in range(0, self.n_bytes, N_SEND):
                here.sendall(view[start : start + N_SEND])
            reader.join()

    def _receive(self, end: socket.socket) -> None:
        view, at = memoryview(self.got).cast("B"), 0
        while at < self.n_bytes:
            at += end.recv_into(view[at:])


def handed_over(session: Session, name: str, plan: Plan, n_tokens: int, rounds: int) -> Row:
    """A row: a sequence of n_tokens under a plan, taken from one context into another."""
    tokens = np.random.default_rng(0).integers(session.n_vocab, size=n_tokens).tolist()
    session.set_plan(plan.pairs, plan.k_vectors)
    n_ctx = n_tokens + 1
    with session.context(n_ctx) as sender, session.context(n_ctx) as receiver:
        prefill = timed_ms(lambda: sender.decode([(t, i, 0) for i, t in enumerate(tokens)], [False] * n_tokens))
        state = State(sender)
        times: list[tuple[float, ...]] = []
        for _ in range(rounds):
            receiver.clear()
            saved, sent = timed_ms(lambda: state.save(sender)), timed_ms(state.send)
            times.append((saved, sent, timed_ms(lambda: state.restore(receiver))))
        want, have = (ctx.decode([(tokens[0], n_tokens, 0)], [True]).copy() for ctx in (sender, receiver))
        if not np.array_equal(want, have):
            raise SystemExit(f"{name}: what was restored gives other logits.")
    save, send, restore = (round(median(t), 3) for t in zip(*times))
    return Row(name, n_tokens, state.n_bytes, save, send, restore, round(prefill, 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", help="[default: the default model]")
    parser.add_argument("--pairs", default="f16/f16,q8_0/q8_0,q4_0/q4_0")
    parser.add_argument("--plan", type=Path, action="append", default=[], help="a file that holds a plan for MODEL")
    parser.add_argument("--contexts", default="2048,8192")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("-t", "--threads", type=int)
    parser.add_argument("--json", type=Path, help="file for the figures")
    options = parser.parse_args()
    with Session(options.model or default_model(), n_threads=options.threads) as session:
        rows = run(session, options.pairs.split(","), options)
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


def run(session: Session, pairs: Sequence[str], options: argparse.Namespace) -> list[Row]:
    """The rows, printed as they come."""
    has_kv = [bool(n) for n in session.geometry(256).values_k]
    plans = {pair: Plan.uniform(Pair.parse(pair), session.n_layer, has_kv) for pair in pairs}
    plans |= {f"plan of {path.name}": plan for path in options.plan if (plan := read_plan(path))}
    print(
        f"{session.path.name}, {session.n_threads} threads\n\n"
        "| tokens | cache | MiB | save ms | send ms | restore ms | all three | prefill ms |\n"
        "|---|---|---|---|---|---|---|---|"
    )
    rows = []
    for n_tokens in map(int, options.contexts.split(",")):
        for name, plan in plans.items():
            rows.append(handed_over(session, name, plan, n_tokens, options.rounds))
            print(rows[-1], flush=True)
    return rows


if __name__ == "__main__":
    main()
