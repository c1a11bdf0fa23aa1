"""Capture -> Conditions: a mean, a balanced scale and a basis of each layer's K, kept where they were measured to lower
its error.

The mean: softmax does not see what shifts all scores of a query alike, so K may be cached without its mean over tokens,
and codes then cover what is left. The scale: the noise of a rotated codec is the same in all channels and grows with
K's energy, sum of k^2/s^2; Q*s turns it into an error of the scores of sum of q^2*s^2. The product is least at s =
sqrt(rms_k/rms_q). Tokens and queries count by how much an error of their scores moves the output (moments.py). The
basis, on top of these: basis.py.

All must hold wherever in the context a token stands, and RoPE turns K as it goes: a mean taken at the start of the
context is a wrong one, worse than none, some thousand tokens on. So moments are averaged over the places of the whole
context.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from functools import partial

import numpy as np

from kvtuner_gguf.calibrate.basis import BASES, has_blocks, with_basis
from kvtuner_gguf.calibrate.layers import of_layers
from kvtuner_gguf.calibrate.moments import Moments, balanced_scale, energy
from kvtuner_gguf.calibrate.results import Conditions
from kvtuner_gguf.calibrate.samples import Capture, LayerSample
from kvtuner_gguf.kvectors import K_MEAN_MAX, KVectors

LEAST_GAIN = 0.02  # of the error, for one more operation in every token's graph
N_JUDGED = 3  # places at which a sample is measured

# name -> (mean, scale), from the fewest operations on
WAYS = {"none": (False, False), "mean": (True, False), "scale": (False, True), "both": (True, True)}
# what a basis is measured in, and what it has to beat: the same bits everywhere in a head, of as many bytes
GROUPS, ROTATED = "k3_64", "t3_64"

Attended = Callable[[LayerSample], tuple[np.ndarray, np.ndarray]]
Error = Callable[[LayerSample], Callable[[LayerSample, str, KVectors], float]]
Judged = tuple[LayerSample, Callable[[LayerSample, str, KVectors], float]]
# vectors from moments, and the type of K that they are measured in
Way = tuple[Callable[[Sequence[Moments]], KVectors], str]


def condition(
    capture: Capture,
    error: Error,
    attended: Attended,
    type_k: Mapping[int, str],
    *,
    mean: bool = True,
    scale: bool = True,
    basis: Container[int] = (),
    n_threads: int = 1,
    progress: Callable[[int], None] = lambda n: None,
) -> Conditions:
    """How each captured layer's K is to be conditioned.

    error       of a sample: a function of it at a place, a type of K, and vectors: the error of its attention
    attended    of a sample: scores (n_head, n_q, n_kv) after softmax, and output (n_head, n_q, head_dim_v)
    type_k      il -> the type to measure mean and scale with; layers that are not in it are left alone
    mean scale  whether to try them at all
    basis       the layers for which to try one
    n_threads   layers at once, at most
    Each sample is measured with vectors of the others, if there are others, so that none looks better than it will be.
    """
    k_vectors, errors = [KVectors()] * capture.n_layer, {}
    ways = {name: way for name, way in WAYS.items() if way[0] <= mean and way[1] <= scale}

    def of_layer(il: int) -> tuple[KVectors, dict[str, float]] | None:
        if il not in type_k or (len(ways) < 2 and il not in basis):
            return None
        samples = [capture.sample(il, i) for i in range(capture.n_sample)]
        if samples[0].v_in_k:
            return None
        allowed = {name: way for name, way in ways.items() if not (way[0] and mean_matters(samples[0]))}
        measured: dict[str, Way] = {
            name: (partial(vectors_of, mean=way[0], scale=way[1]), type_k[il]) for name, way in allowed.items()
        }
        in_basis = il in basis and has_blocks(samples[0].k.shape[-1])
        moments = [Moments.of(sample, *attended(sample)) for sample in samples]
        judged = [(few, error(few)) for few in (sample.measured() for sample in samples)]
        return _best(judged, moments, measured, in_basis=in_basis)

    for il, found in zip(capture.il, of_layers(of_layer, capture.il, n_threads)):
        if found:
            k_vectors[il], errors[il] = found
        progress(1)
    return Conditions(tuple(k_vectors), errors)


def mean_matters(sample: LayerSample) -> bool:
    """True where the attention is no plain softmax, so that the mean of K changes the output: the run time leaves it
    in."""
    return bool(sample.logit_softcap) or sample.sinks is not None


def best_way(errors: Mapping[str, float]) -> str:
    """The way of the fewest operations whose error is within LEAST_GAIN of the least."""
    tried = [name for name in WAYS if name in errors]
    least = min(errors[name] for name in tried)
    return next(name for name in tried if errors[name] <= least * (1 + LEAST_GAIN))


def best_basis(errors: Mapping[str, float]) -> str | None:
    """The better basis, if it lowers the error by more than LEAST_GAIN."""
    best = min(BASES, key=lambda name: errors[name])
    return best if errors[best] * (1 + LEAST_GAIN) < errors["rotated"] else None


def _best(
    samples: Sequence[Judged],
    moments: Sequence[Moments],
    ways: Mapping[str, Way],
    *,
    in_basis: bool,
) -> tuple[KVectors, dict[str, float]]:
    """A layer's vectors, and the errors by which they were chosen: of the ways, and of the best one in a basis."""
    errors = _errors(samples, moments, ways)
    vectors, _ = ways[best_way(errors)]
    if in_basis:
        bases: dict[str, Way] = {name: (partial(_in_basis, name, vectors), GROUPS) for name in BASES}
        errors |= _errors(samples, moments, {"rotated": (vectors, ROTATED), **bases})
        name = best_basis(errors)
        vectors = bases[name][0] if name else vectors
    return vectors(moments), errors


def _in_basis(name: str, vectors: Callable[[Sequence[Moments]], KVectors], moments: Sequence[Moments]) -> KVectors:
    return with_basis(name, Moments.averaged(moments), vectors(moments))


def _errors(samples: Sequence[Judged], moments: Sequence[Moments], ways: Mapping[str, Way]) -> dict[str, float]:
    """Error of each way, mean over samples and a few places of each."""
    each: dict[str, list[float]] = {name: [] for name in ways}
    for i, (sample, error) in enumerate(samples):
        others = [m for j, m in enumerate(moments) if j != i] or [moments[i]]
        vectors = {name: make(others) for name, (make, _) in ways.items()}
        for place in _judged(sample, i):
            here = sample if place is None else sample.turned(place)
            for name, (_, type_k) in ways.items():
                each[name].append(error(here, type_k, vectors[name]))
    return {name: float(np.mean(errors)) for name, errors in each.items()}


def _judged(sample: LayerSample, i: int) -> Sequence[int | None]:
    """Places at which sample i is measured: others than the next sample's."""
    if sample.turns is None or not sample.n_rot:
        return [None]
    n = len(sample.turns)
    return sorted({(j * n // N_JUDGED + i) % n for j in range(N_JUDGED)})


def vectors_of(moments: Sequence[Moments], mean: bool, scale: bool) -> KVectors:
    """Mean and balanced scale of a layer's K; what is not asked for is empty.

    The scale is that of the K that is left once the mean is off, if it is; the same within each pair that RoPE turns;
    of geometric mean 1 in each head.
    """
    average = Moments.averaged(moments)
    k, q = average.conditioned(average.mean if mean else None, None)
    centre = np.clip(average.mean, -K_MEAN_MAX, K_MEAN_MAX) if mean else None
    balance = balanced_scale(energy(k, average.pairs), energy(q, average.pairs)) if scale else None
    return KVectors(_kept(centre), _kept(balance))


def _kept(x: np.ndarray | None) -> tuple[float, ...]:
    return () if x is None else tuple(x.astype(np.float32).reshape(-1).tolist())
