"""The order of a calibration: measure the model, search, prove, and name the plan."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from kvtuner_gguf.cache import scratch
from kvtuner_gguf.calibrate.checks import Plannable, check_room, check_text, plannable_of
from kvtuner_gguf.calibrate.corpus import readable
from kvtuner_gguf.calibrate.crew import Crew
from kvtuner_gguf.calibrate.estimate import seconds
from kvtuner_gguf.calibrate.goals import Search
from kvtuner_gguf.calibrate.jobs import Weights
from kvtuner_gguf.calibrate.kld import N_UBATCH
from kvtuner_gguf.calibrate.kld_model import KldModel, fit
from kvtuner_gguf.calibrate.measured import TEXT, Bench, Measured, heldout_reference, measure_model, search_reference
from kvtuner_gguf.calibrate.methods import fitted, known_trials, paper
from kvtuner_gguf.calibrate.options import Options, Outcome, Point, Solved
from kvtuner_gguf.calibrate.progress import OWN_WEIGHTS, PAPER_STAGES, STAGES, Progress, Staged, about
from kvtuner_gguf.calibrate.proof import best_rivals, prove, prove_own
from kvtuner_gguf.calibrate.results import Trial
from kvtuner_gguf.calibrate.runs import COPY, FLOOR, HELDOUT, PART, SEARCH, Runs, on_all_of, runs_name, tag
from kvtuner_gguf.calibrate.sizes import Sizes
from kvtuner_gguf.calibrate.solve import cheapest, front, sensitivities, uniform_pairs
from kvtuner_gguf.calibrate.store import Store, claimed, work_dir
from kvtuner_gguf.calibrate.weights import copy_type, search_session
from kvtuner_gguf.calibrate.write import made_of, plan_of
from kvtuner_gguf.identity import weights_sample
from kvtuner_gguf.kept import write_about
from kvtuner_gguf.kvectors import where_quantized
from kvtuner_gguf.pair import Pairs
from kvtuner_gguf.quality import Comparison
from kvtuner_gguf.runtime import Session

STREAM = 1024  # tokens of a piece of text: of a captured and of a held-out chunk
SEARCH_CTX = 1024  # tokens of a chunk that plans are tried on: layers matter otherwise in a short context
SEARCH_EVERY = 2  # of the scored positions, each so-many-th: neighbours tell much the same, and each is a row of logits
LEAST_KNOWN = 8  # runs from which prices can be told


@dataclass(frozen=True)
class Found:
    """What a search ends with.

    best     the plan, without K's vectors
    uniform  the uniform plans that it competes with, whose K is cached as stock does it
    """

    best: Trial
    uniform: tuple[Trial, ...]


def calibrate(options: Options, progress: Progress) -> Outcome:
    """Measure the model, find a plan for the goal, and prove it on held-out text. Writes nothing but its own records.

    Raises CalibrationError if the goal cannot be met, the text is too short, there is no room, or the same is being
    calibrated already; all that can be known before the first stage is looked at before it.
    """
    plannable = plannable_of(options, sizes_of(options))
    with readable(options.text) as text, scratch() as folder:
        options = replace(options, text=text)
        check_text(options.text, plannable.sizes.n_calibration + plannable.sizes.n_heldout)
        check_room(folder, plannable.scratch_bytes)
        work = _work(options)
        with claimed(work):
            if options.fresh:
                shutil.rmtree(work, ignore_errors=True)
            write_about(work, options.model)
            staged = Staged(progress, PAPER_STAGES if options.method == "paper" else STAGES)
            with crew_of(options, progress) as crew:
                return _calibrate(options, plannable, Store(work), folder, staged, crew)


@contextmanager
def crew_of(options: Options, progress: Progress) -> Iterator[Crew | None]:
    """The workers that are asked for."""
    if options.workers is None:
        yield None
        return
    with Crew(options.workers, progress.say) as crew:
        yield crew


def weights_of(options: Options, copy: str | None) -> Weights:
    """The model, or its copy of that type, as workers are told of it."""
    sizes = options.n_threads, options.n_gpu_layers
    return Weights(os.path.abspath(options.model), weights_sample(options.model), copy, *sizes)


def _calibrate(
    options: Options, plannable: Plannable, store: Store, folder: Path, progress: Staged, crew: Crew | None
) -> Outcome:
    threads: dict[str, Any] = {"n_threads": options.n_threads, "n_gpu_layers": options.n_gpu_layers}

    def timed(own: Session, *per_token: float) -> None:
        of_stages = seconds(options, plannable, own, *per_token)
        progress.expect(of_stages)
        progress.say(f"all of it: {about(sum(of_stages.values()))}, with nothing beside it")

    known = (store.folder / TEXT).exists()
    begins = "going on with what was measured before; --fresh measures anew" if known else "Ctrl-C loses nothing"
    progress.say(f"calibrate {options.model.name}: {begins}")
    how: dict[str, Any] = {"may_copy": plannable.goal.on_copy, "say": progress.say, "timed": None if known else timed}
    with search_session(options.model, store.folder, **threads, **how, scratch=folder) as session:
        on_copy = session.path != options.model
        if not on_copy:
            progress.without(OWN_WEIGHTS)
        weights = weights_of(options, copy_type(session, options.model, store.folder))
        bench = Bench(session, store, folder, progress, (crew, weights) if crew else None)
        measured = measure_model(options, plannable, bench)
        outcome = proved(options, plannable, measured, search(options, plannable, measured, bench), bench)
        if not on_copy:
            return outcome
    with Session(options.model, **threads) as session:
        crew_of_own = (crew, replace(weights, copy=None)) if crew else None
        return with_own(outcome, options, plannable, measured, replace(bench, session=session, crew=crew_of_own))


def search(options: Options, plannable: Plannable, measured: Measured, bench: Bench) -> Found:
    """The plan found on the search's text, and what it competes with. Raises CalibrationError if none is within the
    goal."""
    geometry, goal, spent = measured.priced(plannable.geometry), plannable.goal, measured.spent
    kld_model = KldModel.of(measured.errors, geometry)
    goal.check(geometry, cheapest(kld_model) + spent)
    uniform = uniform_pairs(kld_model, geometry, goal.max_bytes)
    reference = search_reference(plannable, measured.text, bench)
    name = runs_name(SEARCH, bench.session, options.model)
    runs = Runs(bench.session, reference, bench.store.evaluations, name, measured.k_vectors, bench.crew)

    def ahead(plans: Iterable[Pairs]) -> None:
        runs.ahead(bench.progress, klds=plans)

    hand_out = ahead if bench.crew else None
    by = Search(geometry, spent, options.n_trials, options.seed, bench.progress, hand_out)
    if options.method == "paper":
        best = paper(measured.errors, options.candidate_types, runs.kld, goal, by)
    else:
        best = fitted(kld_model, uniform, runs.kld, goal, by)
    runs.ahead(bench.progress, stock=uniform)
    rivals = []
    with bench.progress.bar("search: uniform pairs as stock has them", len(uniform)) as advance:
        for pairs in uniform:
            rivals.append(Trial.of(pairs, runs.of_stock(pairs).kld_mean, geometry))
            advance(1)
    reference.discard()
    return Found(best, tuple(rivals))


def proved(options: Options, plannable: Plannable, measured: Measured, found: Found, bench: Bench) -> Outcome:
    """The plan on held-out text, and the plan to be written: the best uniform pair's, if it lost to that."""
    geometry, session = plannable.geometry, bench.session
    reference = heldout_reference(plannable, measured.text, bench, n_chunk=plannable.sizes.n_chunk)
    name = runs_name(HELDOUT, session, options.model)
    runs = Runs(session, reference, bench.store.evaluations, name, measured.k_vectors, bench.crew)
    allowed = max(found.best.n_bytes, plannable.goal.max_bytes or 0) + measured.spent
    supported = session.supported(("q8_0", "q4_0")).values()
    proof = prove(
        found.best,
        best_rivals(found.uniform, allowed),
        runs,
        geometry,
        named=[t for t in ("q8_0", "q4_0") if all(t in k for k, _ in supported)],
        seed=options.seed,
        progress=bench.progress,
        ahead=partial(runs.ahead, bench.progress),
    )
    reference.discard()
    copied = copy_type(session, options.model, bench.store.folder)
    made = made_of(options, measured.text, rotated=_rotates(session), proof_weights=copied)
    if proof.lost_to:
        quality, uniform = proof.lost_to
        plan = plan_of(uniform.pairs, (), geometry, made, quality, proof.best)
    else:
        pairs = found.best.pairs
        plan = plan_of(pairs, runs.vectors_of(pairs), geometry, made, proof.quality, proof.best)
    chunks = reference.chunks
    table = Comparison(measured.text.name, chunks.n_positions, chunks.n_ctx, options.n_ctx, proof.rows, weights=copied)
    return Outcome(plan, found.best.pairs, proof.beside, table, geometry)


def with_own(outcome: Outcome, options: Options, plannable: Plannable, measured: Measured, bench: Bench) -> Outcome:
    """What was proved on a copy, with the plan and the noise floor on the model itself, on a part of the text."""
    n_chunk = plannable.sizes.n_own
    reference = heldout_reference(plannable, measured.text, bench, n_chunk=n_chunk, title="own weights: f16 reference")
    runs = Runs(bench.session, reference, bench.store.evaluations, HELDOUT + PART, measured.k_vectors, bench.crew)
    own = prove_own(outcome.plan, runs, plannable.geometry, bench.progress)
    reference.discard()
    return replace(outcome, comparison=replace(outcome.comparison, own=own))


def solve_saved(options: Options, progress: Progress) -> Solved:
    """Another goal from what `calibrate` measured with the same options: no run is made, and nothing is proved.

    Raises CalibrationError if nothing was measured, or the goal cannot be met.
    """
    plannable = plannable_of(options, sizes_of(options))
    with readable(options.text) as text, Session(options.model, no_alloc=True) as session:
        options = replace(options, text=text)
        store = Store(_work(options), read_only_of=options.model)
        measured = measure_model(options, plannable, Bench(session, store, store.folder, progress))
        return solved(options, plannable, measured, store, rotated=_rotates(session))


def solved(options: Options, plannable: Plannable, measured: Measured, store: Store, *, rotated: bool) -> Solved:
    """The plan of the goal by the runs of any search of these records, and the whole front."""
    geometry, k_vectors = measured.priced(plannable.geometry), measured.k_vectors
    spent, runs = measured.spent, store.evaluations
    kld_model = KldModel.of(measured.errors, geometry)
    plannable.goal.check(geometry, cheapest(kld_model) + spent)
    by_search = {
        name: known_trials(kld_model, on_all_of(runs.of(name + tag(k_vectors)), plannable.sizes.n_searched), geometry)
        for name in (SEARCH, SEARCH + COPY)
    }
    name, known = max(by_search.items(), key=lambda item: len(item[1]))
    floors = [q for part in ("", PART) for _, q in runs.of(HELDOUT + part + FLOOR)]
    ended = bool(floors)  # a search of few types may have few plans to try
    if len(known) < LEAST_KNOWN and not (known and ended):
        store.check_writable(runs.path)
    found = fit(kld_model, known)
    if name == SEARCH + COPY:  # whose floor is lower than the model's
        found = replace(found, floor=max([found.floor, *(q.kld_mean for q in floors)]))
    pairs = plannable.goal.solve(found, spent)
    plan = plan_of(pairs, where_quantized(k_vectors, pairs), geometry, made_of(options, measured.text, rotated=rotated))
    points = [(p, kld, where_quantized(k_vectors, p)) for p, kld in front(found)]
    rows = [Point(geometry.bits_per_value(p, v), geometry.bytes(p, v), kld) for p, kld, v in points]
    return Solved(plan, found.kld(pairs), tuple(rows), plannable.geometry, sensitivities(found))


def sizes_of(options: Options) -> Sizes:
    """Of the text that the stages work on, before they are made to fit the model."""
    return Sizes(options.n_chunk, STREAM, SEARCH_CTX, SEARCH_EVERY)


def _work(options: Options) -> Path:
    return work_dir(options, N_UBATCH, STREAM, SEARCH_CTX, SEARCH_EVERY)


def _rotates(session: Session) -> bool:
    """Whether the run time rotates K or V of any layer."""
    return any(any(sides) for sides in session.rotation().values())
