"""The plan on held-out text, beside what it has to beat."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import numpy as np

from kvtuner_gguf.calibrate.progress import OWN_WEIGHTS, Progress
from kvtuner_gguf.calibrate.results import Trial
from kvtuner_gguf.codecs import CODECS, codec
from kvtuner_gguf.geometry import Geometry
from kvtuner_gguf.kvectors import KVectors
from kvtuner_gguf.pair import Pair, Pairs
from kvtuner_gguf.plan import Plan
from kvtuner_gguf.quality import Beside, Quality, Row

CLOSE = 1.3  # a uniform pair whose KLD in the search is so many times the best one's has no chance on another text


class Judge(Protocol):
    """Who runs plans on the held-out text."""

    def vectors_of(self, pairs: Pairs) -> tuple[KVectors, ...]:
        """The vectors of a plan of these pairs."""

    def of_plan(self, pairs: Pairs) -> Quality:
        """With K conditioned."""

    def of_stock(self, pairs: Pairs) -> Quality:
        """With K as it is."""

    def of_floor(self, f16: Pairs) -> Quality:
        """Of the f16 cache itself: the noise floor."""


@dataclass(frozen=True)
class Proof:
    """What was proved.

    rows     the table: noise floor, plan, and what it is compared with
    quality  the plan's
    best     the best uniform pair with its quality; None if there is none
    """

    rows: tuple[Row, ...]
    quality: Quality
    best: tuple[Quality, Trial] | None

    @property
    def beside(self) -> Beside | None:
        """The plan beside the best uniform pair."""
        return Beside.of(self.quality, self.best[0]) if self.best else None

    @property
    def lost_to(self) -> tuple[Quality, Trial] | None:
        """The best uniform pair, if the plan lost to it."""
        return self.best if self.beside and self.beside.verdict == "lost" else None


def prove(
    found: Trial,
    rivals: Sequence[Trial],
    judge: Judge,
    geometry: Geometry,
    *,
    named: Sequence[str] = (),
    seed: int,
    progress: Progress,
    ahead: Callable[..., None] = lambda **runs: None,
) -> Proof:
    """Held-out quality of the plan, of the best of its rivals, and of what else the table shows.

    rivals  uniform plans that may have the plan's bytes
    named   types that the table shows for K and V everywhere, whatever their bytes
    ahead   told of all runs, by the judge's ways, before the first: Runs.ahead
    """
    has_kv = [bool(k) for k in geometry.values_k]
    uniform = {str(Pair(t, t)): everywhere(t, has_kv) for t in named}
    shuffled, plain = _shuffled(found.pairs, has_kv, seed), ungrouped(found.pairs)
    vectors = judge.vectors_of(found.pairs)
    f16, others = everywhere("f16", has_kv), [*(t.pairs for t in rivals), *uniform.values()]
    ahead(floor=[f16], plans=[found.pairs, shuffled], stock=[*([plain] if any(vectors) else []), *others])
    n_runs = 3 + len(rivals) + len(uniform)  # the floor, the plan, and the plan shuffled beside them
    with progress.bar("prove: held-out text", n_runs + any(vectors)) as advance:

        def quality_of(pairs: Pairs, measured: Callable[[Pairs], Quality] = judge.of_stock) -> Quality:
            result = measured(pairs)
            advance(1)
            return result

        floor = quality_of(f16, judge.of_floor)
        of_plan = quality_of(found.pairs, judge.of_plan)
        of_plain = quality_of(plain) if any(vectors) else None
        of_rivals = [(quality_of(t.pairs), t) for t in rivals]
        of_named = {name: quality_of(pairs) for name, pairs in uniform.items()}
        of_shuffled = quality_of(shuffled, judge.of_plan)
    row = partial(row_of, geometry)
    best = min(of_rivals, key=lambda r: r[0].kld_mean) if of_rivals else None
    rows = [floor_row(geometry, floor), row("plan", found.pairs, of_plan, vectors)]
    rows += [row("plan, K not conditioned", plain, of_plain)] if of_plain else []
    rows += [row(f"best uniform pair, {best[1].uniform_pair}", best[1].pairs, best[0])] if best else []
    if shuffled != found.pairs:
        rows.append(row("plan, layers shuffled", shuffled, of_shuffled, judge.vectors_of(shuffled)))
    rows += [row(name, uniform[name], q) for name, q in of_named.items()]
    return Proof(tuple(rows), of_plan, best)


def prove_own(plan: Plan, judge: Judge, geometry: Geometry, progress: Progress) -> tuple[Row, ...]:
    """The noise floor and the plan on the model's own weights, where the rest was run on a copy."""
    with progress.bar("own weights: noise floor and plan", 2) as advance:
        floor = judge.of_floor(everywhere("f16", [bool(k) for k in geometry.values_k]))
        advance(1)
        quality = judge.of_plan(plan.pairs) if plan.k_vectors else judge.of_stock(plan.pairs)
        advance(1)
    rows = floor_row(geometry, floor), row_of(geometry, "plan", plan.pairs, quality, plan.k_vectors)
    return tuple(replace(row, name=f"{OWN_WEIGHTS}, {row.name}") for row in rows)


def best_rivals(uniform: Sequence[Trial], n_bytes: int) -> list[Trial]:
    """The uniform plan of at most so many bytes that did best in the search, and the second best if it may be better on
    another text."""
    best = sorted((t for t in uniform if t.n_bytes <= n_bytes), key=lambda t: t.kld)[:2]
    return [t for t in best if t.kld <= CLOSE * best[0].kld]


def floor_row(geometry: Geometry, quality: Quality) -> Row:
    """The row of the noise floor: the same f16 cache by another attention kernel."""
    f16 = everywhere("f16", [bool(k) for k in geometry.values_k])
    return Row("f16 (noise floor)", 16.0, geometry.bytes(f16), quality)


def everywhere(type_name: str, has_kv: Sequence[bool]) -> Pairs:
    """One type for K and V of all layers."""
    return Plan.uniform(Pair(type_name, type_name), len(has_kv), has_kv).pairs


def ungrouped(pairs: Pairs) -> Pairs:
    """The pairs as they may be without bases: a type of groups gives way to the next one of as many bits all over a
    head."""
    plain = [c for c in CODECS.values() if c.block_size > 1 and not c.groups]

    def next_to(name: str) -> str:
        as_many = (c for c in plain if c.bits_per_value >= codec(name).bits_per_value)
        return min(as_many, key=lambda c: c.bits_per_value).name

    return tuple(replace(p, type_k=next_to(p.type_k)) if p.type_k and codec(p.type_k).groups else p for p in pairs)


def _shuffled(pairs: Pairs, has_kv: Sequence[bool], seed: int) -> Pairs:
    """The same pairs on other layers: what the choice of layers is worth. Types of groups stay among the layers that
    have one, and so a basis."""
    rng, result = np.random.default_rng(seed), list(pairs)
    for groups in (False, True):
        il = [i for i, has in enumerate(has_kv) if has and codec(pairs[i].type_k).groups == groups]
        for i, j in zip(il, rng.permutation(il)):
            result[i] = pairs[j]
    return tuple(result)


def row_of(geometry: Geometry, name: str, pairs: Pairs, quality: Quality, k_vectors: Sequence[KVectors] = ()) -> Row:
    """The row of a plan."""
    return Row(name, geometry.bits_per_value(pairs, k_vectors), geometry.bytes(pairs, k_vectors), quality)
