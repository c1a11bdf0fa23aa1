"""Attention against float64: every pair of types, head size, group of heads, batch, mask and extra."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.native

BLOCKS = ("q8_0", "q6_32", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl", "q3_32", "q3_64", "q2_32", "q2_64",
          "t4_64", "t3_64", "t2_64")  # fmt: skip
GROUPS = ("k5_64", "k4_64", "k3_64", "k2_64")  # of K
TYPES = ("f32", "f16", "bf16", *BLOCKS)

BOUND = 2e-6
"""Of the relative error of floats: sums of a few hundred products, and an exponential of 2 ulp."""
BOUND_BLOCKS = 3e-4
"""With blocks Q and the weights are rounded to 16 bits: half a step of 1/32767 of the largest one, at worst when all
others are small. Stock's error there is above 2e-3, as it rounds Q to 8 bits."""
BOUND_LOUD = 1e-2
"""Of scores of a thousand, which Q's rounding to 16 bits moves by about a hundredth."""

PAIRS = [
    {"k": k, "v": v, "n_q": n_q, "n_kv": 300} for k, v in itertools.product((*TYPES, *GROUPS), TYPES) for n_q in (1, 33)
]
SHAPES = [
    {"k": k, "v": v, "dk": d, "dv": d, "n_gqa": n_gqa, "n_q": n_q, "n_kv": n_kv}
    for (k, v), d, n_gqa, (n_q, n_kv) in itertools.product(
        (
            ("f16", "f16"),
            ("q8_0", "q4_0"),
            ("q5_1", "iq4_nl"),
            ("q6_32", "q3_32"),
            ("q3_64", "q2_64"),
            ("k3_64", "q2_64"),
            ("t4_64", "t3_64"),
            ("q8_0", "t2_64"),
        ),
        (64, 80, 96, 128, 256),
        (1, 3, 4, 8),
        ((1, 517), (4, 70), (33, 161)),
    )
    if d % (64 if v.endswith("_64") else 32) == 0 or k == "f16"
]
EXTRAS = [
    {**extra, "k": k, "v": v, "n_q": n_q, "n_kv": 333, "n_stream": n_stream}
    for extra, (k, v), n_q, n_stream in itertools.product(
        (
            {"mask": None}, {"mask": "holes"}, {"sinks": True}, {"softcap": 3.0}, {"max_bias": 8.0, "n_head_kv": 3,
            "n_gqa": 4},
            {"dk": 96, "dv": 64}, {"dk": 192, "dv": 128, "v_in_k": True}, {"sinks": True, "softcap": 5.0,
            "mask": "holes"},
        ),
        (("f16", "f16"), ("q8_0", "q8_0"), ("bf16", "q4_1")),
        (1, 16, 40),
        (1, 3),
    )
    if not (extra.get("v_in_k") and k != v)
]  # fmt: skip
ODD = [
    {"k": k, "v": v, "dk": d, "dv": d, "n_q": n_q, "n_kv": n_kv, "n_threads": n_threads}
    for (k, v), d, (n_q, n_kv), n_threads in itertools.product(
        (("f16", "f32"), ("bf16", "f16")), (40, 72), ((1, 1), (1, 65), (5, 129), (40, 113)), (1, 2)
    )
]
LONG = [
    {"k": k, "v": v, "n_q": n_q, "n_kv": n_kv, "n_threads": n_threads}
    for (k, v), (n_q, n_kv), n_threads in itertools.product(
        (("q8_0", "q8_0"), ("q4_0", "f16")), ((1, 4097), (512, 1000), (512, 512)), (1, 2, 3)
    )
]
ROOM = [
    {"k": k, "v": v, "n_head_kv": n_head_kv, "n_q": n_q, "n_kv": 512, "room": 512 - n_seen, "n_stream": n_stream,
     "n_threads": n_threads}
    for (k, v), (n_head_kv, n_stream), n_q, n_seen, n_threads in itertools.product(
        (("f16", "f16"), ("q8_0", "q4_0")), ((1, 1), (2, 3), (3, 1), (8, 1)), (1, 7), (9, 64, 130, 300), (1, 2, 5, 16)
    )
]  # fmt: skip

LOUD = [
    {"k": k, "v": v, "n_q": n_q, "n_kv": 300, "loud": loud}
    for (k, v), n_q, loud in itertools.product(
        (("f16", "f16"), ("q8_0", "q8_0"), ("q4_0", "q4_0"), ("q5_1", "q5_1"), ("t4_64", "t2_64")), (1, 33),
        (200, 1000, 5000)
    )
]  # fmt: skip


def run(folder: Path, cases: list[dict], name: str = "attention.py") -> list[dict]:
    """What a program beside this file says of the cases, with the libraries in this folder."""
    program = Path(__file__).with_name(name)
    env = {**os.environ, "OMP_WAIT_POLICY": "passive"}
    done = subprocess.run(
        [sys.executable, str(program), str(folder)], input=json.dumps(cases), capture_output=True, text=True, env=env
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def bound(k: str, v: str, loud: bool) -> float:
    """Of the relative error with these types."""
    if loud:
        return BOUND_LOUD
    return BOUND_BLOCKS if k in (*BLOCKS, *GROUPS) or v in BLOCKS else BOUND


def check(cases: list[dict], folder: Path | None = None) -> None:
    """Of the libraries in a folder, the package's own by default."""
    from kvtuner_gguf import native

    for case, result in zip(cases, run(folder or native.lib_dir(), cases), strict=True):
        assert result["finite"], case
        assert result["error"] < bound(case["k"], case["v"], "loud" in case), (case, result)
        assert result["ref"] is None or result["ref"] < 1e-7, (case, result)


def test_pairs():
    check(PAIRS)


def test_shapes():
    check(SHAPES)


def test_extras():
    check([{**case, "ref": case["n_q"] <= 16 and case["n_stream"] == 1} for case in EXTRAS])


def test_head_sizes_that_fill_no_vector():
    check(ODD)


def test_long_and_threads():
    check(LONG)


def test_scores_of_thousands():
    """No weight, rounded, is above the largest that an integer holds."""
    check(LOUD)


def test_a_cache_with_room_behind_its_tokens():
    """However the threads share heads and cells between them."""
    check(ROOM)
