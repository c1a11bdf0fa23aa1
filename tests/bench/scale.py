"""Hours of a calibration of large models on several workers, foretold as `calibrate` foretells its own, from the speed
of one prompt; and what it keeps on disk while it runs.

python tests/bench/scale.py TOKENS_PER_SECOND [--of 8B] [--threads 2] [--workers 1,4,16]

TOKENS_PER_SECOND: of a prompt on one such machine (llama-bench -p 512), of the model of --of; others take as many times
as long as they have weights. A stage whose runs workers share is divided by them, to whole runs; the rest is not.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from process import markdown

from kvtuner_gguf.calibrate.capture import captured_bytes
from kvtuner_gguf.calibrate.estimate import seconds
from kvtuner_gguf.calibrate.hidden import hidden_bytes
from kvtuner_gguf.calibrate.methods import n_runs_of
from kvtuner_gguf.calibrate.options import Options
from kvtuner_gguf.calibrate.pipeline import sizes_of
from kvtuner_gguf.geometry import Geometry

# layers, width, vocabulary, weights, KV heads, query heads to one of them, head: Llama-3 8B and 70B, Qwen2.5-32B
MODELS = {
    "8B": (32, 4096, 128256, 8.03e9, 8, 4, 128),
    "32B": (64, 5120, 152064, 32.8e9, 8, 5, 128),
    "70B": (80, 8192, 128256, 70.6e9, 8, 8, 128),
}
SIZES = sizes_of(Options(Path("model.gguf")))
SHARED = ("search: price", "search: uniform", "prove")  # stages whose runs know nothing of each other


def stages(name: str, per_weight: float, n_threads: int) -> tuple[dict[str, float], dict[str, int]]:
    """(seconds of each stage, runs of those that workers share). per_weight: seconds of a prompt's token."""
    n_layer, n_embd, n_vocab, n_params, *_ = MODELS[name]
    options: Any = SimpleNamespace(text=None, method="fitted", n_trials=None)
    plannable: Any = SimpleNamespace(sizes=SIZES, types=range(n_layer))
    session: Any = SimpleNamespace(n_vocab=n_vocab, n_embd=n_embd, n_params=n_params, n_threads=n_threads)
    per_token = per_weight * n_params
    found = seconds(options, plannable, session, per_token, per_token)
    n_price, _ = n_runs_of(n_layer, 6, None)
    return found, {"search: price": n_price + 6, "search: uniform": 6, "prove": 8}


def disk(name: str) -> float:
    """GiB that are kept at once: captured Q, K and V, or a reference with its hidden states."""
    n_layer, n_embd, n_vocab, _, n_head_kv, n_gqa, head_dim = MODELS[name]
    values = (n_head_kv * head_dim * SIZES.stream,) * n_layer
    captured = captured_bytes(Geometry(values, values, SIZES.stream), SIZES.n_captured, n_gqa)
    hidden = hidden_bytes(n_layer, SIZES.n_searched * SIZES.search_ctx, n_embd)
    return max(captured, 2 * n_vocab * SIZES.n_scored + hidden) / 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokens_per_second", type=float)
    parser.add_argument("--of", choices=MODELS, default="8B")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--workers", default="1,4,16")
    options = parser.parse_args()
    counts = [int(n) for n in options.workers.split(",")]
    per_weight = 1 / options.tokens_per_second / MODELS[options.of][3]
    rows = []
    for name in MODELS:
        found, n_runs = stages(name, per_weight, options.threads)
        hours, longest = [], ""
        for n in counts:
            of_stage = {
                stage: s * math.ceil(n_runs[stage] / n) / n_runs[stage] if stage in SHARED else s
                for stage, s in found.items()
            }
            longest = max(of_stage, key=lambda stage: of_stage[stage])
            hours.append(f"{sum(of_stage.values()) / 3600:.1f}, most of it {longest}")
        rows.append((name, *hours, f"{disk(name):.1f} GiB"))
    print(markdown(["model", *(f"hours, {n} worker{'s' * (n > 1)}" for n in counts), "on disk"], rows))


if __name__ == "__main__":
    main()
