"""All stages in order: text, capture, condition, error, prune, cluster, search, prove, write. The only file that
imports a stage."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

from kvtuner_gguf import native
from kvtuner_gguf.cache import scratch
from kvtuner_gguf.calibrate.capture import capture
from kvtuner_gguf.calibrate.checks import Shape, cheapest_bytes, check_budget, check_room, check_text, shape_of
from kvtuner_gguf.calibrate.cluster import cluster
from kvtuner_gguf.calibrate.condition import condition
from kvtuner_gguf.calibrate.corpus import readable
from kvtuner_gguf.calibrate.error import attention_scores, error_table, k_error
from kvtuner_gguf.calibrate.kld import N_UBATCH, Chunks, Reference, make_reference, measure
from kvtuner_gguf.calibrate.kld_model import KldModel, fit
from kvtuner_gguf.calibrate.nsga2 import nsga2
from kvtuner_gguf.calibrate.options import IN_PLACE_OF, PAPER_TRIALS, Options, Outcome, Point, Solved
from kvtuner_gguf.calibrate.prices import N_FLOOR, floor_plans, price, price_ladders, replaced
from kvtuner_gguf.calibrate.proof import HELDOUT_FLOOR, prove
from kvtuner_gguf.calibrate.prune import pareto_menus
from kvtuner_gguf.calibrate.results import Conditions, ErrorTable, Trial, Trials
from kvtuner_gguf.calibrate.samples import Capture
from kvtuner_gguf.calibrate.sizes import Sizes
from kvtuner_gguf.calibrate.solve import cheapest, fewest_bytes, front, kld_search, refine, solve, uniform_pairs
from kvtuner_gguf.calibrate.store import EvaluationCache, claimed, work_dir
from kvtuner_gguf.calibrate.text import Text, chunks_of, read_text, write_text
from kvtuner_gguf.calibrate.weights import search_session
from kvtuner_gguf.codecs import codec
from kvtuner_gguf.errors import CalibrationError
from kvtuner_gguf.gguf_file import weights_hash
from kvtuner_gguf.kvectors import KVectors, vector_bytes, where_quantized
from kvtuner_gguf.pair import Pair
from kvtuner_gguf.plan import Plan
from kvtuner_gguf.quality import Quality
from kvtuner_gguf.runtime import Session

STREAM = 1024  # tokens of a piece of text: of a captured and of a held-out chunk
JUDGED_BITS = (
    4.5  # of the type of K that conditioning is judged with: an error of a rotated type has the same shape at all bits
)
SEARCH_CTX = 512  # tokens of a chunk that plans are tried on
SEARCH_SKIP = 128  # of them not scored: three chunks tell as much as four whose second half is
SEARCH, SEARCH_COPY = "search", "search-copy"  # runs in the records
N_REFINE = 14  # runs of the default method around the goal, once the layers are priced


class Progress(Protocol):
    """What the pipeline tells the user with."""

    def bar(self, title: str, total: int) -> Any:
        """Context manager that gives a function advance(n)."""

    def say(self, text: str) -> None:
        """One line."""


def calibrate(options: Options, progress: Progress) -> Outcome:
    """Measure the model, find a plan for the goal, and prove it on held-out text. Writes nothing but its own records.

    Raises CalibrationError if the goal cannot be met, the text is too short, there is no room, or the same is being
    calibrated already; all that can be known before the first stage is looked at before it.
    """
    known = shape(options)
    with readable(options.text) as text, scratch() as folder:
        options = replace(options, text=text)
        check_text(options.text, known.sizes.n_calibration + known.sizes.n_heldout)
        check_room(folder, known.scratch_bytes)
        work = _work(options)
        with claimed(work):
            if not options.resume:
                shutil.rmtree(work, ignore_errors=True)
            return _calibrate(options, progress, known, work, folder)


def _calibrate(options: Options, progress: Progress, known: Shape, work: Path, folder: Path) -> Outcome:
    threads = {"n_threads": options.n_threads, "n_gpu_layers": options.n_gpu_layers}
    may_copy = (
        options.goal.max_kld is None
    )  # a KLD that is asked for is one of the model itself, with its own noise floor
    with search_session(options.model, work, **threads, may_copy=may_copy, say=progress.say, scratch=folder) as session:
        run = Run(options, session, progress, known, work, folder)
        text = run.text()
        found, uniform = run.searched(text)
        outcome = None if run.on_copy else run.proved(text, found, uniform)
    if outcome is None:  # what was searched on a copy is proved on the model itself
        with Session(options.model, **threads) as session:
            run.session = session
            outcome = run.proved(text, found, uniform)
    return outcome


def solve_saved(options: Options, progress: Progress) -> Solved:
    """Another goal from what `calibrate` measured with the same options: no run is made, and nothing is proved.

    Raises CalibrationError if nothing was measured, or the goal cannot be met.
    """
    known = shape(options)
    with readable(options.text) as text, Session(options.model, no_alloc=True) as session:
        options = replace(options, text=text)
        return Run(options, session, progress, known, _work(options), None).solved()


def _work(options: Options) -> Path:
    return work_dir(options, N_UBATCH, STREAM, SEARCH_CTX, SEARCH_SKIP)


def shape(options: Options) -> Shape:
    """What is known before the first stage. Raises CalibrationError if no plan can meet the goal, NativeError."""
    return shape_of(options, Sizes(options.n_chunk, STREAM, SEARCH_CTX, SEARCH_SKIP))


class Run:
    """One calibration in progress: its records, made when a stage asks for them.

    work     folder of what is kept: records
    scratch  folder of what is not: captured tensors, references; None = nothing is measured, records are only read
    """

    def __init__(
        self, options: Options, session: Session, progress: Progress, shape: Shape, work: Path, scratch: Path | None
    ) -> None:
        self.options, self.session, self.progress, self.work, self.scratch = options, session, progress, work, scratch
        self.shape, self.geometry, self.sizes = shape, shape.geometry, shape.sizes
        self.max_bytes = options.goal.max_bytes(self.geometry)
        self.cache = EvaluationCache(work / "evaluations.jsonl")
        self.k_vectors: tuple[KVectors, ...] = ()

    def only_saved(self, path: Path) -> None:
        """Raises CalibrationError if this run may not measure, so that `path` cannot be made."""
        if self.scratch is None:
            raise CalibrationError(
                f"model '{self.options.model}' was not measured with these options ({path} is missing or damaged). "
                f"Run first: kvtuner-gguf calibrate {self.options.model} -o plan.json"
            )

    def record(self, kind: Any, name: str, make: Callable[[], Any]) -> Any:
        """The record of this name and kind: as it was kept, or, where there is none that reads, made and kept."""
        path = self.work / name
        with suppress(CalibrationError):
            return kind.load(path)
        self.only_saved(path)
        found = make()
        found.save(path)
        return found

    # text, capture, error

    def text(self) -> Text:
        def make() -> Text:
            n_calibration, n_heldout = self.sizes.n_calibration, self.sizes.n_heldout
            if self.options.text:
                return read_text(self.session, self.options.text, n_calibration, n_heldout, self.progress.say)
            with self.progress.bar("text: the model writes", n_calibration + n_heldout) as advance:
                return write_text(
                    self.session,
                    n_calibration,
                    n_heldout,
                    stream=self.sizes.stream,
                    seed=self.options.seed,
                    progress=advance,
                )

        return self.record(Text, "text.npz", make)

    def conditions(self, text: Text) -> Conditions:
        """How each layer's K is conditioned, by what it does to a type of about JUDGED_BITS, whatever the goal."""
        mean, scale = self.options.conditioning
        if not (mean or scale):
            return Conditions((KVectors(),) * self.session.n_layer, {})
        quantized = {il: [t for t in k if codec(t).block_size > 1] for il, (k, _) in self.types_of_layers().items()}
        judged = {
            il: min(k, key=lambda t: abs(codec(t).bits_per_value - JUDGED_BITS)) for il, k in quantized.items() if k
        }

        def make() -> Conditions:
            captured = self.captured(text)
            with self.progress.bar("condition: K without its mean, scaled", len(captured.il)) as advance:
                error = partial(k_error, round_trip=native.round_trip)
                return condition(
                    captured,
                    error,
                    lambda s: attention_scores(s, s.k),
                    judged,
                    mean=mean,
                    scale=scale,
                    progress=advance,
                )

        name = f"conditions-{self.options.n_ctx}-{mean:d}{scale:d}-{'-'.join(dict.fromkeys(judged.values()))}.json"
        return self.record(Conditions, name, make)

    def affordable_vectors(self, text: Text) -> tuple[KVectors, ...]:
        """The vectors of K; none where the goal has no room for them beside the cheapest plan."""
        found = self.conditions(text).k_vectors
        if self.max_bytes is None or self.max_bytes - vector_bytes(found) >= cheapest_bytes(
            self.geometry, self.shape.types
        ):
            return found
        self.progress.say(
            f"K is cached as it is: the vectors that condition it take {vector_bytes(found)} bytes, which this goal "
            "does not have"
        )
        return ()

    def errors(self, text: Text) -> ErrorTable:
        types = self.types_of_layers()

        def make() -> ErrorTable:
            captured = self.captured(text)
            if any("f16" not in k or "f16" not in v for k, v in types.values()):
                raise CalibrationError("some layers cannot be set to f16. This model is not supported.")
            with self.progress.bar("error: K and V after each type", len(captured.il) * captured.n_sample) as advance:
                return error_table(captured, types, native.round_trip, lambda done, total: advance(1), self.k_vectors)

        names = dict.fromkeys(name for sides in types.values() for side in sides for name in side)
        return self.record(ErrorTable, f"errors-{'-'.join(names)}{self.tag}.json", make)

    def types_of_layers(self) -> dict[int, tuple[tuple[str, ...], tuple[str, ...]]]:
        """il -> K types and V types to choose from. Those that were not asked for by name are dropped where a cheaper
        one does."""
        types = self.session.supported(tuple(dict.fromkeys(("f16", *self.options.candidate_types))))
        if self.options.types:
            return types

        def kept(side: tuple[str, ...]) -> tuple[str, ...]:
            return tuple(t for t in side if IN_PLACE_OF.get(t) not in side)

        return {il: (kept(k), kept(v)) for il, (k, v) in types.items()}

    def captured(self, text: Text) -> Capture:
        path = self.scratch / "capture"
        if (path / Capture.INDEX).exists():  # of an earlier stage of this run
            return Capture.load(path)
        chunks = chunks_of(text.calibration, self.sizes.stream, self.sizes.n_captured, "calibration text")
        with self.progress.bar("capture: Q, K, V on an f16 cache", chunks.tokens.size) as advance:
            return capture(self.session, chunks, path, advance, n_ctx=self.options.n_ctx)

    # search, on the second half of the calibration text

    def search_reference(self, text: Text) -> Reference:
        tail = text.calibration[len(text.calibration) // 2 :]
        sizes = self.sizes
        return self.reference(
            "search", chunks_of(tail, sizes.search_ctx, sizes.n_searched, "calibration text", sizes.search_skip)
        )

    def reference(self, name: str, chunks: Chunks) -> Reference:
        with self.progress.bar(f"{name}: f16 reference", chunks.n_positions) as advance:
            return make_reference(self.session, chunks, self.scratch / f"{name}.f16", advance)

    @property
    def on_copy(self) -> bool:
        """True while the session is not the model itself but a copy of it."""
        return self.session.path != self.options.model

    @property
    def search(self) -> str:
        """Names the runs of the search in the records: those on a copy of the model stand apart."""
        return SEARCH_COPY if self.on_copy else SEARCH

    @property
    def budget(self) -> int | None:
        """Bytes that are left to the pairs, once the vectors of K are paid."""
        return None if self.max_bytes is None else self.max_bytes - vector_bytes(self.k_vectors)

    @property
    def tag(self) -> str:
        """Names the vectors of K in records; "" without any."""
        text = "".join(f"{il}{v.mean}{v.scale}" for il, v in enumerate(self.k_vectors) if v)
        return "-" + hashlib.sha256(text.encode()).hexdigest()[:12] if text else ""

    def vectors_of(self, pairs: Sequence[Pair]) -> tuple[KVectors, ...]:
        """The vectors of a plan of these pairs."""
        return where_quantized(self.k_vectors, pairs)

    def evaluate(
        self, reference: Reference, what: str, *, stock: bool = False
    ) -> Callable[[tuple[Pair, ...]], Quality]:
        """Quality of a plan on a reference's text, by a real run; one that was measured before is read from the
        records.

        stock: K as it is, as llama.cpp caches it without a plan
        """

        def run(pairs: tuple[Pair, ...]) -> Quality:
            return measure(self.session, pairs, reference, k_vectors=() if stock else self.vectors_of(pairs))

        return partial(self.cache.get, what if stock else what + self.tag, run)

    def searched(self, text: Text) -> tuple[Trial, list[Trial]]:
        """The plan found, and the uniform pairs that it competes with, whose K is cached as stock does it."""
        self.k_vectors = self.affordable_vectors(text)
        errors = self.errors(text)
        shutil.rmtree(self.scratch / "capture", ignore_errors=True)  # large, and of no use from here on
        model = KldModel.of(errors, self.geometry)
        self.affordable(model)
        reference = self.search_reference(text)
        quality = self.evaluate(reference, self.search)
        stock = self.evaluate(reference, self.search, stock=True)

        def kld(pairs: tuple[Pair, ...]) -> float:
            return quality(pairs).kld_mean

        uniform = uniform_pairs(model, self.geometry, self.max_bytes)
        found = (
            self.paper_search(errors, kld)
            if self.options.method == "paper"
            else self.fitted_search(model, uniform, kld)
        )
        with self.progress.bar("search: uniform pairs as stock has them", len(uniform)) as advance:
            rivals = []
            for pairs in uniform:
                rivals.append(Trial.of(pairs, stock(pairs).kld_mean, self.geometry))
                advance(1)
        reference.path.unlink(missing_ok=True)  # likewise
        return found, rivals

    def fitted_search(self, model: KldModel, uniform: list[tuple[Pair, ...]], kld: Callable) -> Trial:
        """The default: runs that price each layer's K and V, then the best plans by these prices, to correct them at
        the goal."""
        n_price, n_refine = 2 * len(model.il) + N_FLOOR, N_REFINE
        if self.options.n_trials is not None:
            rest = max(3, self.options.n_trials - len(uniform))
            n_price, n_refine = 2 * rest // 3, rest - 2 * rest // 3
        floors = floor_plans(model) if n_price > 2 * N_FLOOR else []
        ladders = price_ladders(model, n_price - len(floors))

        def run(pairs: tuple[Pair, ...]) -> Trial:
            return Trial.of(pairs, kld(pairs), self.geometry)

        known = []
        with self.progress.bar(
            "search: price of each layer's K and V", len(uniform) + len(floors) + len(ladders)
        ) as advance:
            for trial in chain(map(run, [*uniform, *floors]), (price(ladder, run) for ladder in ladders)):
                known.append(trial)
                advance(1)
        with self.progress.bar("search: best plans by these prices", n_refine) as advance:
            if self.budget is None:
                goal = self.options.goal.max_kld
                return self.choose(
                    kld_search(model, known, kld, self.geometry, goal, n_trials=n_refine, progress=advance)
                )
            return refine(
                model,
                known,
                kld,
                self.geometry,
                self.budget,
                n_trials=n_refine,
                seed=self.options.seed,
                progress=advance,
            )[1]

    def paper_search(self, errors: ErrorTable, kld: Callable) -> Trial:
        """KVTuner as published: menus by output_error, DBSCAN groups, NSGA-II over (KLD, bits)."""
        only = [i for i, p in enumerate(errors.pairs) if {p.type_k, p.type_v} <= set(self.options.candidate_types)]
        columns = {name: errors.measure(name)[:, only] for name in errors.MEASURES}
        errors = ErrorTable(tuple(errors.pairs[i] for i in only), errors.il, **columns)
        menus = pareto_menus(errors, geometry=self.geometry)
        groups = cluster(errors, menus)
        groups.save(self.work / "groups.json")
        bits = self.geometry.bits_of(self.budget) if self.budget is not None else None
        n_trials = self.options.n_trials or PAPER_TRIALS
        with self.progress.bar("search: real runs (paper)", n_trials) as advance:
            tried = nsga2(
                groups,
                menus,
                kld,
                self.geometry,
                n_trials=n_trials,
                seed=self.options.seed,
                max_bits=bits,
                progress=advance,
            )
        return self.choose(tried)

    def affordable(self, model: KldModel) -> None:
        """Raises CalibrationError if no plan is within the goal's bytes, the vectors of K paid."""
        check_budget(self.options, self.geometry, cheapest(model) + vector_bytes(self.k_vectors))

    def solved(self) -> Solved:
        """The plan of the goal by what was measured for this goal or others, and the whole front."""
        text = self.text()
        self.k_vectors = self.affordable_vectors(text)
        model = KldModel.of(self.errors(text), self.geometry)
        self.affordable(model)
        by_search = {what: self.known(model, what) for what in (SEARCH, SEARCH_COPY)}
        what, known = max(by_search.items(), key=lambda item: len(item[1]))
        if len(known) < 8:
            self.only_saved(self.cache.path)
        x, floor = fit(model, known)
        if what == SEARCH_COPY:  # whose floor is lower than the model's
            floor = max([floor, *(q.kld_mean for _, q in self.cache.of(HELDOUT_FLOOR))])
        points = front(model, x, floor)
        goal = self.options.goal.max_kld
        if self.budget is not None:
            pairs = solve(model, model.prices(x), self.budget)
        else:
            pairs = fewest_bytes(model, model.prices(x), goal - floor)
            if pairs is None:
                raise CalibrationError(
                    f"goal of a KLD of {goal:g}: the rounding of any quantized cache alone costs {floor:.6f}. Allow "
                    "a larger --max-kld."
                )
        rows = [
            Point(self.geometry.bits_per_value(p, v), self.geometry.bytes(p, v), kld)
            for p, kld in points
            for v in [self.vectors_of(p)]
        ]
        predicted = floor + float(model.features(pairs) @ x)
        return Solved(self.final_plan(text, pairs, self.vectors_of(pairs)), predicted, tuple(rows), self.geometry)

    def known(self, model: KldModel, what: str) -> list[Trial]:
        """The runs of a search, of these types and vectors, that tell prices."""
        runs = self.cache.of(what + self.tag)
        trials = [
            Trial.of(pairs, q.kld_mean, self.geometry)
            for pairs, q in runs
            if {pairs[il] for il in model.il} <= {*model.column}
        ]
        return [t for t in trials if not replaced(t)]

    # prove

    def proved(self, text: Text, found: Trial, uniform: list[Trial]) -> Outcome:
        """The plan on held-out text, beside the two uniform pairs of its bytes that did best in the search."""
        chunks = chunks_of(text.heldout, self.sizes.stream, len(text.heldout) // self.sizes.stream, "held-out text")
        reference = self.reference("heldout", chunks)
        allowed = max(found.n_bytes, self.max_bytes or 0) + vector_bytes(self.k_vectors)
        rivals = sorted((t for t in uniform if t.n_bytes <= allowed), key=lambda t: t.kld)[:2]
        proof = prove(self, found, rivals, reference, text.name)
        if proof.won:
            written = found.pairs, self.vectors_of(found.pairs), proof.quality
        else:
            written = proof.best[1].pairs, (), proof.best[0]
        return Outcome(
            self.final_plan(text, *written, proof.best), found.pairs, proof.won, proof.comparison, self.geometry
        )

    def choose(self, trials: Trials) -> Trial:
        """The best trial within the goal. Raises CalibrationError if none is."""
        goal = self.options.goal.max_kld
        if goal is not None:
            within = [t for t in trials.trials if t.kld <= goal]
            if not within:
                best = min(t.kld for t in trials.trials)
                raise CalibrationError(
                    f"goal of a KLD of {goal:g}: the best plan tried has {best:.6f}. Allow a larger --max-kld."
                )
            return min(within, key=lambda t: (t.n_bytes, t.kld))
        within = [t for t in trials.trials if t.n_bytes <= self.budget]
        return min(within, key=lambda t: (t.kld, t.n_bytes))

    def final_plan(
        self,
        text: Text,
        pairs: tuple[Pair, ...],
        k_vectors: tuple[KVectors, ...],
        quality: Quality | None = None,
        rival: tuple[Quality, Trial] | None = None,
    ) -> Plan:
        from kvtuner_gguf import __version__

        rotated = any(any(r) for r in self.session.rotation().values())
        return Plan(
            pairs=pairs,
            bits_per_value=self.geometry.bits_per_value(pairs, k_vectors),
            k_vectors=k_vectors,
            quality=quality,
            rival=rival[1].uniform_pair if rival else None,
            rival_quality=rival[0] if rival else None,
            rival_bits=rival[1].bits_per_value if rival else None,
            calibration={
                "method": self.options.method,
                "text": text.name,
                "text_sha256": text.sha256,
                "tokens": int(text.calibration.size),
                "n_ctx": self.options.n_ctx,
                "seed": self.options.seed,
                "version": __version__,
                "llama_cpp_commit": native.LLAMA_CPP_COMMIT,
                "weights": weights_hash(self.options.model),
                "rotation": "hadamard" if rotated else "none",
            },
        )
