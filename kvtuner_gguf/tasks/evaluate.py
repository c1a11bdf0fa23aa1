"""Plans that are named -> their answers to tasks, beside those of an f16 cache."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from kvtuner_gguf.calibrate.evaluate import plan_of
from kvtuner_gguf.calibrate.progress import Progress
from kvtuner_gguf.calibrate.proof import everywhere
from kvtuner_gguf.calibrate.records import append_line, read_lines
from kvtuner_gguf.calibrate.store import claimed, keyed_dir
from kvtuner_gguf.errors import KvtunerError, TaskError
from kvtuner_gguf.geometry import Geometry
from kvtuner_gguf.identity import weights_sample
from kvtuner_gguf.kept import write_about
from kvtuner_gguf.machine import check_memory, total_memory
from kvtuner_gguf.pair import Pair
from kvtuner_gguf.plan import Plan
from kvtuner_gguf.runtime import Session
from kvtuner_gguf.tasks.ask import Group, Prompt, groups_of, write_answers
from kvtuner_gguf.tasks.made import is_made, made_tasks
from kvtuner_gguf.tasks.score import Answered, TaskComparison, TaskRow
from kvtuner_gguf.tasks.task import Task, checked_tasks, read_tasks

RECORDS = 1  # counted up when answers come to mean something else, so that old ones are left alone
MOST_SLOTS = 16  # sequences that are answered at once
_SHARE = 0.25  # of the machine's memory that their f16 cache may take
_FLOOR = "f16 (noise floor)"


def evaluate_tasks(
    model: Path,
    named: Mapping[str, Plan | Pair],
    tasks: str,
    progress: Progress,
    *,
    n_ctx: int = 8192,
    seed: int = 0,
    n_threads: int | None = None,
    n_gpu_layers: int = 0,
    fresh: bool = False,
) -> TaskComparison:
    """Each plan or pair on the tasks, greedily, beside an f16 cache and its noise floor. What was answered is kept, and
    not asked again; fresh forgets it.

    tasks  a file (docs/tasks.md), "short", or "long:N"; see made.made_tasks
    n_ctx  context at which bytes are counted
    Raises TaskError for tasks that cannot be read or do not fit the model's context, CalibrationError if a plan does
    not fit the model, or the same is being measured already.
    """
    with Session(model, no_alloc=True) as shape:
        shape.check_writes_text()
        geometry = shape.geometry(n_ctx)
        asked = _tasks(shape, tasks, seed)
        prompts = _prompts(shape, asked)
    plans = {name: plan_of(name, plan, geometry.values_k) for name, plan in named.items()}
    work = keyed_dir("tasks", RECORDS, weights_sample(model), prompts, n_gpu_layers)
    with claimed(work, "asked these tasks"):
        if fresh:
            shutil.rmtree(work, ignore_errors=True)
        write_about(work, model)
        with Session(model, n_threads=n_threads, n_gpu_layers=n_gpu_layers) as session:
            return _answered(session, plans, asked, prompts, geometry, work, progress, Path(tasks).name)


def check_tasks(model: Path, tasks: str, seed: int) -> None:
    """Raises TaskError for tasks that cannot be read or do not fit the model's context, before work is spent."""
    with Session(model, no_alloc=True) as shape:
        shape.check_writes_text()
        _prompts(shape, _tasks(shape, tasks, seed))


def _answered(
    session: Session,
    plans: Mapping[str, Plan],
    tasks: Sequence[Task],
    prompts: Sequence[Prompt],
    geometry: Geometry,
    work: Path,
    progress: Progress,
    title: str,
) -> TaskComparison:
    f16 = Plan(everywhere("f16", [bool(n) for n in geometry.values_k]))
    asking = _Asking(session, tasks, prompts, work, progress)
    rows = [_row(geometry, "f16", f16, asking.of("f16", None))]
    rows.append(_row(geometry, _FLOOR, f16, asking.of(_FLOOR, None, flash_attn=False)))
    notes = _notes(session, prompts)
    for name, plan in plans.items():
        session.put_in_force(plan)
        notes += [f"{name}: {note}" for note in session.plan_notes]
        rows.append(_row(geometry, name, plan, asking.of(name, plan)))
    return TaskComparison(title, geometry.n_ctx, tuple(rows), tuple(notes))


def _row(geometry: Geometry, name: str, plan: Plan, answers: tuple[Answered, ...]) -> TaskRow:
    bits = geometry.bits_per_value(plan.pairs, plan.k_vectors)
    return TaskRow(name, bits, geometry.bytes(plan.pairs, plan.k_vectors), answers)


def _notes(session: Session, prompts: Sequence[Prompt]) -> list[str]:
    """What is to be known of the tasks."""
    long = [p.id for p in prompts if p.n_ctx > session.n_ctx_train]
    if not long:
        return []
    more = f" and {len(long) - 1} others" if len(long) > 1 else ""
    return [f"task '{long[0]}'{more}: beyond the {session.n_ctx_train} tokens that the model was trained on"]


class _Asking:
    """Asks a model the tasks that no record holds an answer to."""

    def __init__(
        self, session: Session, tasks: Sequence[Task], prompts: Sequence[Prompt], work: Path, progress: Progress
    ) -> None:
        self.session, self.tasks, self.work, self.progress = session, tasks, work, progress
        self.slots = {group: _n_slots(session, group) for group in groups_of(prompts)}

    def of(self, name: str, plan: Plan | None, *, flash_attn: bool = True) -> tuple[Answered, ...]:
        """The answers of a plan, None = f16, in the order of the tasks."""
        record = self.work / f"{_plan_digest(plan, flash_attn)}.jsonl"
        texts = _texts(record)

        def keep(prompt: Prompt, tokens: Sequence[int]) -> None:
            texts[prompt.id] = self.session.detokenize(tokens)
            append_line(record, {"id": prompt.id, "text": texts[prompt.id], "n_tokens": len(tokens)})
            advance(1)

        with self.progress.bar(f"tasks: {name}", len(self.tasks)) as advance:
            advance(sum(task.id in texts for task in self.tasks))
            for group, n_slots in self.slots.items():
                left = tuple(p for p in group.prompts if p.id not in texts)
                if left:
                    write_answers(self.session, plan, Group(left, group.n_prefix), n_slots, keep, flash_attn=flash_attn)
        return tuple(_judged(task, texts[task.id]) for task in self.tasks)


def _judged(task: Task, text: str) -> Answered:
    return Answered(task.id, task.area, text, task.answer.is_in(text), task.answer.is_valid(text))


def _tasks(session: Session, tasks: str, seed: int) -> tuple[Task, ...]:
    if not is_made(tasks):
        return read_tasks(Path(tasks))
    made = made_tasks(tasks, seed, lambda text: len(session.tokenize(text, add_special=False)))
    return checked_tasks(made, f"tasks '{tasks}'")


def _prompts(session: Session, tasks: Sequence[Task]) -> list[Prompt]:
    """The tasks as the model reads them. Raises TaskError for one that is longer than it can read."""
    prompts = []
    for task in tasks:
        try:
            tokens = session.prompt_tokens(task.messages, task.tools)
        except KvtunerError as error:
            raise TaskError(f"task '{task.id}': {error}") from None
        prompt = Prompt(task.id, tuple(tokens), task.max_tokens)
        if session.fitting(prompt.n_ctx) < prompt.n_ctx:
            raise TaskError(
                f"task '{task.id}': {len(tokens)} tokens and {task.max_tokens} of the answer, the model has "
                f"{session.fitting(prompt.n_ctx)} positions. Leave it out, or shorten it."
            )
        prompts.append(prompt)
    return prompts


def _n_slots(session: Session, group: Group) -> int:
    """Sequences at once whose f16 caches take no more than a share of the memory; the same for all plans, so that they
    round alike.

    Raises NativeError if the memory does not hold one.
    """
    shape = session.geometry(group.n_ctx)
    n_bytes = max(1, shape.bytes(everywhere("f16", [bool(n) for n in shape.values_k])))
    check_memory((1 + (group.n_prefix > 0)) * n_bytes, group.n_ctx)
    return int(max(1, min(MOST_SLOTS, _SHARE * total_memory() / n_bytes)))


def _texts(record: Path) -> dict[str, str]:
    found = {}
    for line in read_lines(record):
        with suppress(KeyError):
            found[str(line["id"])] = str(line["text"])
    return found


def _plan_digest(plan: Plan | None, flash_attn: bool) -> str:
    parts = (flash_attn, plan and (plan.pairs, plan.k_vectors))
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
