"""The two ways to search: errors, a goal, and a function that runs a plan -> the plan found. No model here."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

from kvtuner_gguf.calibrate.cluster import cluster
from kvtuner_gguf.calibrate.goals import Search, Target
from kvtuner_gguf.calibrate.kld_model import KldModel
from kvtuner_gguf.calibrate.nsga2 import nsga2
from kvtuner_gguf.calibrate.options import PAPER_TRIALS
from kvtuner_gguf.calibrate.prices import N_FLOOR, ahead, floor_plans, price, price_ladders, replaced
from kvtuner_gguf.calibrate.prune import pareto_menus
from kvtuner_gguf.calibrate.results import ErrorTable, Evaluate, Trial
from kvtuner_gguf.geometry import Geometry
from kvtuner_gguf.pair import Pairs

N_REFINE = 6  # runs of the default method around the goal, once the layers are priced


def n_runs_of(n_il: int, n_uniform: int, n_trials: int | None) -> tuple[int, int]:
    """Runs that price the layers, beside the uniform plans, and runs around the goal."""
    if n_trials is None:
        return 2 * n_il + N_FLOOR, N_REFINE
    rest = max(3, n_trials - n_uniform)
    return 2 * rest // 3, rest - 2 * rest // 3


def fitted(
    kld_model: KldModel,
    uniform: Sequence[Pairs],
    kld: Evaluate,
    goal: Target,
    search: Search,
) -> Trial:
    """The default: runs that price each layer's K and V, then the best plans by these prices, to correct them at the
    goal.

    uniform  plans that are run, too
    """
    n_price, n_refine = n_runs_of(len(kld_model.il), len(uniform), search.n_trials)
    floors = floor_plans(kld_model) if n_price > 2 * N_FLOOR else []
    ladders = price_ladders(kld_model, n_price - len(floors))

    def run(pairs: Pairs) -> Trial:
        return Trial.of(pairs, kld(pairs), search.geometry)

    if search.ahead is not None:
        search.ahead([*uniform, *floors])
        ahead(ladders, kld, search.ahead)
    known = []
    n_runs = len(uniform) + len(floors) + len(ladders)
    with search.progress.bar("search: price of each layer's K and V", n_runs) as advance:
        for trial in chain(map(run, [*uniform, *floors]), (price(ladder, run) for ladder in ladders)):
            known.append(trial)
            advance(1)
    with search.progress.bar("search: best plans by these prices", n_refine) as advance:
        return goal.refine(kld_model, known, kld, search, n_refine, advance)


def paper(
    errors: ErrorTable,
    types: Sequence[str],
    kld: Evaluate,
    goal: Target,
    search: Search,
) -> Trial:
    """KVTuner as published: menus by output_error, DBSCAN groups, NSGA-II over (KLD, bits). Arguments as in fitted.

    types  those to choose from, of all in errors
    """
    geometry, errors = search.geometry, errors.of_types(types)
    menus = pareto_menus(errors, geometry=geometry)
    groups = cluster(errors, menus)
    budget = goal.left(search.spent)
    n_trials = search.n_trials or PAPER_TRIALS
    with search.progress.bar("search: real runs (paper)", n_trials) as advance:
        tried = nsga2(
            groups,
            menus,
            kld,
            geometry,
            n_trials=n_trials,
            seed=search.seed,
            max_bits=None if budget is None else geometry.bits_of(budget),
            progress=advance,
            ahead=search.ahead or (lambda plans: None),
        )
    return goal.choose(tried, search.spent)


def known_trials(kld_model: KldModel, runs: Sequence[tuple[Pairs, float]], geometry: Geometry) -> list[Trial]:
    """The runs of a search, read back with their KLD, that are of the model's pairs and tell prices."""
    of_these = [
        Trial.of(pairs, kld, geometry)
        for pairs, kld in runs
        if {pairs[il] for il in kld_model.il} <= {*kld_model.column}
    ]
    return [trial for trial in of_these if not replaced(trial)]
