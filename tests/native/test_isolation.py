"""A row of attention depends on the cells that it sees and on nothing else, bit for bit."""

import itertools
from pathlib import Path

import pytest
from test_attn import TYPES, run

pytestmark = pytest.mark.native

SPLIT = 2e-6
"""Of the relative difference between one range of KV rows and several, for every type: of sums of floats, as f16 has it."""

PAIRS = [{"k": k, "v": v, "n_kv": 300} for k, v in itertools.product(TYPES, TYPES)]
SHAPES = [
    {"k": k, "v": v, "n_kv": n_kv, **shape}
    for (k, v), n_kv, shape in itertools.product(
        (("f16", "f16"), ("q8_0", "q4_0"), ("f32", "q5_1"), ("q3_64", "q2_64"), ("q4_1", "bf16")),
        (64, 512, 1001),
        (
            {"dk": 128, "dv": 128, "n_gqa": 4}, {"n_gqa": 1, "n_head_kv": 3}, {"dk": 64, "dv": 128, "n_q": 130}, {"softcap": 5.0},
            {"sinks": True}, {"max_bias": 8.0, "n_head_kv": 3, "n_gqa": 4},
        ),
    )
]  # fmt: skip


def check(cases: list[dict], folder: Path | None = None) -> None:
    """Of the libraries in a folder, the package's own by default."""
    from kvtuner_gguf import native

    for case, result in zip(cases, run(folder or native.lib_dir(), cases, "isolation.py"), strict=True):
        assert result["finite"] and not result["changed"], (case, result)
        assert result["split"] < SPLIT, (case, result)


def test_every_pair_of_types():
    check(PAIRS)


def test_shapes_and_extras():
    check(SHAPES)
