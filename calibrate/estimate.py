"""How long a calibration may take, told before its first stage: by the time of a prompt, and by what the stages run."""

from __future__ import annotations

from kvtuner_gguf.calibrate.checks import Plannable
from kvtuner_gguf.calibrate.methods import n_runs_of
from kvtuner_gguf.calibrate.options import PAPER_TRIALS, Options
from kvtuner_gguf.runtime import Session

# measured with SmolLM2-135M on two cores; other models and machines come within a third
_WRITTEN = 3.2  # times of a prompt's token, for one that the model writes beside others
_CAPTURED = 2.3  # of a token whose Q, K and V are kept
_OF_PRICE = 0.5  # a run that prices a layer, on half of the text, starts with it
# of one thread, to condition a layer's K, and to see its errors, for each channel of the model
_S_CONDITION, _S_ERROR = 1.3e-3, 0.9e-3
_S_PER_LOGIT = 12e-9  # of one thread, to compare a logit
_N_UNIFORM, _N_PROVED = 6, 8  # runs, as a rule


def seconds(options: Options, plannable: Plannable, session: Session, own: float, searched: float) -> dict[str, float]:
    """Of each stage, by how progress.STAGES names it.

    own searched  seconds of a prompt's token, on the model and on what is searched on
    """
    sizes, n_il = plannable.sizes, len(plannable.types)
    n_out = session.n_vocab * session.n_embd
    share = n_out / max(session.n_params - n_out, 1)  # a token's logits, of the rest of its way
    compared = _S_PER_LOGIT * session.n_vocab / session.n_threads

    def run(per_token: float, n_tokens: int, n_scored: int, part: float = 1.0) -> float:
        return n_tokens * per_token * part + n_scored * (per_token * share + compared)

    n_search, of_channels = sizes.n_searched * sizes.search_ctx, n_il * session.n_embd / session.n_threads
    of_search = run(searched, n_search, sizes.n_scored_search)
    of_heldout, of_own = (run(each, sizes.n_heldout, sizes.n_scored_heldout) for each in (searched, own))
    of_own *= sizes.n_own / sizes.n_chunk
    n_written = 0 if options.text else sizes.n_calibration + sizes.n_heldout
    found = {
        "text": run(searched, n_written, n_written, _WRITTEN),
        "capture": _CAPTURED * searched * sizes.n_calibration,
        "condition": _S_CONDITION * of_channels,
        "error": _S_ERROR * of_channels,
        "search: f16": of_search,
        "search: uniform": _N_UNIFORM * of_search,
        "heldout": of_heldout,
        "prove": _N_PROVED * of_heldout,
    }
    if own != searched:
        found |= {"own weights: f16": of_own, "own weights: noise": 2 * of_own}
    if options.method == "paper":
        return found | {"search: real runs": (options.n_trials or PAPER_TRIALS) * of_search}
    n_price, n_best = n_runs_of(n_il, _N_UNIFORM, options.n_trials)
    of_price = run(searched, n_search // 2, sizes.n_scored_search // 2, _OF_PRICE)
    return found | {
        "search: price": n_price * of_price + _N_UNIFORM * of_search,
        "search: best": n_best * of_search,
    }
