"""Any list of plans and uniform pairs -> their KLD table on one text, for `kvtuner-gguf evaluate`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvtuner_gguf import native
from kvtuner_gguf.cache import scratch
from kvtuner_gguf.calibrate.checks import check_room, check_text
from kvtuner_gguf.calibrate.corpus import readable
from kvtuner_gguf.calibrate.kld import make_reference, measure
from kvtuner_gguf.calibrate.text import chunks_of, read_text, write_text
from kvtuner_gguf.errors import CalibrationError
from kvtuner_gguf.pair import Pair
from kvtuner_gguf.plan import Plan
from kvtuner_gguf.quality import Comparison, Row
from kvtuner_gguf.runtime import Session


def compare(*, text: Path | None, **given: Any) -> Comparison:
    """See _compare. text: a file or a pipe; None: the model writes its own. Raises CalibrationError if it cannot be
    read."""
    with readable(text) as path:
        return _compare(text=path, **given)


def _compare(
    *,
    model: Path,
    named: Mapping[str, Plan | Pair],
    progress: Any,
    stream: int,
    n_ctx: int,
    text: Path | None,
    n_chunk: int,
    seed: int,
    threads: int | None,
    n_gpu_layers: int,
) -> Comparison:
    """Each plan or pair measured on n_chunk chunks of `stream` tokens, or of as many as the model can read, beside the
    f16 noise floor.

    text   None: the model writes its own
    n_ctx  context at which bytes are counted
    Raises CalibrationError if a plan does not fit the model, or the text is too short.
    """
    with Session(model, no_alloc=True) as shape:
        shape.check_writes_text()
        geometry, stream, n_vocab = shape.geometry(n_ctx), shape.fitting(stream), shape.n_vocab
    check_text(text, n_chunk * stream)
    with scratch() as tmp, Session(model, n_threads=threads, n_gpu_layers=n_gpu_layers) as session:
        check_room(tmp, 2 * n_vocab * n_chunk * (stream - stream // 2))
        plans = {name: _plan(name, asked, geometry.values_k) for name, asked in named.items()}
        n_tokens = n_chunk * stream
        if text is not None:
            source = read_text(session, text, 0, n_tokens, progress.say)
        else:
            with progress.bar("text: the model writes", n_tokens) as advance:
                source = write_text(session, 0, n_tokens, stream=stream, seed=seed, progress=advance)
        chunks = chunks_of(source.heldout, stream, n_chunk, "text")
        with progress.bar("f16 reference", chunks.n_positions) as advance:
            reference = make_reference(session, chunks, tmp / "f16", advance)
        with progress.bar("measure", len(plans) + 1) as advance:
            f16 = _plan("f16", Pair("f16", "f16"), geometry.values_k).pairs
            rows = [
                Row("f16 (noise floor)", 16.0, geometry.bytes(f16), measure(session, None, reference, flash_attn=False))
            ]
            advance(1)
            notes = []
            for name, plan in plans.items():
                bits, n_bytes = (
                    geometry.bits_per_value(plan.pairs, plan.k_vectors),
                    geometry.bytes(plan.pairs, plan.k_vectors),
                )
                session.put_in_force(plan)
                notes += [f"{name}: {note}" for note in native.plan_notes(session.model)]
                rows.append(Row(name, bits, n_bytes, measure(session, plan.pairs, reference, k_vectors=plan.k_vectors)))
                advance(1)
    return Comparison(source.name, chunks.n_positions, chunks.n_ctx, n_ctx, tuple(rows), tuple(notes))


def _plan(name: str, asked: Plan | Pair, values_k: tuple[int, ...]) -> Plan:
    plan = Plan.uniform(asked, len(values_k), [bool(n) for n in values_k]) if isinstance(asked, Pair) else asked
    if plan.n_layer != len(values_k):
        raise CalibrationError(
            f"plan '{name}' has {plan.n_layer} layers, the model has {len(values_k)}. Use a plan of this model."
        )
    return plan
