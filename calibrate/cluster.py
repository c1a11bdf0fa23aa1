"""Which layers are enough alike to share one choice."""

from __future__ import annotations

import numpy as np

from kvtuner_gguf.calibrate.results import ErrorTable, Groups, Menus
from kvtuner_gguf.errors import CalibrationError
from kvtuner_gguf.pair import Pair


def cluster(
    errors: ErrorTable, menus: Menus, eps: float = 0.05, min_samples: int = 2, *, measure: str = "output_error"
) -> Groups:
    """A partition of the layers that have KV, ordered by each group's first layer.

    Layers with different menus never share a group. Among layers of one menu, DBSCAN (Euclidean) on their errors over
    that menu's pairs; a layer that it calls noise is a group alone.

    eps          distance within which layers are neighbours, in the measure's unit
    min_samples  layers, itself included, that a layer needs within eps to start a group
    Raises CalibrationError if errors and menus are of different layers. Source: KVTuner (arXiv 2502.04420), section
    5.3, which says nothing of noise; its published groups hold single layers.
    """
    if errors.il != menus.il:
        raise CalibrationError(f"cluster: errors of layers {errors.il}, menus of {menus.il}. Prune these errors again.")
    table = errors.measure(measure)
    groups: list[tuple[int, ...]] = []
    for menu, rows in _layers_of_menus(menus).items():
        vectors = table[np.ix_(rows, [errors.pairs.index(pair) for pair in menu])]
        for members in _dbscan(vectors, eps, min_samples):
            groups.append(tuple(menus.il[rows[i]] for i in members))
    return Groups(menus.il, tuple(sorted(groups)))


def _layers_of_menus(menus: Menus) -> dict[tuple[Pair, ...], list[int]]:
    """The rows of each distinct menu, ascending."""
    rows: dict[tuple[Pair, ...], list[int]] = {}
    for row, menu in enumerate(menus.pairs):
        rows.setdefault(menu, []).append(row)
    return rows


def _dbscan(vectors: np.ndarray, eps: float, min_samples: int) -> list[list[int]]:
    """Rows of (n, n_pair) vectors by cluster, noise alone; ascending in each."""
    from sklearn.cluster import DBSCAN

    labels = DBSCAN(eps=eps, min_samples=min_samples).fit_predict(vectors)
    clusters: dict[object, list[int]] = {}
    for i, label in enumerate(labels.tolist()):
        clusters.setdefault(("noise", i) if label < 0 else label, []).append(i)
    return list(clusters.values())
