"""Chunks of text -> Capture: Q, K, V of every layer on an f16 cache, streamed to disk one layer at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kvtuner_gguf.calibrate.kld import N_UBATCH, Chunks, check_logits
from kvtuner_gguf.calibrate.samples import Capture, LayerSample, save_sample
from kvtuner_gguf.errors import CalibrationError
from kvtuner_gguf.geometry import Geometry
from kvtuner_gguf.native import TapNode
from kvtuner_gguf.runtime import Session
from kvtuner_gguf.tap import Tap

N_Q = 256  # query rows of each layer and sample, spread over the last batch
N_PLACE = 16  # places of the context at which K is looked at
N_PROBE = 64  # tokens by which RoPE's turn to a place is measured


def captured_bytes(geometry: Geometry, n_sample: int, n_gqa: int) -> int:
    """Of the files of a capture of n_sample chunks of the geometry's n_ctx: K and V, and of N_Q queries, n_gqa heads to
    a KV head, Q and the mask."""
    n_q = min(N_Q, geometry.n_ctx)
    q = n_gqa * sum(geometry.values_k) // geometry.n_ctx * n_q
    mask = n_q * geometry.n_ctx * sum(map(bool, geometry.values_k))
    return n_sample * (2 * geometry.n_values + 4 * (q + mask))


def capture(
    session: Session, chunks: Chunks, path: Path, progress: Callable[[int], None] = lambda n: None, *, n_ctx: int = 0
) -> Capture:
    """One sample of every layer for each chunk: all its K and V, and N_Q of the queries of its last batch.

    n_ctx  context whose places are looked at, too (LayerSample.turns), as far as the model was trained
    Raises CalibrationError if a layer that has KV of its own was not seen.
    """
    rotation = session.rotation()
    turns = _turns(session, chunks, n_ctx)
    seen: set[tuple[int, int]] = set()
    shares: dict[int, list[float]] = {il: [] for il in rotation}
    sample = 0

    def on_node(node: TapNode) -> None:
        if (node.il, sample) not in seen:  # layers that read another layer's KV come later
            seen.add((node.il, sample))
            save_sample(
                path,
                sample,
                _sample(node, rotation.get(node.il, (0, 0)), session.rope(node.il), turns.get(node.il)),
            )

    tap = Tap(on_node, N_Q)
    try:
        # full-size sliding windows: the mask tells what a query sees
        with session.context(chunks.n_ctx, None, n_ubatch=N_UBATCH, swa_full=True, watch=tap) as ctx:
            for sample, tokens in enumerate(chunks.tokens):  # noqa: B007 - on_node reads it
                ctx.clear()
                rows = [(int(token), pos, 0) for pos, token in enumerate(tokens)]
                last = max(0, (len(rows) - 1) // N_UBATCH * N_UBATCH)
                if last:
                    ctx.decode(rows[:last], [False] * last)
                with tap.enabled():
                    # the last layer, too, works on all of them
                    logits = ctx.decode(rows[last:], [True] * (len(rows) - last))
                    check_logits(session, logits, tokens.tolist())  # first: of NaN no layer can be blamed
                for il in shares:
                    shares[il] += [share] if (share := tap.share(il)) is not None else []
                progress(len(rows))
    finally:
        tap.close()
    layers = tuple(sorted(rotation))
    missing = [il for il in layers if any((il, s) not in seen for s in range(len(chunks.tokens)))]
    if missing:
        raise CalibrationError(
            f"capture: layers {missing} have KV of their own but no attention was seen. This model is not supported."
        )
    result = Capture(path, session.n_layer, layers, len(chunks.tokens), _share(layers, shares))
    result.save()
    return result


def _turns(session: Session, chunks: Chunks, n_ctx: int) -> dict[int, np.ndarray]:
    """il -> LayerSample.turns: what RoPE does at other places, measured on the K of the same few tokens there.

    RoPE is relative, so that text at another place is the same text with K and Q turned on. So whatever the frequencies
    and their scaling, the turn is the angle between K here and K there. Without RoPE it is none.
    """
    last = min(n_ctx, session.n_ctx_train) - chunks.n_ctx
    if last <= 0 or not any(session.rope(il)[0] for il in range(session.n_layer)):
        return {}  # without RoPE a place may be a row of a table, which ends
    # spread evenly, but at no even distance, which a frequency could share
    starts = [0, *(int(last * (j * 0.6180339887 % 1)) for j in range(1, N_PLACE))]
    seen: dict[int, list[LayerSample]] = {}
    tap = Tap(lambda node: seen.setdefault(node.il, []).append(_sample(node, (0, 0), session.rope(node.il))), 1)
    try:
        with session.context(max(256, N_PROBE), None, n_ubatch=N_UBATCH, swa_full=True, watch=tap) as ctx:
            for start in starts:
                ctx.clear()
                tokens = chunks.tokens[0][:N_PROBE].tolist()
                with tap.enabled():
                    logits = ctx.decode(
                        [(token, start + pos, 0) for pos, token in enumerate(tokens)], [True] * len(tokens)
                    )
                    check_logits(session, logits, tokens)
    finally:
        tap.close()
    return {il: _turns_of(samples[:: len(samples) // len(starts)]) for il, samples in seen.items()}


def _turns_of(samples: Sequence[LayerSample]) -> np.ndarray:
    """(n_place, n_rot/2, 2) angles between the K of the first sample and that of each."""
    first, second = samples[0].rope_pairs
    k = [s.k[:, :N_PROBE, first] + 1j * s.k[:, :N_PROBE, second] for s in samples]
    z = np.array([(x * k[0].conj()).sum(axis=(0, 1)) for x in k])
    size = np.abs(z)
    z = np.where(size > 0, z / np.where(size > 0, size, 1), 1)
    return np.stack([z.real, z.imag], axis=-1).astype(np.float32)


def _share(il: tuple[int, ...], shares: dict[int, list[float]]) -> tuple[float, ...]:
    """Mean share of each layer; where it was not seen join the stream, as the layers where it was."""
    means = {i: float(np.mean(shares[i])) for i in il if shares[i]}
    typical = float(np.median(list(means.values()))) if means else 1.0
    return tuple(means.get(i, typical) for i in il)


def _sample(
    node: TapNode, rotation: tuple[int, int], rope: tuple[int, bool], turns: np.ndarray | None = None
) -> LayerSample:
    """A copy of the node's data, which lives during the callback only."""

    def copy(pointer: Any, shape: tuple[int, ...], dtype: type = np.float32) -> np.ndarray:
        return np.ctypeslib.as_array(pointer, shape).view(dtype).astype(np.float32)

    n_rot = rope[0] if rope[0] % 2 == 0 and rope[0] <= node.head_dim_k else 0
    mask = copy(node.mask, (node.n_q, node.n_kv)) if node.mask else None
    return LayerSample(
        il=node.il,
        q=copy(node.q, (node.n_head, node.n_q, node.head_dim_k)),
        k=copy(node.k, (node.n_head_kv, node.n_kv, node.head_dim_k), np.float16),
        v=copy(node.v, (node.n_head_kv, node.n_kv, node.head_dim_v), np.float16),
        mask=np.zeros((node.n_q, node.n_kv), np.float32) if mask is None else mask,
        scale=node.scale,
        logit_softcap=node.logit_softcap,
        max_bias=node.max_bias,
        sinks=copy(node.sinks, (node.n_head,)) if node.sinks else None,
        rot_k=rotation[0],
        rot_v=rotation[1],
        n_rot=n_rot,
        far_pairs=rope[1],
        turns=turns,
    )
