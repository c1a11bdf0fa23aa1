"""KLD of plans at several goals on text that no stage has seen, in short and long contexts: the default, what it is
made of, and its rivals.

python tests/bench/plans.py MODEL.gguf [--bits 4.5,3.5,3.25,2.75] [--ways
default,no-mean,no-scale,no-basis,no-trellis,before,no-layers,error,paper] [-f TEXT]
    [--contexts 2048x8,8192x1] [--shared-bits 4.5,3.25] [--chunks 4] [--trials N] [--on-copy] [--save DIR]

default      what `kvtuner-gguf calibrate` searches, without its proof
no-mean      K keeps its mean     no-scale  K is not scaled     no-basis  the same bits all over a head
no-trellis   q2_64, q3_64, q4_0 and iq4_nl in place of t2_64, t3_64 and t4_64
before       no basis, no trellis: what plans were made of before there was either
no-layers    the best uniform pair of all types, with K conditioned
error        the solver's plan by squared errors alone: no run has told what a layer matters
paper        --method paper
Rows below: the best uniform pair with K as stock caches it, of all types within the goal, and stock's own pairs; on as
much of the text as shows them to be broken, if they are.
"predicted" is the KLD that the fitted prices foretell on the text of the search, "search" what a run measured there.
Records stay in --work, so that a run that was stopped goes on. --shared-bits: goals of the ways other than default.
--on-copy: the proof, too, runs on the copy that the search runs on, if there is one. --save: the plans as sidecars.
"""

from __future__ import annotations

import argparse
import re
import time
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

import kvtuner_gguf
from kvtuner_gguf.calibrate.checks import plannable_of
from kvtuner_gguf.calibrate.goals import WithinBits
from kvtuner_gguf.calibrate.jobs import is_broken
from kvtuner_gguf.calibrate.kld import make_reference, measure
from kvtuner_gguf.calibrate.kld_model import KldModel, fit
from kvtuner_gguf.calibrate.measured import Bench, measure_model
from kvtuner_gguf.calibrate.methods import known_trials
from kvtuner_gguf.calibrate.options import DEFAULT_TYPES, Options
from kvtuner_gguf.calibrate.pipeline import search, sizes_of
from kvtuner_gguf.calibrate.runs import SEARCH, on_all_of, runs_name, tag
from kvtuner_gguf.calibrate.solve import solve
from kvtuner_gguf.calibrate.store import Store
from kvtuner_gguf.calibrate.text import chunks_of, read_text, write_text
from kvtuner_gguf.calibrate.weights import search_session
from kvtuner_gguf.kvectors import KVectors, where_quantized
from kvtuner_gguf.pair import Pair
from kvtuner_gguf.runtime import Session

Plan = tuple[str, tuple[Pair, ...], tuple[KVectors, ...], str]  # name, pairs, vectors, what the search said
STOCK = ("q8_0/q8_0", "q5_1/q5_1", "iq4_nl/iq4_nl", "q4_0/q4_0")
FIXED: dict[str, dict[str, Any]] = {
    "no-mean": {"k_mean": False},
    "no-scale": {"k_scale": False},
    "no-basis": {"k_basis": False},
    "no-trellis": {"types": tuple(t for t in DEFAULT_TYPES if t not in ("t4_64", "t3_64", "t2_64"))},
    "before": {"k_basis": False, "types": tuple(t for t in DEFAULT_TYPES if t[0] not in "tk")},
    "paper": {"method": "paper"},
}


class Shown:
    """Progress: what takes how long."""

    @contextmanager
    def bar(self, title: str, total: int):
        start = time.monotonic()
        yield lambda n: None
        print(f"    {title}: {time.monotonic() - start:.0f} s", flush=True)

    def say(self, text: str) -> None:
        print(text)


def plans_of(way: str, bits: float, options: argparse.Namespace, session: Session, work: Path) -> list[Plan]:
    """The plan of this way, and with it the best uniform pair as stock caches K if the way is the default."""
    asked = Options(
        options.model,
        WithinBits(bits),
        n_chunk=options.chunks,
        n_trials=options.trials,
        **FIXED.get(way, {}),
    )
    known = plannable_of(asked, sizes_of(asked))
    store = Store(work)
    bench = Bench(session, store, work, Shown())
    measured = measure_model(asked, known, bench)
    geometry = measured.priced(known.geometry)
    k_vectors, name = measured.k_vectors, f"{bits:g} {way}"
    kld_model, what = KldModel.of(measured.errors, geometry), runs_name(SEARCH, session, asked.model) + tag(k_vectors)
    budget = known.goal.n_bytes - measured.spent

    def plan(pairs: tuple[Pair, ...], said: str) -> Plan:
        return name, pairs, where_quantized(k_vectors, pairs), said

    if way == "error":
        return [plan(solve(kld_model, kld_model.prices(np.ones(2 * len(kld_model.il))), budget), "")]
    if way == "no-layers":
        uniform = [(p, q) for p, q in store.evaluations.of(what) if len({p[il] for il in kld_model.il}) == 1]
        kld, pairs = min((q.kld_mean, p) for p, q in uniform if geometry.bytes(p) <= budget)
        return [plan(pairs, f"search {kld:.4f}")]
    found = search(asked, known, measured, bench)
    said = f"search {found.best.kld:.4f}"
    if way != "paper":
        of_others = [
            t
            for t in known_trials(kld_model, on_all_of(store.evaluations.of(what), known.sizes.n_searched), geometry)
            if t != found.best
        ]
        said = f"predicted {fit(kld_model, of_others).kld(found.best.pairs):.4f} {said}"
    plans = [plan(found.best.pairs, said)]
    if way == "default":
        best = min((t for t in found.uniform if known.goal.allows(t.n_bytes)), key=lambda t: t.kld, default=None)
        if best:
            plans.append((f"{bits:g} best uniform, {best.uniform_pair}", best.pairs, (), f"search {best.kld:.4f}"))
    return plans


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--bits", default="4.5,3.5,3.25,2.75")
    parser.add_argument("--ways", default="default,no-mean,no-scale,no-basis,no-trellis,no-layers,error,paper")
    parser.add_argument("--shared-bits", help="goals of the ways other than default; by default all")
    parser.add_argument("--contexts", default="2048x8,8192x1")
    parser.add_argument("--work", type=Path, help="folder of records; by default a temporary one")
    parser.add_argument(
        "-f",
        "--file",
        type=Path,
        help="text of the proof: another one than that of the calibration, which the model writes",
    )
    parser.add_argument("--chunks", type=int, default=4, help="of the calibration")
    parser.add_argument("--trials", type=int, help="runs of each search")
    parser.add_argument("--on-copy", action="store_true")
    parser.add_argument("--save", type=Path, help="folder for the plans, as sidecars")
    options = parser.parse_args()
    with TemporaryDirectory() as tmp:
        work = options.work or Path(tmp)
        work.mkdir(parents=True, exist_ok=True)
        with search_session(options.model, work, n_threads=None, n_gpu_layers=0, say=print) as session:
            plans = searched(options, session, work)
            if options.save:
                save(options.save, plans)
            if options.on_copy:
                prove(options, session, work, plans)
        if not options.on_copy:
            with Session(options.model) as session:
                prove(options, session, work, plans)


def searched(options: argparse.Namespace, session: Session, work: Path) -> list[Plan]:
    """The plans of all ways and goals, and stock's pairs."""
    plans: dict[str, Plan] = {}
    for way in options.ways.split(","):
        for bits in (options.shared_bits or options.bits if way != "default" else options.bits).split(","):
            print(f"{bits} {way}", flush=True)
            plans |= {p[0]: p for p in plans_of(way, float(bits), options, session, work)}
    has_kv = session.geometry(1024).values_k
    stock = [(pair, tuple(Pair.parse(pair) if k else Pair("", "") for k in has_kv), (), "") for pair in STOCK]
    return [*plans.values(), *stock]


def save(folder: Path, plans: list[Plan]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, pairs, vectors, _ in plans:
        sidecar = kvtuner_gguf.Plan(pairs, k_vectors=vectors).to_json()
        (folder / f"{re.sub('[^0-9a-z.]+', '-', name)}.json").write_text(sidecar)


def prove(options: argparse.Namespace, session: Session, work: Path, plans: list[Plan]) -> None:
    """A table of the plans for each context."""
    geometry = session.geometry(Options(options.model).n_ctx)
    for context in filter(None, options.contexts.split(",")):
        n_ctx, n_chunk = map(int, context.split("x"))
        if options.file:
            tokens = read_text(session, options.file, 0, n_ctx * n_chunk).heldout
        else:
            tokens = write_text(session, 0, n_ctx * n_chunk, stream=n_ctx, seed=12345).heldout
        chunks = chunks_of(tokens, n_ctx, n_chunk, "text")
        reference = make_reference(session, chunks, work / "proof.f16")
        floor = measure(session, None, reference, flash_attn=False)
        print(
            f"\ncontexts of {n_ctx}: {chunks.n_positions} scored positions; f16 by the other kernel "
            f"{floor.kld_mean:.5f}, same top {floor.same_top:.1%}"
        )
        print(
            f"{'plan':36}{'bits':>7}{'mean KLD':>11}{'+-':>9}{'99.9 %':>9}{'same top':>10}  on the text of the search"
        )
        for name, pairs, vectors, said in plans:
            quality = measure(session, pairs, reference, k_vectors=vectors, enough=None if vectors else is_broken)
            if quality.n_positions < chunks.n_positions:
                said += f" ({quality.n_positions} positions)"
            bits = geometry.bits_per_value(pairs, vectors)
            print(
                f"{name:36}{bits:7.2f}{quality.kld_mean:11.5f}{quality.kld_se:9.5f}{quality.kld_p999:9.3f}"
                f"{quality.same_top:10.1%}  {said}",
                flush=True,
            )
        (work / "proof.f16").unlink()


if __name__ == "__main__":
    main()
