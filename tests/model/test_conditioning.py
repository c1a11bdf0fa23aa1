"""Conditioning K on a real model: an f16 cache stays within its own rounding, and the KLD of a quantized one falls."""

from functools import partial
from pydoc_data.topics import topics

import numpy as np
import pytest

from kvtuner_gguf import native
from kvtuner_gguf.calibrate.capture import capture
from kvtuner_gguf.calibrate.condition import condition
from kvtuner_gguf.calibrate.error import attention, k_error
from kvtuner_gguf.calibrate.kld import make_reference, measure
from kvtuner_gguf.calibrate.text import chunks_of
from kvtuner_gguf.pair import Pair

pytestmark = [pytest.mark.native, pytest.mark.model]
N_CTX = 512


@pytest.fixture(scope="module")
def session(smol):
    from kvtuner_gguf.runtime import Session

    with Session(smol) as session:
        yield session


@pytest.fixture(scope="module")
def tokens(session):
    """English text: the topics of Python's own help."""
    return np.array(session.tokenize("\n\n".join(topics[name] for name in sorted(topics)))[: 8 * N_CTX], dtype=np.int32)


@pytest.fixture(scope="module")
def k_vectors(session, tokens, tmp_path_factory):
    captured = capture(session, chunks_of(tokens, N_CTX, 2, "text"), tmp_path_factory.mktemp("capture"), n_ctx=2048)
    error = partial(k_error, round_trip=native.round_trip)
    judged = dict.fromkeys(captured.il, "q4_0")
    return condition(captured, error, lambda s: attention(s, s.k, s.v), judged, basis=captured.il).k_vectors


def test_most_layers_are_better_without_their_mean(k_vectors):
    assert sum(bool(v.mean) for v in k_vectors) > 15


@pytest.fixture(scope="module")
def reference(session, tokens, tmp_path_factory):
    chunks = chunks_of(tokens[4 * N_CTX :], N_CTX, 3, "text")
    return make_reference(session, chunks, tmp_path_factory.mktemp("reference") / "f16")


@pytest.mark.parametrize(("name", "most"), [("q3_64", 0.45), ("t3_64", 0.55)])  # measured: .29, .37
def test_bits_where_they_count_inside_a_head_lower_the_kld_of_k(session, reference, k_vectors, name, most):
    """At the same bytes, in the layers with a basis: K in groups of 6, 3, 2 and 1 bits, and conditioned K of 3 bits all
    over the head."""
    assert sum(bool(v.basis) for v in k_vectors) > 15
    even, groups = (
        measure(
            session,
            [Pair(of_basis if v.basis else "f16", "f16") for v in k_vectors],
            reference,
            k_vectors=k_vectors,
        ).kld_mean
        for of_basis in (name, "k3_64")
    )
    assert groups < most * even


def test_the_kld_of_a_quantized_cache_falls(session, k_vectors, reference):
    floor = measure(session, None, reference, flash_attn=False)
    same = measure(session, [Pair("f16", "f16")] * session.n_layer, reference, k_vectors=k_vectors)
    plain, conditioned = (
        measure(session, [Pair("q4_0", "q4_0")] * session.n_layer, reference, k_vectors=v).kld_mean
        for v in ((), k_vectors)
    )
    assert same.kld_mean < 1.5 * floor.kld_mean and same.same_top > floor.same_top - 0.02
    assert conditioned < 0.85 * plain  # measured: 0.64 to 0.78, at chunks of 1024
