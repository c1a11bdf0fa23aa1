"""Chunks of text -> Capture: Q, K, V of every layer on an f16 cache, streamed to disk one layer at a time."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ..errors import CalibrationError
from .. import native
from ..native import TapNode
from ..runtime import Session, Tap
from .evaluate import N_UBATCH, Chunks
from .results import Capture, LayerSample, save_sample

N_Q = 64  # query rows of each layer and sample, spread over the last batch


def capture(session: Session, chunks: Chunks, path: Path, progress: Callable[[int], None] = lambda n: None) -> Capture:
    """One sample of every layer for each chunk: all its K and V, and N_Q of the queries of its last batch.

    Raises CalibrationError if a layer that has KV of its own was not seen.
    """
    rotation = session.rotation()
    session.set_plan(None)
    seen: set[tuple[int, int]] = set()
    shares: dict[int, list[float]] = {il: [] for il in rotation}
    sample = 0

    def on_node(node: TapNode) -> None:
        if (node.il, sample) not in seen:  # layers that read another layer's KV come later
            seen.add((node.il, sample))
            save_sample(path, sample, _sample(node, rotation.get(node.il, (0, 0)), native.rope(session.model, node.il)))

    tap = Tap(on_node, N_Q)
    try:
        # full-size sliding windows: the mask tells what a query sees
        with session.context(chunks.n_ctx, n_ubatch=N_UBATCH, swa_full=True, tap=tap) as ctx:
            for sample, tokens in enumerate(chunks.tokens):
                ctx.clear()
                rows = [(int(token), pos, 0) for pos, token in enumerate(tokens)]
                last = max(0, (len(rows) - 1) // N_UBATCH * N_UBATCH)
                if last:
                    ctx.decode(rows[:last], [False] * last)
                with tap.enabled():
                    ctx.decode(rows[last:], [True] * (len(rows) - last))  # the last layer, too, works on all of them
                for il in shares:
                    shares[il] += [share] if (share := tap.share(il)) is not None else []
                progress(len(rows))
    finally:
        tap.close()
    il = tuple(sorted(rotation))
    missing = [i for i in il if any((i, s) not in seen for s in range(len(chunks.tokens)))]
    if missing:
        raise CalibrationError(f"capture: layers {missing} have KV of their own but no attention was seen. This model is not supported.")
    result = Capture(path, session.n_layer, il, len(chunks.tokens), _share(il, shares))
    result.save()
    return result


def _share(il: tuple[int, ...], shares: dict[int, list[float]]) -> tuple[float, ...]:
    """Mean share of each layer; where it was not seen join the stream, as the layers where it was."""
    means = {i: float(np.mean(shares[i])) for i in il if shares[i]}
    typical = float(np.median(list(means.values()))) if means else 1.0
    return tuple(means.get(i, typical) for i in il)


def _sample(node: TapNode, rotation: tuple[int, int], rope: tuple[int, bool]) -> LayerSample:
    """A copy of the node's data, which lives during the callback only."""

    def copy(pointer: ctypes._Pointer, shape: tuple[int, ...], dtype: type = np.float32) -> np.ndarray | None:
        if not pointer:
            return None
        return np.ctypeslib.as_array(pointer, shape).view(dtype).astype(np.float32)

    mask = copy(node.mask, (node.n_q, node.n_kv))
    return LayerSample(
        il=node.il,
        q=copy(node.q, (node.n_head, node.n_q, node.head_dim_k)),
        k=copy(node.k, (node.n_head_kv, node.n_kv, node.head_dim_k), np.float16),
        v=copy(node.v, (node.n_head_kv, node.n_kv, node.head_dim_v), np.float16),
        mask=np.zeros((node.n_q, node.n_kv), np.float32) if mask is None else mask,
        scale=node.scale,
        logit_softcap=node.logit_softcap,
        max_bias=node.max_bias,
        sinks=copy(node.sinks, (node.n_head,)),
        rot_k=rotation[0],
        rot_v=rotation[1],
        n_rot=min(rope[0], node.head_dim_k),
        far_pairs=rope[1],
        output=copy(node.out, (node.n_head, node.n_q, node.head_dim_v)),
    )
