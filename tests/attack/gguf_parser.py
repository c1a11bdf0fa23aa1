"""Damaged GGUFs in Python: each is refused with a PlanError and stays as it was, or takes a plan, and gives it up
again, unharmed."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

from fault import need
from models import tiny_llama
from mutate import Base, damaged
from small_gguf import PLAN, make_model

from kvtuner_gguf.errors import PlanError
from kvtuner_gguf.gguf_file import read_plan, weights_hash, write_plan
from kvtuner_gguf.gguf_header import Header, read_header
from kvtuner_gguf.pair import Pair
from kvtuner_gguf.plan import Plan


class Attack:
    def __init__(self, folder: Path) -> None:
        self.path = folder / "input" / "model.gguf"
        self.copy, self.stripped, self.again = (folder / f"{name}.gguf" for name in ("copy", "stripped", "again"))
        plain = make_model(folder / "a.gguf")
        files = [
            plain,
            write_plan(plain, PLAN, folder / "b.gguf"),
            make_model(folder / "c.gguf", alignment=64),
            make_model(folder / "d.gguf", n_tensors=0),
        ]
        self.bases = [
            Base.of(path)
            for path in (*files, make_model(folder / "e.gguf", split=(0, 2)), tiny_llama(folder / "f.gguf", n_layer=1))
        ]
        self.weights = [6, 6, 3, 1, 1, 1]

    def attempt(self, rng: random.Random) -> str:
        data = damaged(rng, rng.choices(self.bases, self.weights, k=2))
        self.path.write_bytes(data)
        header = _or_refused(lambda: read_header(self.path))
        read = _or_refused(lambda: read_plan(self.path))
        digest = _or_refused(lambda: weights_hash(self.path))
        plan = (
            Plan.uniform(Pair("q8_0", "q4_0"), min(header.block_count or 1, 1000))
            if isinstance(header, Header)
            else PLAN
        )
        for path in (self.copy, self.stripped, self.again):
            path.unlink(missing_ok=True)
        written = _or_refused(lambda: write_plan(self.path, plan, self.copy))
        need(self.path.read_bytes() == data, "write_plan changed the file that it read")
        if not isinstance(header, Header):
            refused = all(isinstance(one, PlanError) for one in (read, digest, written))
            need(refused and not self.copy.exists(), f"read_header refuses it ({header}), others do not")
            return "refused"
        if isinstance(written, PlanError):
            need(not self.copy.exists(), "a refused write left a file")
            return "read, takes no plan"
        self._unharmed(plan, header)
        return "took a plan"

    def _unharmed(self, plan: Plan, before: Header) -> None:
        """The copy has the plan, all else of the file, and gives the same file when it is stripped as the original
        gives."""
        after = read_header(self.copy)
        need(read_plan(self.copy) == plan, "the plan does not read back as it was written")
        tensors = [
            [(t.name, t.type_name, t.shape, t.n_bytes, t.offset - h.data_offset) for t in h.tensors]
            for h in (before, after)
        ]
        need(tensors[0] == tensors[1], "the tensor table changed")
        need(_data(self.path, before) == _data(self.copy, after), "the tensor data changed")
        write_plan(self.path, None, self.stripped)
        write_plan(self.copy, None, self.again)
        need(self.stripped.read_bytes() == self.again.read_bytes(), "stripped, the copy is not the stripped original")


def _data(path: Path, header: Header) -> bytes:
    return path.read_bytes()[header.data_offset :]


def _or_refused(call: Callable[[], object]) -> object:
    """What call returns, or the PlanError that it raises."""
    try:
        return call()
    except PlanError as e:
        need(len(str(e)) < 2000 and str(e).isprintable(), f"an error that garbles a terminal: {str(e)!r:.3000}")
        return e
