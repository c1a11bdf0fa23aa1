"""What each of our cache types does to the default small model: a real run, against the f16 cache."""

from pathlib import Path

import numpy as np
import pytest

from kvtuner_gguf.calibrate.kld import Chunks, Reference, make_reference, measure
from kvtuner_gguf.pair import Pair
from kvtuner_gguf.runtime import Session

pytestmark = [pytest.mark.native, pytest.mark.model]

ROOT = Path(__file__).resolve().parents[2]
N_CTX = 512

# bounds of the mean KLD in nats; the text is this README, so they leave it room to change
KLD = {
    **{"q6_32": (0.0, 0.02), "q3_32": (0.05, 0.4), "q3_64": (0.05, 0.45), "q2_32": (0.25, 1.6), "q2_64": (0.25, 1.6)},
    **{"t4_64": (0.005, 0.08), "t3_64": (0.03, 0.35), "t2_64": (0.15, 1.2)},
}


@pytest.fixture(scope="module")
def session(smol):
    with Session(smol, n_threads=2) as session:
        yield session


@pytest.fixture(scope="module")
def reference(session, tmp_path_factory) -> Reference:
    tokens = np.array([session.tokenize((ROOT / "README.md").read_text())[:N_CTX]], np.int32)
    return make_reference(session, Chunks(tokens), tmp_path_factory.mktemp("f16") / "f16")


@pytest.mark.parametrize("name", KLD)
def test_a_cache_of_one_type_is_as_far_from_f16_as_its_bits_say(session, reference, name):
    least, most = KLD[name]
    assert least <= measure(session, [Pair(name, name)] * session.n_layer, reference).kld_mean <= most


def test_v_bears_low_bits_better_than_k(session, reference):
    def kld(pair: str) -> float:
        return measure(session, [Pair.parse(pair)] * session.n_layer, reference).kld_mean

    assert kld("q8_0/q2_64") < 0.5 * kld("q2_64/q8_0")


@pytest.mark.parametrize("bits", [2, 3])
def test_trellis_codes_lose_less_at_the_same_bytes(session, reference, bits):
    """Of V, which nothing else sets apart. Measured on 1536 positions of prose: .73 of the KLD."""
    even, trellis = (
        measure(session, [Pair("q8_0", f"{letter}{bits}_64")] * session.n_layer, reference).kld_mean for letter in "qt"
    )
    assert trellis < 0.9 * even
