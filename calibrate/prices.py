"""What each layer's K and V cost in KLD: real runs on an f16 cache but for one side of one layer, or both.

The coarsest type is priced, since its KLD stands furthest above the noise: the squared errors tell what the finer ones
cost. A few runs with the finest pair in one layer tell how large the floor is there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from kvtuner_gguf.calibrate.kld_model import F16, KldModel
from kvtuner_gguf.calibrate.results import Trial, non_dominated
from kvtuner_gguf.pair import Pair

Plans = Sequence[tuple[Pair, ...]]

N_FLOOR = 4  # runs for the floor
MOST = 0.25  # nats: above it a KLD does not grow with the squared error any more, and a finer type is priced


def floor_plans(kld_model: KldModel) -> list[tuple[Pair, ...]]:
    """Plans of one layer with its finest pair, the first and the last among them."""
    n = len(kld_model.il)
    rows = sorted({round(i * (n - 1) / (N_FLOOR - 1)) for i in range(N_FLOOR)})
    return [kld_model.lowered({row: pair}) for row in rows if (pair := kld_model.finest(row))]


def price_ladders(kld_model: KldModel, n_runs: int) -> list[Plans]:
    """For K and for V of each layer: plans with its types alone, the coarsest first.

    n_runs  at most so many. Too few for that: both sides of a layer are lowered together, as their x are much alike,
            and if need be those of layers that follow each other
    """
    sides = {s: [r for r in range(len(kld_model.il)) if _types(kld_model, r, s)] for s in ("k", "v")}
    if n_runs >= sum(map(len, sides.values())):
        return [_ladder({row: _types(kld_model, row, side)}, kld_model) for side, rows in sides.items() for row in rows]
    rows = sorted({*sides["k"], *sides["v"]})
    groups = np.array_split(rows, min(len(rows), max(1, n_runs)))
    return [_ladder({int(row): _both(kld_model, int(row)) for row in group}, kld_model) for group in groups]


def _ladder(steps: dict[int, list[Pair]], kld_model: KldModel) -> Plans:
    """Plans that lower these rows, to the next of their pairs each time; a row that has no more stays at its last."""
    n = max(map(len, steps.values()))
    return [kld_model.lowered({row: pairs[min(i, len(pairs) - 1)] for row, pairs in steps.items()}) for i in range(n)]


def price(ladder: Plans, run: Callable[[tuple[Pair, ...]], Trial]) -> Trial:
    """The run of the coarsest plan of the ladder whose KLD still grows as the squared error does."""
    for plan in ladder:
        trial = run(plan)
        if trial.kld <= MOST:
            break
    return trial


def ahead(ladders: Sequence[Plans], kld: Callable[[tuple[Pair, ...]], float], run: Callable[[Plans], None]) -> None:
    """Let all runs that `price` will make be made together, rung by rung."""
    at_once = [ladder[0] for ladder in ladders]
    for i in range(1, max(map(len, ladders), default=0) + 1):
        run(at_once)
        at_once = [ladder[i] for ladder in ladders if i < len(ladder) and all(kld(plan) > MOST for plan in ladder[:i])]
        if not at_once:
            return


def replaced(trial: Trial) -> bool:
    """Whether a run, read back from the records, is a price that one of a finer type took the place of."""
    return trial.kld > MOST and F16 in trial.pairs


def _both(kld_model: KldModel, row: int) -> list[Pair]:
    """The pairs that lower both sides of the layer alike, the coarsest first."""
    k, v = _types(kld_model, row, "k"), _types(kld_model, row, "v")
    if not (k and v):
        return k or v
    pairs = [Pair(k[min(i, len(k) - 1)].type_k, v[min(i, len(v) - 1)].type_v) for i in range(max(len(k), len(v)))]
    held = [p for p in pairs if not np.isnan(kld_model.sq_k[row, kld_model.column[p]])]
    return held or k


def _types(kld_model: KldModel, row: int, side: str) -> list[Pair]:
    """The pairs that lower this side of the layer alone, the coarsest first; of both where V lies in K's rows. Only
    what a plan would take: another type, as in a basis or as not, errs in other ways, and foretells less."""
    own, other = (kld_model.sq_k, kld_model.sq_v) if side == "k" else (kld_model.sq_v, kld_model.sq_k)
    alone = [i for i in range(len(kld_model.pairs)) if own[row, i] > 0 and other[row, i] == 0]
    worth = non_dominated([kld_model.n_bytes[row, i] for i in alone], [own[row, i] for i in alone])
    return [kld_model.pairs[alone[i]] for i in sorted(worth, key=lambda i: (-own[row, alone[i]], i))]
