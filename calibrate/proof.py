"""The plan on held-out text, beside what it has to beat."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from kvtuner_gguf.calibrate.kld import Reference, measure
from kvtuner_gguf.calibrate.results import Trial
from kvtuner_gguf.geometry import Geometry
from kvtuner_gguf.kvectors import KVectors
from kvtuner_gguf.pair import Pair
from kvtuner_gguf.plan import Plan
from kvtuner_gguf.quality import Comparison, Quality, Row

if TYPE_CHECKING:
    from kvtuner_gguf.calibrate.pipeline import Run

HELDOUT, HELDOUT_FLOOR = "heldout", "heldout-floor"  # runs in the records


@dataclass(frozen=True)
class Proof:
    """The table; the plan's quality; the best uniform pair and its quality, None if there is none."""

    comparison: Comparison
    quality: Quality
    best: tuple[Quality, Trial] | None

    @property
    def won(self) -> bool:
        return self.best is None or self.quality.kld_mean <= self.best[0].kld_mean


def prove(run: Run, found: Trial, rivals: list[Trial], reference: Reference, text_name: str) -> Proof:
    """Held-out quality of the plan, of the best uniform pair at the same bytes, and of what else the table shows."""
    has_kv = [bool(k) for k in run.geometry.values_k]
    supported = run.session.supported(("q8_0", "q4_0")).values()
    named = {str(Pair(t, t)): _all(has_kv, t) for t in ("q8_0", "q4_0") if all(t in k for k, _ in supported)}
    shuffled = _shuffled(found.pairs, has_kv, run.options.seed)
    n_runs = 3 + len(rivals) + len(named)  # the floor, the plan, and the plan shuffled beside them
    quality, stock = run.evaluate(reference, HELDOUT), run.evaluate(reference, HELDOUT, stock=True)
    vectors = run.vectors_of(found.pairs)
    with run.progress.bar("prove: held-out text", n_runs + any(vectors)) as advance:

        def quality_of(pairs: tuple[Pair, ...], measured: Callable[[tuple[Pair, ...]], Quality] = stock) -> Quality:
            result = measured(pairs)
            advance(1)
            return result

        floor = run.cache.get(
            HELDOUT_FLOOR, lambda _: measure(run.session, None, reference, flash_attn=False), _all(has_kv, "f16")
        )
        advance(1)
        of_plan = quality_of(found.pairs, quality)
        of_plain = quality_of(found.pairs) if any(vectors) else None
        of_rivals = [(quality_of(t.pairs), t) for t in rivals]
        of_named = {name: quality_of(pairs) for name, pairs in named.items()}
        of_shuffled = quality_of(shuffled, quality)
    row = partial(_row, run.geometry)
    best = min(of_rivals, key=lambda r: r[0].kld_mean) if of_rivals else None
    rows = [
        Row("f16 (noise floor)", 16.0, run.geometry.bytes(_all(has_kv, "f16")), floor),
        row("plan", found.pairs, of_plan, vectors),
    ]
    rows += [row("plan, K not conditioned", found.pairs, of_plain)] if of_plain else []
    rows += [row(f"best uniform pair, {best[1].uniform_pair}", best[1].pairs, best[0])] if best else []
    rows += (
        [row("plan, layers shuffled", shuffled, of_shuffled, run.vectors_of(shuffled))]
        if shuffled != found.pairs
        else []
    )
    rows += [row(name, named[name], q) for name, q in of_named.items()]
    chunks = reference.chunks
    return Proof(Comparison(text_name, chunks.n_positions, chunks.n_ctx, run.options.n_ctx, tuple(rows)), of_plan, best)


def _all(has_kv: Sequence[bool], type_name: str) -> tuple[Pair, ...]:
    return Plan.uniform(Pair(type_name, type_name), len(has_kv), has_kv).pairs


def _shuffled(pairs: tuple[Pair, ...], has_kv: Sequence[bool], seed: int) -> tuple[Pair, ...]:
    """The same pairs on other layers: what the choice of layers is worth."""
    il = [i for i, has in enumerate(has_kv) if has]
    order = np.random.default_rng(seed).permutation(il)
    result = list(pairs)
    for i, j in zip(il, order):
        result[i] = pairs[j]
    return tuple(result)


def _row(
    geometry: Geometry, name: str, pairs: tuple[Pair, ...], quality: Quality, k_vectors: Sequence[KVectors] = ()
) -> Row:
    return Row(name, geometry.bits_per_value(pairs, k_vectors), geometry.bytes(pairs, k_vectors), quality)
