"""What only a GPU can show: bytes, operators, KLD and speed of the CUDA code, in one run.

python tests/cuda/gpu.py BUILD/bin MODEL.gguf [GEOMETRY.gguf ...] [--steps device,ops,kld,bench] [--text FILE]
    [--plan SIDECAR] [--out DIR]

BUILD is configured with -DGGML_CUDA=ON -DKVTUNER_BUILD_TOOLS=ON, and its targets kvtuner, llama-bench, test-backend-ops
and kvt-cuda-test are built. The first model holds a plan, whose KLD is measured on the CPU and on the GPU; all models
are timed, with their plan and with usual pairs. The others may have random weights (tests/bench/geometry.py).

device  writing and reading our types gives the CPU's bytes and values; what writing and attention take
ops     llama.cpp's own tests of operators, for our types, against the CPU
kld     of usual pairs, the plan and each --plan against f16: on the CPU, on the GPU, and there token by token
bench   tokens per second at depths of 0, 8192 and 32768: prompts of 512, and decoding

Ends with 1 if a check failed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kvtuner_gguf import Pair, Plan
from kvtuner_gguf.calibrate.kld import kl_divergence, log_softmax
from kvtuner_gguf.calibrate.text import read_text
from kvtuner_gguf.codecs import CODECS
from kvtuner_gguf.gguf_file import read_plan, write_plan
from kvtuner_gguf.kvectors import KVectors
from kvtuner_gguf.runtime import Session

ROOT = Path(__file__).resolve().parents[2]
STEPS = ("device", "ops", "kld", "bench")
OPS = ("SET_ROWS", "CPY", "GET_ROWS", "FLASH_ATTN_EXT")
PAIRS = ("q8_0/q8_0", "q4_0/q4_0")
DEPTHS = "0,8192,32768"
N_CTX, N_CHUNK = 1024, 4
FLOOR = "f16 by the other kernel"
# nats: a GPU adds in f16 in a prompt, and multiplies queries as int8 in decoding, also with stock's types
ROUNDING = 5e-4
COPY = "f16.gguf"  # a copy of the model whose weights are f16: so it rounds what they multiply the least
# name: layers on the GPU, tokens at once, environment. Without a GPU: else it computes the large products of a prompt
MODES = {
    "CPU": (0, 512, {"CUDA_VISIBLE_DEVICES": ""}),
    "GPU, a prompt": (99, 512, {}),
    "GPU, token by token": (99, 1, {}),
}


@dataclass(frozen=True)
class Row:
    pairs: Sequence[Pair] | None = None
    k_vectors: Sequence[KVectors] = ()
    flash_attn: bool = True


def run(command: list[str | Path], log: Path, **env: str) -> tuple[int, str]:
    """The exit status, and what it printed, which the log keeps."""
    with log.open("w") as out:
        done = subprocess.run(list(map(str, command)), stdout=out, stderr=subprocess.STDOUT, env={**os.environ, **env})
    return done.returncode, log.read_text(errors="replace")


def device(bins: Path, out: Path) -> bool:
    status, text = run([bins / "kvt-cuda-test"], out / "device.log")
    print(text)
    return status == 0


def ops(bins: Path, out: Path) -> bool:
    """Each operator in a process of its own, at once: the CPU's side is what takes time."""
    ours = [name for name in CODECS if name.endswith(("_32", "_64"))]
    named = rf"type\w*=({'|'.join([*ours, 'iq4_nl'])})\b"

    def one(op: str) -> tuple[int, str]:
        return run([bins / "test-backend-ops", "test", "-b", "CUDA0", "-o", op, "-p", named], out / f"ops-{op}.log")

    with ThreadPoolExecutor(len(OPS)) as pool:
        results = dict(zip(OPS, pool.map(one, OPS)))
    all_right = True
    for op, (status, text) in results.items():
        lines = re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines()
        n_ok = sum(line.rstrip().endswith("OK") and op in line for line in lines)
        n_without = sum("not supported" in line for line in lines)
        failed = [line for line in lines if re.search(r"\bFAIL\b", line) and f"{op}(" in line]
        print(f"{op}: {n_ok} right, {len(failed)} wrong, {n_without} without a kernel, exit status {status}")
        print("\n".join(failed[:10]))
        all_right &= status == 0 and n_ok > 0 and not failed
    return all_right


def logits_of(session: Session, row: Row, tokens: np.ndarray, step: int) -> Iterator[np.ndarray]:
    """Of the second half of each chunk, step tokens at once; arrays valid one by one."""
    with session.context(N_CTX, row.pairs, row.k_vectors, flash_attn=row.flash_attn) as ctx:
        if row.pairs and ctx.notes():
            sys.exit(f"the run time left the plan: {' | '.join(ctx.notes())}")
        for chunk in tokens.tolist():
            yield from ctx.logits(chunk, range(N_CTX // 2, N_CTX), step)


def rows_of(model: Path, sidecars: list[Path]) -> dict[str, Row]:
    plans = {"plan": read_plan(model)} | {path.stem: Plan.from_json(path.read_text()) for path in sidecars}
    n_layer = plans["plan"].n_layer
    return {
        FLOOR: Row(flash_attn=False),
        **{pair: Row([Pair.parse(pair)] * n_layer) for pair in PAIRS},
        **{name: Row(plan.pairs, plan.k_vectors) for name, plan in plans.items()},
    }


def kld_of_mode(model: Path, rows: dict[str, Row], text: Path, mode: str, out: Path) -> None:
    """KLD of each row at each position, from an f16 cache that is run in the same way."""
    n_gpu_layers, step, _ = MODES[mode]
    found = {}
    with Session(model, n_gpu_layers=n_gpu_layers) as session:
        tokens = read_text(session, text, 0, N_CTX * N_CHUNK).heldout.reshape(N_CHUNK, N_CTX)
        base = np.concatenate([log_softmax(x).astype(np.float16) for x in logits_of(session, Row(), tokens, step)])
        for name, row in rows.items():
            at, klds = 0, []
            for logits in logits_of(session, row, tokens, step):
                klds.append(kl_divergence(base[at : at + len(logits)], logits))
                at += len(logits)
            found[name] = np.concatenate(klds)
    np.savez(out / f"kld-{mode}.npz", **found)


def kld(model: Path, sidecars: list[Path], text: Path, out: Path) -> bool:
    """A row is right on the GPU if it is as far from f16 there as on the CPU, position by position, within four
    standard errors and ROUNDING."""
    with Session(model) as session:
        session.save_as(out / COPY, "f16")
    for mode, (_, _, env) in MODES.items():
        t0 = time.monotonic()
        command = [sys.executable, __file__, os.environ["LLAMA_CPP_LIB_PATH"], model, "--mode", mode, "--text", text]
        command += ["--out", out, *(part for path in sidecars for part in ("--plan", path))]
        status, said = run(command, out / f"kld-{mode}.log", **env)
        print(f"{mode}: {time.monotonic() - t0:.0f} s", flush=True)
        if status:
            print(said[-2000:])
            return False
    (out / COPY).unlink()
    found = {mode: np.load(out / f"kld-{mode}.npz") for mode in MODES}
    print(f"\n| KLD from f16 | {' | '.join(MODES)} |\n|---|{'---|' * len(MODES)}")
    all_right = True
    for name in found["CPU"].files:
        cells = []
        for sides in found.values():
            apart = sides[name] - found["CPU"][name]
            allowed = 4 * apart.std() / len(apart) ** 0.5 + ROUNDING
            right = abs(apart.mean()) <= allowed
            all_right &= bool(right)
            cells.append(f"{sides[name].mean():.5f}{'' if right else ' WRONG'}")
        print(f"| {name} | {' | '.join(cells)} |")
    return all_right


def bench(bins: Path, model: Path, out: Path, n_rounds: int) -> bool:
    """Tokens per second with the plan, and with uniform pairs on a copy without it."""
    print(
        f"\n{model.name}, tokens per second at depths of {DEPTHS}: a prompt of 512, decoding\n| | prompt | decoding |"
    )
    print("|---|---|---|")
    all_right = True
    with tempfile.TemporaryDirectory(dir=model.parent) as tmp:
        bare = write_plan(model, None, Path(tmp) / "bare.gguf")
        for pair in ("f16/f16", *PAIRS, "plan"):
            command = [bins / "llama-bench", "-m", model if pair == "plan" else bare, "-ngl", "99", "-fa", "1"]
            command += ["-d", DEPTHS, "-p", "512", "-n", "64", "-r", str(n_rounds), "-o", "jsonl"]
            if pair != "plan":
                command += ["-ctk", pair.split("/")[0], "-ctv", pair.split("/")[1]]
            log = out / f"bench-{model.stem}-{pair.replace('/', '-')}.log"
            status, text = run(command, log)
            rows = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
            all_right &= status == 0 and len(rows) == 2 * (DEPTHS.count(",") + 1)
            speed = [[f"{r['avg_ts']:.0f}" for r in rows if bool(r["n_prompt"]) is prompt] for prompt in (True, False)]
            print(f"| {pair} | {' '.join(speed[0])} | {' '.join(speed[1])} |", flush=True)
            if status:
                print(text[-1500:])
    return all_right


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bins", type=Path)
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--steps", default=",".join(STEPS))
    parser.add_argument("--text", type=Path, default=ROOT / "docs/architecture.md", help="for the KLD")
    parser.add_argument("--plan", type=Path, action="append", default=[], help="sidecar of the first model")
    parser.add_argument("--mode", choices=MODES, help=argparse.SUPPRESS)  # of the KLD, in a process of its own
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("gpu"), help="folder of the logs [default: gpu]")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    os.environ["LLAMA_CPP_LIB_PATH"] = str(args.bins)
    os.environ["LD_LIBRARY_PATH"] = os.pathsep.join([str(args.bins), os.environ.get("LD_LIBRARY_PATH", "")])

    if args.mode:
        kld_of_mode(args.out / COPY, rows_of(args.models[0], args.plan), args.text, args.mode, args.out)
        return 0

    right = {}
    for step in args.steps.split(","):
        t0 = time.monotonic()
        print(f"\n## {step}", flush=True)
        if step == "device":
            right[step] = device(args.bins, args.out)
        elif step == "ops":
            right[step] = ops(args.bins, args.out)
        elif step == "kld":
            right[step] = kld(args.models[0], args.plan, args.text, args.out)
        elif step == "bench":
            right[step] = min(bench(args.bins, model, args.out, args.rounds) for model in args.models)
        else:
            parser.error(f"--steps {step}: need some of {', '.join(STEPS)}")
        print(f"{step}: {'right' if right[step] else 'WRONG'}, {time.monotonic() - t0:.0f} s", flush=True)
    return not all(right.values())


if __name__ == "__main__":
    sys.exit(main())
