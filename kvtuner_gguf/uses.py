"""What a loaded model can be used for: whoever runs one asks here first, because llama.cpp aborts the process where it cannot."""

from __future__ import annotations

from typing import Any

from . import native
from .errors import NativeError


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


def check_positions(model: Any, n_ctx: int) -> None:
    """Raises NativeError for a context of one sequence in which the model would run out of positions."""
    n_pos = native.n_positions(model)
    if n_pos is not None and n_ctx > n_pos:
        raise NativeError(f"context of {n_ctx} tokens: the model has learned {n_pos} positions and no more. Use -c {n_pos} (n_ctx={n_pos}) or less.")
