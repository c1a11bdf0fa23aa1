"""Pareto pairs: the paper's table, and small cases worked out by hand."""

import numpy as np
import pytest

from kvtuner_gguf.calibrate.prune import pair_bits, pareto_menus, pareto_pairs
from kvtuner_gguf.calibrate.results import ErrorTable
from kvtuner_gguf.errors import CalibrationError
from kvtuner_gguf.geometry import Geometry
from kvtuner_gguf.pair import Pair

# KVTuner, Table 3: e_o of Llama-3.1-8B-Instruct, per-token-asym, by nominal bits of K and V
PAPER = {
    "KV8": (8, 8, 0.014),
    "K8V4": (8, 4, 0.100),
    "K8V2": (8, 2, 0.401),
    "K4V8": (4, 8, 0.168),
    "KV4": (4, 4, 0.207),
    "K4V2": (4, 2, 0.453),
    "K2V8": (2, 8, 0.882),
    "K2V4": (2, 4, 0.892),
    "KV2": (2, 2, 0.962),
}


def paper_pareto(errors):
    names = list(PAPER)
    bits = [(PAPER[name][0] + PAPER[name][1]) / 2 for name in names]
    return {names[i] for i in pareto_pairs(names, bits, [errors[name] for name in names])}


def make_table(pairs, rows):
    rows = np.array(rows, dtype=np.float64)
    measures = {"output_error": rows, "output_nrmse": 1 - rows}
    return ErrorTable(tuple(map(Pair.parse, pairs)), tuple(range(len(rows))), measures)


def menus_of(menus):
    return [[str(pair) for pair in menu] for menu in menus.pairs]


def test_prune_keeps_the_papers_pairs():
    errors = {name: row[2] for name, row in PAPER.items()}
    assert paper_pareto(errors) == {"KV8", "K8V4", "KV4", "K4V2", "KV2"}


def test_prune_keeps_the_papers_pairs_of_layer_0():
    errors = {name: row[2] for name, row in PAPER.items()}
    errors["K8V4"], errors["K4V8"] = errors["K4V8"], errors["K8V4"]
    assert paper_pareto(errors) == {"KV8", "K4V8", "KV4", "K4V2", "KV2"}


def test_prune_sorts_by_bits():
    bits = [(k + v) / 2 for k, v, _ in PAPER.values()]
    keep = pareto_pairs(list(PAPER), bits, [e for *_, e in PAPER.values()])
    assert [list(PAPER)[i] for i in keep] == ["KV2", "K4V2", "KV4", "K8V4", "KV8"]


def test_prune_keeps_the_first_of_equals():
    assert pareto_pairs("abcd", [6, 6, 4, 4], [0.1, 0.1, 0.1, 0.2]) == [2]  # no error less for more bits
    assert pareto_pairs("abcd", [6, 6, 4, 4], [0.1, 0.1, 0.3, 0.3]) == [2, 0]


def test_prune_leaves_out_what_a_layer_cannot_hold():
    assert pareto_pairs("abc", [4, 6, 8], [np.nan, 0.5, 0.1]) == [1, 2]
    with pytest.raises(CalibrationError, match="none of 2 pairs has an error"):
        pareto_pairs("ab", [4, 6], [np.nan, np.nan])


def test_prune_refuses_lists_that_differ_in_length():
    with pytest.raises(CalibrationError, match="2 pairs, 3 bits, 2 errors"):
        pareto_pairs("ab", [4, 6, 8], [0.1, 0.2])


def test_pair_bits_are_real_bits():
    assert pair_bits(Pair.parse("q8_0")) == 8.5
    assert pair_bits(Pair.parse("q8_0/q4_0")) == 6.5
    assert pair_bits(Pair.parse("q8_0/q4_0"), 3, 1) == 7.5
    assert pair_bits(Pair.parse("q8_0/q8_0"), 576, 0) == 8.5


# three layers, four pairs of 8.5, 6.5, 6.5 and 4.5 bits
PAIRS = ["q8_0/q8_0", "q8_0/q4_0", "q4_0/q8_0", "q4_0/q4_0"]
ROWS = [
    [0.01, 0.10, 0.20, 0.30],  # key first: K4V8 loses at equal bits
    [0.01, 0.20, 0.10, 0.30],  # value first
    [0.01, 0.40, 0.35, 0.30],  # both mixed pairs lose to four bits
]


def test_menus_worked_by_hand():
    menus = pareto_menus(make_table(PAIRS, ROWS))
    assert menus.il == (0, 1, 2)
    assert menus_of(menus) == [
        ["q4_0/q4_0", "q8_0/q4_0", "q8_0/q8_0"],
        ["q4_0/q4_0", "q4_0/q8_0", "q8_0/q8_0"],
        ["q4_0/q4_0", "q8_0/q8_0"],
    ]


def test_menus_by_another_measure():
    # output_nrmse is 1 minus the rows: more bits err more, but for layer 2, where a mixed pair errs least
    assert menus_of(pareto_menus(make_table(PAIRS, ROWS), "output_nrmse")) == [
        ["q4_0/q4_0"],
        ["q4_0/q4_0"],
        ["q4_0/q4_0", "q8_0/q4_0"],
    ]
    with pytest.raises(CalibrationError, match="measure 'e_o' is not known"):
        pareto_menus(make_table(PAIRS, ROWS), "e_o")


def test_menus_weigh_k_and_v_by_what_the_layer_caches():
    # V is four times K: q8_0/q4_0 costs 5.3 bits, q4_0/q8_0 7.7; both stay where the dearer errs less, in layer 1
    geometry = Geometry(values_k=(64,) * 3, values_v=(256,) * 3, n_ctx=1)
    assert menus_of(pareto_menus(make_table(PAIRS, ROWS), geometry=geometry)) == [
        ["q4_0/q4_0", "q8_0/q4_0", "q8_0/q8_0"],
        ["q4_0/q4_0", "q8_0/q4_0", "q4_0/q8_0", "q8_0/q8_0"],
        ["q4_0/q4_0", "q8_0/q8_0"],
    ]


def test_menus_refuse_a_geometry_without_the_layer():
    with pytest.raises(CalibrationError, match="layer 1: has errors, but caches no values"):
        pareto_menus(make_table(PAIRS, ROWS), geometry=Geometry((64, 0, 64), (64, 0, 64), 1))


def test_menus_of_layers_that_hold_different_pairs():
    table = make_table(["f16/f16", "q8_0/q8_0"], [[0.0, 0.01], [0.0, np.nan]])
    assert menus_of(pareto_menus(table)) == [["q8_0/q8_0", "f16/f16"], ["f16/f16"]]
