"""What was found -> the Plan that a file gets."""

from __future__ import annotations

from kvtuner_gguf import __version__, native
from kvtuner_gguf.calibrate.options import Options
from kvtuner_gguf.calibrate.results import Trial
from kvtuner_gguf.calibrate.text import Text
from kvtuner_gguf.geometry import Geometry
from kvtuner_gguf.gguf_file import weights_hash
from kvtuner_gguf.kvectors import KVectors
from kvtuner_gguf.pair import Pair
from kvtuner_gguf.plan import Plan
from kvtuner_gguf.quality import Quality


def plan_of(
    pairs: tuple[Pair, ...],
    k_vectors: tuple[KVectors, ...],
    geometry: Geometry,
    made: dict[str, str | int],
    quality: Quality | None = None,
    rival: tuple[Quality, Trial] | None = None,
) -> Plan:
    """A plan with what it costs, and how it was made.

    made   see made_of
    rival  the best uniform pair, and its quality
    """
    return Plan(
        pairs=pairs,
        bits_per_value=geometry.bits_per_value(pairs, k_vectors),
        k_vectors=k_vectors,
        quality=quality,
        rival=rival[1].uniform_pair if rival else None,
        rival_quality=rival[0] if rival else None,
        rival_bits=rival[1].bits_per_value if rival else None,
        calibration=made,
    )


def made_of(options: Options, text: Text, *, rotated: bool, proof_weights: str | None = None) -> dict[str, str | int]:
    """How a plan is made: what a reader needs to make it again.

    rotated        whether the run time rotates K or V
    proof_weights  the type of the copy that its quality is of; None = of the model itself
    """
    made: dict[str, str | int] = {
        "method": options.method,
        "text": text.name,
        "text_sha256": text.sha256,
        "tokens": int(text.calibration.size),
        "n_ctx": options.n_ctx,
        "seed": options.seed,
        "version": __version__,
        "llama_cpp_commit": native.LLAMA_CPP_COMMIT,
        "weights": weights_hash(options.model),
        "rotation": "hadamard" if rotated else "none",
    }
    return made | ({"proof_weights": proof_weights} if proof_weights else {})
