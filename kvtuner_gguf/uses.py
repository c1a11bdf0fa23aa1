"""What a loaded model can be used for: whoever runs one asks here first, because llama.cpp aborts the process where it
cannot."""

from __future__ import annotations

from typing import Any

from . import native
from .errors import NativeError

MOST_CONTEXT = 16  # times the trained context; beyond it even the cells' bookkeeping fills the memory


def check_writes_text(model: Any, ctx: Any, name: object) -> None:
    """Raises NativeError for a model that cannot read and write text token by token, over a cache of what it has read.

    model ctx  llama.cpp's, the context in any state
    """
    what = _what_it_is(model, ctx)
    if what:
        raise NativeError(
            f"model '{name}': is {what}, need one that reads and writes text token by token. "
            "Take another model; 'kvtuner-gguf show' and llama.cpp's own programs may know this one."
        )


def _what_it_is(model: Any, ctx: Any) -> str:
    """What a model is instead of one that writes text; "" if it does."""
    from llama_cpp import llama_cpp as lc

    if lc.llama_model_has_encoder(model):
        return "an encoder-decoder model" if lc.llama_model_has_decoder(model) else "an encoder"
    if lc.llama_model_is_diffusion(model):
        return "a diffusion model, which writes all places at once"
    if not lc.llama_get_causal_attn(ctx) or not lc.llama_get_memory(ctx):
        return "a model of embeddings, which looks ahead in the text"
    if lc.llama_vocab_type(lc.llama_model_get_vocab(model)) == lc.LLAMA_VOCAB_TYPE_NONE:
        return "a model without a tokenizer"
    return ""


def check_context(model: Any, n_ctx: int, n_seq_max: int = 1) -> None:
    """Raises NativeError for a context of a size that the model, or llama.cpp, cannot have. n_ctx: tokens of all
    sequences together."""
    from llama_cpp import llama_cpp as lc

    if n_ctx < 1:
        raise NativeError(f"context of {n_ctx} tokens: need at least 1. Use a larger -c.")
    check_positions(model, n_ctx // n_seq_max)
    n_ctx_train = lc.llama_model_n_ctx_train(model)
    if n_ctx > MOST_CONTEXT * max(n_ctx_train, 8192) * n_seq_max:
        raise NativeError(
            f"context of {n_ctx} tokens: more than {MOST_CONTEXT} times the {n_ctx_train} that the model was "
            "trained for. Use a smaller -c."
        )


def check_positions(model: Any, n_ctx: int) -> None:
    """Raises NativeError for so many tokens of one sequence if the model would run out of positions."""
    n_pos = native.n_positions(model)
    if n_pos is not None and n_ctx > n_pos:
        raise NativeError(
            f"context of {n_ctx} tokens: the model has learned {n_pos} positions and no more. Use -c {n_pos} "
            f"(n_ctx={n_pos}) or less."
        )
