"""Groups: small cases worked out by hand, and what must never happen."""

import numpy as np
import pytest

from kvtuner_gguf.calibrate.cluster import cluster
from kvtuner_gguf.calibrate.prune import pareto_menus
from kvtuner_gguf.calibrate.results import ErrorTable, Groups, Menus
from kvtuner_gguf.errors import CalibrationError
from kvtuner_gguf.pair import Pair

PAIRS = tuple(map(Pair.parse, ("q8_0", "q8_0/q4_0", "q4_0/q8_0", "q4_0")))
KEY_FIRST, VALUE_FIRST = (PAIRS[3], PAIRS[1], PAIRS[0]), (PAIRS[3], PAIRS[2], PAIRS[0])


def make_table(rows, il=None):
    rows = np.array(rows, dtype=np.float64)
    return ErrorTable(PAIRS, il or tuple(range(len(rows))), dict.fromkeys(("output_error", "score_error"), rows))


def test_groups_worked_by_hand():
    # layers 0 and 2 lie 0.03 apart, layer 1 lies 0.2 from both
    table = make_table([[0.01, 0.10, 0.2, 0.30], [0.01, 0.10, 0.2, 0.50], [0.01, 0.10, 0.2, 0.33]])
    assert cluster(table, pareto_menus(table)).layers == ((0, 2), (1,))


def test_layers_of_different_menus_never_share_a_group():
    table = make_table([[0.01, 0.1, 0.2, 0.3], [0.01, 0.1, 0.2, 0.3], [0.01, 0.1, 0.2, 0.3]])
    menus = Menus((0, 1, 2), (KEY_FIRST, VALUE_FIRST, KEY_FIRST))
    assert cluster(table, menus).layers == ((0, 2), (1,))


def test_layers_of_equal_menu_and_errors_share_a_group():
    table = make_table([[0.01, 0.1, 0.2, 0.3]] * 5, il=(1, 2, 5, 6, 9))
    assert cluster(table, pareto_menus(table)) == Groups((1, 2, 5, 6, 9), ((1, 2, 5, 6, 9),))


def test_only_the_pairs_of_the_menu_count():
    # far apart in q4_0/q8_0, which neither menu holds
    table = make_table([[0.01, 0.1, 0.2, 0.3], [0.01, 0.1, 0.9, 0.3]])
    assert cluster(table, Menus((0, 1), (KEY_FIRST, KEY_FIRST))).layers == ((0, 1),)


def test_eps_is_a_euclidean_distance_over_the_menu():
    # 0.04 in each of two pairs: 0.0566 apart
    table = make_table([[0.01, 0.10, 0.5, 0.30], [0.01, 0.14, 0.5, 0.34]])
    assert cluster(table, pareto_menus(table)).layers == ((0,), (1,))
    assert cluster(table, pareto_menus(table), eps=0.06).layers == ((0, 1),)


def test_a_chain_is_one_group():
    # 0.04 from each to the next: DBSCAN joins what a common centre would not
    table = make_table([[0.01, 0.1, 0.5, 0.30 + 0.04 * i] for i in range(4)])
    assert cluster(table, pareto_menus(table)).layers == ((0, 1, 2, 3),)
    assert cluster(table, pareto_menus(table), min_samples=5).layers == ((0,), (1,), (2,), (3,))


def test_pairs_that_no_layer_of_the_menu_holds_do_not_matter():
    table = make_table([[0.01, 0.1, np.nan, 0.3], [0.01, 0.1, np.nan, 0.3]])
    assert cluster(table, pareto_menus(table)).layers == ((0, 1),)


@pytest.mark.parametrize("seed", range(5))
def test_groups_are_a_partition_in_order(seed):
    rng = np.random.default_rng(seed)
    errors = np.sort(rng.uniform(0, 0.4, (20, 4)))
    errors[:, 1:3] = rng.permuted(errors[:, 1:3], axis=1)
    table = make_table(errors)
    menus = pareto_menus(table)
    groups = cluster(table, menus)  # the record refuses what is no partition
    assert [group[0] for group in groups.layers] == sorted(group[0] for group in groups.layers)
    assert all(len({menus.menu(il) for il in group}) == 1 for group in groups.layers)
    assert all(list(group) == sorted(group) for group in groups.layers)


def test_cluster_refuses_menus_of_other_layers():
    table = make_table([[0.01, 0.1, 0.2, 0.3]] * 2)
    with pytest.raises(CalibrationError, match=r"errors of layers \(0, 1\), menus of \(0, 2\)"):
        cluster(table, Menus((0, 2), (KEY_FIRST, KEY_FIRST)))


# KVTuner, Table 10 (Llama-3.1-8B, per-token), with the mean nominal bits that two published presets give each group
LLAMA_GROUPS = (
    (0,),
    (1, 2, 3, 4, 7, 13, 18, 25, 27, 31),
    (5, 6, 12, 21, 26, 28),
    (8, 9, 10, 11, 14, 15, 16, 17, 20, 30),
    (19, 22),
    (23, 24, 29),
)


@pytest.mark.parametrize(("bits", "name"), [((6, 3, 4, 4, 3, 3), "3.59"), ((4, 6, 4, 6, 4, 6), "5.44")])
def test_published_groups_give_published_bits(bits, name):
    groups = Groups(tuple(range(32)), LLAMA_GROUPS)
    total = sum(bits_of_group * len(group) for bits_of_group, group in zip(bits, groups.layers, strict=True))
    assert f"{total / len(groups.il):.2f}" == name
