"""Which assignments of pairs to groups of layers are worth their bytes, by trying them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from kvtuner_gguf.calibrate.results import Evaluate, Groups, Menus, Trial, Trials
from kvtuner_gguf.errors import CalibrationError
from kvtuner_gguf.geometry import Geometry
from kvtuner_gguf.pair import Pair, Pairs

GENERATION = 50  # proposals that do not depend on each other's KLD: optuna's default


def nsga2(
    groups: Groups,
    menus: Menus,
    evaluate: Evaluate,
    geometry: Geometry,
    *,
    n_trials: int,
    seed: int,
    max_bits: float | None = None,
    progress: Callable[[int], None] = lambda n: None,
    ahead: Callable[[list[Pairs]], None] = lambda plans: None,
) -> Trials:
    """The distinct assignments that NSGA-II tried, in order, beginning with the cheapest and the dearest.

    evaluate  one pair per layer -> KLD against the f16 cache, nats: all that the search knows of a model. Never called
              twice with the same pairs.
    n_trials  proposals, repeated ones included; fewer are made if no assignment is left to try
    max_bits  soft constraint on the real bits per cached value: plans above it are tried, but never preferred
    progress  gets 1 for each proposal
    ahead     told of all that a generation proposes before any of it is evaluated
    The same seed and evaluate give the same trials. Raises CalibrationError if the layers of a group differ in menu, or
    a KLD is not finite. Source: KVTuner (arXiv 2502.04420), section 5.1, and its released search, which takes NSGA-II.
    """
    import optuna

    group_menus = menus_of_groups(groups, menus)
    n_assignments = math.prod(len(menu) for menu in group_menus)
    tried: dict[Pairs, Trial] = {}

    def proposed(trial: optuna.Trial) -> Pairs:
        chosen = [menu[trial.suggest_int(f"group_{i}", 0, len(menu) - 1)] for i, menu in enumerate(group_menus)]
        return assign(groups, chosen, geometry.n_layer)

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = optuna.samplers.NSGAIISampler(population_size=GENERATION, seed=seed)
    study = optuna.create_study(directions=["minimize", "minimize"], sampler=sampler)
    ends = 0, -1
    for end in ends:
        study.enqueue_trial({f"group_{i}": range(len(menu))[end] for i, menu in enumerate(group_menus)})
    left, n_asked = n_trials, len(ends) + GENERATION  # those are of no generation
    while left > 0:
        asked = [study.ask() for _ in range(min(n_asked, left))]
        left, n_asked = left - n_asked, GENERATION
        plans = [proposed(trial) for trial in asked]
        ahead([pairs for pairs in dict.fromkeys(plans) if pairs not in tried])
        for trial, pairs in zip(asked, plans, strict=True):
            if pairs not in tried:
                tried[pairs] = Trial.of(pairs, float(evaluate(pairs)), geometry)
            if max_bits is not None:
                trial.set_constraint("bits_per_value", tried[pairs].bits_per_value - max_bits)
            study.tell(trial, (tried[pairs].kld, tried[pairs].n_bytes))
            progress(1)
            if len(tried) == n_assignments:
                return Trials(tuple(tried.values()))
    return Trials(tuple(tried.values()))


def menus_of_groups(groups: Groups, menus: Menus) -> list[tuple[Pair, ...]]:
    """The menu that the layers of each group share. Raises CalibrationError if they do not."""
    shared = []
    for layers in groups.layers:
        distinct = {menus.menu(il) for il in layers}
        if len(distinct) != 1:
            raise CalibrationError(f"group {layers}: {len(distinct)} menus, need one and the same. Cluster again.")
        shared.append(distinct.pop())
    return shared


def assign(groups: Groups, chosen: Sequence[Pair], n_layer: int) -> tuple[Pair, ...]:
    """One pair per layer from one per group; Pair("", "") for a layer that is in none."""
    pairs = [Pair("", "")] * n_layer
    for layers, pair in zip(groups.layers, chosen, strict=True):
        for il in layers:
            pairs[il] = pair
    return tuple(pairs)
