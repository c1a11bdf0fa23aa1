"""What capture leaves on disk for the stages after it: Q, K and V of each layer, one file for each layer and sample."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from kvtuner_gguf.calibrate.records import load_arrays, load_json, save_arrays, save_json
from kvtuner_gguf.calibrate.results import check_il
from kvtuner_gguf.errors import CalibrationError

MEASURED_Q = 64  # of a sample's queries, on which errors are measured: four times as many tell little more


@dataclass(frozen=True, eq=False)
class LayerSample:
    """What one layer's attention read and gave in one sample. All arrays float32.

    q              (n_head, n_q, head_dim_k)     after RoPE
    k              (n_head_kv, n_kv, head_dim_k) after RoPE
    v              (n_head_kv, n_kv, head_dim_v)
    mask           (n_q, n_kv) added to the logits: 0 or -inf; ALiBi distances where max_bias > 0
    scale          factor of the logits
    logit_softcap  the logits s become cap*tanh(s/cap); 0 = none
    max_bias       ALiBi's; 0 = none
    sinks          (n_head,) extra logit of each head, or None
    rot_k rot_v    size of the Hadamard blocks by which the run time rotates this K, V if quantized; 0 = none
    n_rot          first channels of a head that RoPE turns in pairs; 0 = none
    far_pairs      a pair is (i, i + n_rot/2), else (2i, 2i + 1)
    turns          (n_place, n_rot/2, 2) cos and sin by which RoPE would turn each pair of K and Q further, were the
                   same text at other places of the context; None = looked at where it stands only
    output         (n_head, n_q, head_dim_v) as the run time computed it, for a control, or None
    Raises CalibrationError if the shapes do not fit together.
    """

    il: int
    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    mask: np.ndarray
    scale: float
    logit_softcap: float = 0.0
    max_bias: float = 0.0
    sinks: np.ndarray | None = None
    rot_k: int = 0
    rot_v: int = 0
    n_rot: int = 0
    far_pairs: bool = False
    turns: np.ndarray | None = None
    output: np.ndarray | None = None

    def __post_init__(self) -> None:
        for name in ("q", "k", "v"):
            if getattr(self, name).ndim != 3:
                self._fail(f"{name} has shape {getattr(self, name).shape}", "(heads, tokens, head_dim)")
        n_head, n_q, head_dim_k = self.q.shape
        n_head_kv, n_kv, _ = self.k.shape
        if n_head % n_head_kv:
            self._fail(f"{n_head} heads", f"a multiple of its {n_head_kv} KV heads")
        self._check_shape("k", (n_head_kv, n_kv, head_dim_k))
        self._check_shape("v", (n_head_kv, n_kv, self.head_dim_v))
        self._check_shape("mask", (n_q, n_kv))
        self._check_shape("sinks", (n_head,))
        self._check_shape("output", (n_head, n_q, self.head_dim_v))
        if self.turns is not None:
            self._check_shape("turns", (len(self.turns), self.n_rot // 2, 2))
        for name, n, head_dim in (("rot_k", self.rot_k, head_dim_k), ("rot_v", self.rot_v, self.head_dim_v)):
            if n and (n & (n - 1) or head_dim % n):
                self._fail(f"{name} is {n}", f"0 or a power of two that divides head_dim {head_dim}")
        if self.n_rot % 2 or not 0 <= self.n_rot <= head_dim_k:
            self._fail(f"n_rot is {self.n_rot}", f"an even number up to head_dim {head_dim_k}")

    def _check_shape(self, name: str, shape: tuple[int, ...]) -> None:
        x = getattr(self, name)
        if x is not None and (x.shape != shape or x.dtype != np.float32):
            self._fail(f"{name} is {x.dtype} of shape {x.shape}", f"float32 of {shape}")

    def _fail(self, got: str, need: str) -> None:
        raise CalibrationError(f"layer {self.il}: {got}, need {need}. Capture again with this model.")

    @property
    def head_dim_v(self) -> int:
        return self.v.shape[-1]

    @property
    def rope_pairs(self) -> tuple[np.ndarray, np.ndarray]:
        """The channels of a head that RoPE turns, as first and second of each pair."""
        first = np.arange(self.n_rot // 2) if self.far_pairs else np.arange(0, self.n_rot, 2)
        return first, first + (self.n_rot // 2 if self.far_pairs else 1)

    def turned(self, place: int) -> LayerSample:
        """The same text at another place of the context: K and Q of every token turned alike, so the same attention."""
        if self.turns is None:
            return self
        q, k = (turned(x, self.rope_pairs, self.turns[place]) for x in (self.q, self.k))
        return replace(self, q=q, k=k)

    def measured(self) -> LayerSample:
        """With MEASURED_Q of its queries, evenly spread; itself if it has no more."""
        n_q = self.q.shape[1]
        if n_q <= MEASURED_Q:
            return self
        rows = np.linspace(0, n_q - 1, MEASURED_Q).round().astype(int)
        output = None if self.output is None else self.output[:, rows]
        return replace(self, q=self.q[:, rows], mask=self.mask[rows], output=output)

    @property
    def v_in_k(self) -> bool:
        """True if V is the front of K's rows, as in MLA: there is one tensor then, so one type."""
        return self.head_dim_v < self.k.shape[-1] and np.array_equal(self.v, self.k[..., : self.head_dim_v])


def turned(x: np.ndarray, pairs: tuple[np.ndarray, np.ndarray], turn: np.ndarray) -> np.ndarray:
    """x with the pairs of channels of its last axis turned. turn (n_pair, 2) cos and sin"""
    (first, second), (cos, sin) = pairs, turn.T
    out = x.copy()
    out[..., first] = x[..., first] * cos - x[..., second] * sin
    out[..., second] = x[..., first] * sin + x[..., second] * cos
    return out


@dataclass(frozen=True)
class Capture:
    """Samples of every layer that has KV, kept on disk and read one at a time.

    path      directory; one .npz for each layer and sample beside the index
    n_layer   layers of the model
    il        the layers that have KV of their own, ascending
    n_sample  samples of each of them
    share     of each of them: |attention's output|^2 / |residual stream after it|^2, mean over tokens
    """

    path: Path
    n_layer: int
    il: tuple[int, ...]
    n_sample: int
    share: tuple[float, ...] = ()

    INDEX = "capture.json"

    def __post_init__(self) -> None:
        check_il(f"capture {self.path}", self.il)
        if self.il[-1] >= self.n_layer or self.n_sample < 1:
            raise CalibrationError(
                f"capture {self.path}: {self.n_sample} samples of layers up to {self.il[-1]}, "
                f"need at least one, of a model of {self.n_layer} layers. Capture again."
            )
        if not self.share:
            object.__setattr__(self, "share", (1.0,) * len(self.il))
        if len(self.share) != len(self.il) or not all(math.isfinite(s) and s >= 0 for s in self.share):
            raise CalibrationError(
                f"capture {self.path}: shares {self.share}, need one >= 0 for each of {len(self.il)} layers. "
                "Capture again."
            )

    def sample(self, il: int, i: int) -> LayerSample:
        """Sample i of layer il, read from disk. Raises CalibrationError if it is not there."""
        path = sample_path(self.path, il, i)
        if not path.is_file():
            raise CalibrationError(f"{path}: there is no such file, need sample {i} of layer {il}. Capture again.")
        return LayerSample(**{name: _from_array(x) for name, x in load_arrays(path).items()})

    def save(self) -> None:
        """Write the index, once all samples are there: a capture without it is unfinished."""
        save_json(Path(self.path) / self.INDEX, "Capture", {k: v for k, v in vars(self).items() if k != "path"})

    @classmethod
    def load(cls, path: Path) -> Capture:
        """The capture in a directory. Raises CalibrationError if it has no index or a damaged one."""
        return load_json(
            Path(path) / cls.INDEX,
            "Capture",
            lambda data: cls(Path(path), data["n_layer"], tuple(data["il"]), data["n_sample"], tuple(data["share"])),
        )


def sample_path(path: Path, il: int, i: int) -> Path:
    """Where a capture keeps sample i of layer il."""
    return Path(path) / f"l{il:03d}_s{i:02d}.npz"


def save_sample(path: Path, i: int, sample: LayerSample) -> None:
    """Write sample i of a layer into a capture's directory; K and V as float16, as the cache held them.

    Raises CalibrationError if K or V holds what float16 cannot.
    """
    fields = {name: value for name, value in vars(sample).items() if value is not None}
    for name in ("k", "v"):
        with np.errstate(over="ignore"):
            fields[name] = fields[name].astype(np.float16)
        if not np.isfinite(fields[name]).all():
            raise CalibrationError(
                f"layer {sample.il}: {name} holds values outside float16, need at most 65504. Leave this layer at f16."
            )
    save_arrays(sample_path(path, sample.il, i), **fields)


def _from_array(x: np.ndarray) -> Any:
    """A stored field as LayerSample has it: a plain number, or float32."""
    return x.item() if x.ndim == 0 else x.astype(np.float32)
