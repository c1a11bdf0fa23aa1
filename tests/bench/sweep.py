"""One long prompt, and a few tokens at depths on its way, by builds in turns: tokens per second of decoding and of
prefill at each depth, and seconds of the whole prompt up to there. With --peer also by ik_llama.cpp's
llama-sweep-bench, which does the same.

python tests/bench/sweep.py MODEL.gguf STOCK/bin OURS/bin [--peer IK/bin] [--pairs f16/f16,q8_0/q8_0]
[--depths 0,4096,16384,32768] [--threads 2] [--n-gen 16] [--rounds 1] [--handed q8_0/q8_0]

A pair that a build does not know is left out there. Depths are multiples of 512, tokens read at once. Of the pairs in
--handed the first build reads no prompt, which would take it hours: it takes the state of each depth from the last one.
"""

from __future__ import annotations

import argparse
import ctypes as c
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from process import markdown, parser_of_sweeps

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "native"))

PAIRS, DEPTHS = "f16/f16,q8_0/q8_0,q4_0/q4_0,k3_64/t2_64", "0,4096,16384,32768"
STEP = 512  # tokens of a prompt that are read at once
Rows = dict[tuple[str, str], dict[int, list[dict[str, float]]]]  # (pair, build) -> depth -> of each round
Measure = Callable[[Path, Path, str, argparse.Namespace, Path | None], list[dict[str, float]]]
VARIABLE = "LLAMA_CPP_LIB_PATH"  # llama-cpp-python's own


class Prompt:
    """A sequence of made-up tokens under a pair, by the library that llama_cpp loads."""

    def __init__(self, model: Path, pair: str, n_ctx: int, n_threads: int) -> None:
        from attention import TYPES
        from llama_cpp import llama_cpp as lc

        self._lc, self._pair = lc, pair
        self._silent = lc.llama_log_callback(lambda *_: None)
        lc.llama_log_set(self._silent, c.c_void_p(0))
        lc.llama_backend_init()
        loaded = lc.llama_model_load_from_file(os.fsencode(model), lc.llama_model_default_params())
        params = lc.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = n_ctx, STEP, STEP
        params.n_threads = params.n_threads_batch = n_threads
        params.flash_attn_type = lc.LLAMA_FLASH_ATTN_TYPE_ENABLED
        params.type_k, params.type_v = (TYPES[name] for name in pair.split("/"))
        self._ctx = lc.llama_init_from_model(loaded, params)
        self._batch = lc.llama_batch_init(STEP, 0, 1)

    def fits(self) -> bool:
        """Whether the library can keep a cache of these types."""
        return bool(self._ctx)

    def read(self, n: int, pos: int) -> float:
        """Seconds of n tokens from pos on."""
        lc, batch = self._lc, self._batch
        batch.n_tokens = n
        for i in range(n):
            batch.token[i], batch.pos[i], batch.logits[i] = 100 + (pos + i) * 7919 % 20000, pos + i, i == n - 1
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
        start = time.perf_counter()
        if lc.llama_decode(self._ctx, batch):
            raise SystemExit(f"{self._pair}: a batch of {n} at {pos} was not read")
        lc.llama_synchronize(self._ctx)
        return time.perf_counter() - start

    def cut(self, pos: int) -> None:
        """Forgets what is from pos on."""
        self._lc.llama_memory_seq_rm(self._lc.llama_get_memory(self._ctx), 0, pos, -1)

    def keep(self, path: Path) -> None:
        """Writes the state."""
        if not self._lc.llama_state_seq_save_file(self._ctx, os.fsencode(path), 0, (self._lc.llama_token * 0)(), 0):
            raise SystemExit(f"{self._pair}: its state was not written to {path}")

    def take(self, path: Path) -> None:
        """Goes on from a state."""
        none, n = (self._lc.llama_token * 0)(), c.c_size_t()
        if not self._lc.llama_state_seq_load_file(self._ctx, os.fsencode(path), 0, none, 0, c.byref(n)):
            raise SystemExit(f"{self._pair}: the state of {path} was not taken")


def sweep(
    model: Path, pair: str, depths: Sequence[int], n_threads: int, n_gen: int, states: Path | None
) -> Iterator[dict[str, float]]:
    """In this process: at each depth, seconds of n_gen tokens one by one, of the next STEP, and of the prompt up to
    there.

    states  a folder, whose states are gone on from; one that is empty gets one of each depth
    """
    from attention import FIRST_OF_OURS, TYPES
    from llama_cpp import llama_cpp as lc

    if max(TYPES[name] for name in pair.split("/")) >= FIRST_OF_OURS and not hasattr(lc._lib, "kvt_build_id"):
        return
    prompt = Prompt(model, pair, max(depths) + 2 * STEP, n_threads)
    if not prompt.fits():
        return
    taken = states is not None and any(states.iterdir())
    prompt.read(STEP, 0)  # what is made once
    whole = 0.0
    for pos in depths if taken else range(0, max(depths) + 1, STEP):
        prompt.cut(0 if taken else pos)
        at = {"depth": pos, "whole": whole}
        if pos in depths:
            if states and pos:
                (prompt.take if taken else prompt.keep)(states / str(pos))
            at["decode"] = sum(prompt.read(1, pos + i) for i in range(n_gen))
            prompt.cut(pos)
        at["prefill"] = prompt.read(STEP, pos)
        whole += at["prefill"] if not taken else 0.0
        if pos in depths:
            yield at


def of_build(
    folder: Path, model: Path, pair: str, options: argparse.Namespace, states: Path | None
) -> list[dict[str, float]]:
    """`sweep` in a process of its own, with a build's library; [] if that does not know the pair."""
    command = [sys.executable, __file__, str(model), str(folder), "--one", pair, "--depths", options.depths]
    command += ["--threads", str(options.threads), "--n-gen", str(options.n_gen)]
    command += ["--states", str(states)] if states else []
    env = {**os.environ, VARIABLE: str(folder), "LD_LIBRARY_PATH": str(folder), "KVTUNER_GGUF_AUTO": "0"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def of_peer(
    folder: Path, model: Path, pair: str, options: argparse.Namespace, _: Path | None
) -> list[dict[str, float]]:
    """The same by llama-sweep-bench, whose rows are of every 512 tokens; [] if it does not know the pair."""
    depths = [int(d) for d in options.depths.split(",")]
    k, v = pair.split("/")
    command = [folder.resolve() / "llama-sweep-bench", "-m", model.resolve(), "-c", max(depths) + STEP]
    command += ["-b", STEP, "-ub", STEP, "-ctk", k, "-ctv", v, "-fa", "on", "-t", options.threads, "-n", options.n_gen]
    command += ["--output-format", "jsonl"]
    with TemporaryDirectory() as place:  # for its log
        done = subprocess.run(
            list(map(str, command)), cwd=place, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not rows:
        return []
    whole, found = 0.0, []
    for row in rows:
        if row["n_kv"] in depths:
            found.append({"depth": row["n_kv"], "whole": whole, "decode": row["t_tg"], "prefill": row["t_pp"]})
        whole += row["t_pp"]
    return found


def tables(found: Rows, depths: Sequence[int], n_gen: int) -> Iterator[str]:
    """In Markdown, a column for each pair and build."""
    labels = {"decode": "decode, tokens/s", "prefill": "prefill of 512, tokens/s", "whole": "prompt, s"}
    n_tokens = {"decode": n_gen, "prefill": STEP}
    for what, label in labels.items():

        def cell(rows: list[dict[str, float]], what: str = what) -> str:
            value = median(row[what] for row in rows) if rows else 0.0
            return "" if not value else f"{n_tokens[what] / value if what in n_tokens else value:.1f}"

        table = [(f"{label} at {d}", *(cell(of_depth.get(d, [])) for of_depth in found.values())) for d in depths]
        yield markdown(["", *(f"{pair} {name}" for pair, name in found)], table)


def main() -> None:
    parser = parser_of_sweeps(__doc__, PAIRS, DEPTHS, 1)
    parser.add_argument("--peer", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--n-gen", type=int, default=16)
    parser.add_argument("--handed", default="", help="pairs whose prompts the first build takes from the last one")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--states", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    depths = [int(d) for d in options.depths.split(",")]
    if options.one:
        for row in sweep(options.model, options.one, depths, options.threads, options.n_gen, options.states):
            print(json.dumps(row), flush=True)
        return

    builds: list[tuple[str, Measure, Path]] = [
        (f"build {i}", of_build, folder) for i, folder in enumerate(options.folders)
    ]
    if options.peer:
        builds.append(("peer", of_peer, options.peer))
    handed = set(filter(None, options.handed.split(",")))
    first = set((options.first_pairs or options.pairs).split(",")) | handed
    found: Rows = {}
    for pair in options.pairs.split(",") * options.rounds:
        turns = builds[pair not in first :]
        with TemporaryDirectory() as states:
            for name, measure, folder in turns[1:] + turns[:1] if pair in handed else turns:
                hand = Path(states) if pair in handed and measure is of_build else None
                for row in measure(folder, options.model, pair, options, hand):
                    found.setdefault((pair, name), {}).setdefault(int(row["depth"]), []).append(row)
                    print(json.dumps({"pair": pair, "build": name, **row}), file=sys.stderr, flush=True)
    print("\n\n".join(tables(found, depths, options.n_gen)))


if __name__ == "__main__":
    main()
