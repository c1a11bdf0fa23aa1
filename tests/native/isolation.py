"""Attention over one cache that several sequences share: does a row's result depend on anything but the cells that it
sees?

As a program: python isolation.py LIB_DIR < cases.json, prints one line of JSON per case: a list of what changed a row
that it must not, and the largest difference between one thread's result and several threads'.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
from attention import DEFAULT, Ggml, Inputs, Operator, error
from reference import stored

N_SEQ = 4
FLOATS = {"f32": np.float32, "f16": np.float16, "bf16": np.uint16}
POISON = {  # of cells that are not seen: a value of floats, or the scale and minimum of each block
    "NaN": {"f32": np.nan, "f16": np.nan, "bf16": 0x7FC0, "scale": np.nan},
    "inf": {"f32": -np.inf, "f16": np.inf, "bf16": 0x7F80, "scale": -np.inf},
    "huge": {"f32": 3e38, "f16": 65504, "bf16": 0x7F7F, "scale": 65504},
}
MIN = ("q4_1", "q5_1")  # types whose blocks start with a scale and a minimum; those of the others with a scale
BLOCK_BYTES = {
    "q8_0": 34,
    "q6_32": 26,
    "q5_1": 24,
    "q5_0": 22,
    "q4_1": 20,
    "q4_0": 18,
    "iq4_nl": 18,
    "q3_32": 14,
    "q3_64": 26,
    "q2_32": 10,
    "q2_64": 18,
    "k5_64": 41,
    "k4_64": 33,
    "k3_64": 25,
    "k2_64": 17,
    "t4_64": 33,
    "t3_64": 25,
    "t2_64": 17,
}


def poisoned(name: str, rows: np.ndarray, cells: np.ndarray, kind: str) -> np.ndarray:
    """A side of a cache, (1, n_kv, n_head_kv, row bytes), whose cells (n_kv,) bool hold what no attention may
    notice."""
    rows = rows.copy()
    part = rows[:, cells]
    if name in FLOATS:
        part.view(FLOATS[name])[...] = POISON[kind][name]
    else:
        blocks = part.reshape(*part.shape[:-1], part.shape[-1] // BLOCK_BYTES[name], BLOCK_BYTES[name])
        scales = stored(name, np.full(2 if name in MIN else 1, POISON[kind]["scale"], np.float16)).reshape(-1)
        blocks[..., : len(scales)] = scales
        part = blocks.reshape(part.shape)
    rows[:, cells] = part
    return rows


class Shared:
    """A cache of N_SEQ sequences, and a batch of n_q rows of them."""

    def __init__(self, ggml: Ggml, case: dict, seed: int):
        self.ggml, self.case = ggml, {**DEFAULT, "n_q": 64, "n_threads": 1, **case}
        rng = np.random.default_rng(seed)
        n_q, n_kv = self.case["n_q"], self.case["n_kv"]
        runs = rng.integers(1, 150 if n_kv > 150 else 20, n_kv)  # longer than a tile and shorter ones
        self.cell_seq = np.repeat(rng.permutation(n_kv) % N_SEQ, runs)[:n_kv]
        self.row_seq = np.sort(rng.integers(0, N_SEQ, n_q))
        upto = rng.integers(n_kv // 4, n_kv + 1, n_q)
        seen = (self.cell_seq == self.row_seq[:, None]) & (np.arange(n_kv) < upto[:, None])
        # half of the rows have holes of their own
        seen &= rng.random((n_q, n_kv)) < np.where(rng.random(n_q) < 0.5, 1.0, 0.7)[:, None]
        mask = np.where(seen, 0.0, -np.inf).astype(np.float16)[None, None]
        self.inputs = replace(Inputs.drawn(ggml, self.case, seed), mask=mask)
        self.whole = self.rows(np.arange(n_q))

    def rows(self, rows: np.ndarray, **changed: object) -> np.ndarray:
        """(len(rows), n_head, dv): the result of a batch of these rows alone, with other inputs or another number of
        threads."""
        case = {**self.case, "n_q": len(rows), "n_threads": changed.pop("n_threads", self.case["n_threads"])}
        given = replace(self.inputs, q=self.inputs.q[:, :, rows], mask=self.inputs.mask[:, :, rows], **changed)
        operator = Operator(self.ggml, case, inputs=given)
        out = operator.compute()[0]
        operator.free()
        return out

    def changed(self) -> Iterator[str]:
        """Everything that changes a row, by one bit, though it must not."""
        n_q = len(self.row_seq)
        for size in (1, 2, 7, n_q):
            starts = range(0, n_q, size) if size > 2 else range(0, n_q, 5)
            for start in starts:
                rows = np.arange(start, min(start + size, n_q))
                if not self.same(rows, self.rows(rows)):
                    yield f"rows {start}.. in a batch of {len(rows)}"
        for seq in range(N_SEQ):
            rows, others = np.flatnonzero(self.row_seq == seq), self.cell_seq != seq
            for kind, side in product(POISON, "kv"):  # one at a time: NaN in K may hide what is in V
                bad = poisoned(self.case[side], getattr(self.inputs, side), others, kind)
                if not self.same(rows, self.rows(np.arange(n_q), **{side: bad})[rows]):
                    yield f"{kind} in {side.upper()} of other sequences than {seq}"

    def same(self, rows: np.ndarray, result: np.ndarray) -> bool:
        return np.array_equal(self.whole[rows].view(np.uint32), result.view(np.uint32))

    def unseen_faults(self) -> Iterator[str]:
        """NaN and inf in a cell that is seen, and yet give a number to its row: an answer that looks like one."""
        row = int(np.argmax((self.inputs.mask[0, 0] == 0).sum(axis=1)))
        cell = np.arange(self.case["n_kv"]) == np.flatnonzero(self.inputs.mask[0, 0, row] == 0)[-1]
        for side in "kv":
            for kind in ("NaN", "inf"):
                bad = poisoned(self.case[side], getattr(self.inputs, side), cell, kind)
                if np.isfinite(self.rows(np.array([row]), **{side: bad})).any():
                    yield f"{kind} in {side.upper()} of a cell that is seen gives a number"


def main() -> None:
    ggml = Ggml(Path(sys.argv[1]))
    for seed, case in enumerate(json.load(sys.stdin)):
        shared = Shared(ggml, case, seed)
        n_threads = [shared.rows(np.arange(len(shared.row_seq))[:1], n_threads=n) for n in (1, 2, 3)]
        split = max(error(x, n_threads[0].astype(np.float64)) for x in n_threads)
        print(
            json.dumps(
                {
                    "finite": bool(np.isfinite(shared.whole).all()),
                    "changed": [*shared.changed(), *shared.unseen_faults()],
                    "split": split,
                }
            ),
            flush=True,
        )


if __name__ == "__main__":
    main()
