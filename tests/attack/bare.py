"""What gguf_loader does with a file, by llama_cpp alone and with the plan switched off: python tests/attack/bare.py
MODEL.

A file that it dies of is one that upstream's own code dies of. LLAMA_CPP_LIB_PATH names the build; a stock one tells
for sure.
"""

from __future__ import annotations

import sys

from llama_cpp import llama_cpp


def main(path: bytes) -> None:
    overrides = (llama_cpp.llama_model_kv_override * 2)()
    overrides[0].key, overrides[0].tag, overrides[0].value.val_bool = (
        b"kvtuner.enabled",
        llama_cpp.LLAMA_KV_OVERRIDE_TYPE_BOOL,
        False,
    )
    for how in ("vocab_only", "no_alloc", "whole"):
        params = llama_cpp.llama_model_default_params()
        params.kv_overrides, params.vocab_only, params.no_alloc = overrides, how == "vocab_only", how == "no_alloc"
        if params.no_alloc:
            params.load_mode = llama_cpp.LLAMA_LOAD_MODE_NONE
        model = llama_cpp.llama_model_load_from_file(path, params)
        if model and how != "vocab_only":
            _use(model, decode=how == "whole")
        if model:
            llama_cpp.llama_model_free(model)


def _use(model: int, *, decode: bool) -> None:
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = params.n_batch = 64
    params.n_threads = params.n_threads_batch = 1
    params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
    params.swa_full = False
    ctx = llama_cpp.llama_init_from_model(model, params)
    if ctx and decode:
        n_vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        batch = llama_cpp.llama_batch_init(8, 0, 1)
        batch.n_tokens = 8
        for i in range(8):
            batch.token[i], batch.pos[i], batch.logits[i], batch.n_seq_id[i], batch.seq_id[i][0] = (
                i % max(1, n_vocab),
                i,
                True,
                1,
                0,
            )
        llama_cpp.llama_decode(ctx, batch)
        llama_cpp.llama_batch_free(batch)
    if ctx:
        llama_cpp.llama_free(ctx)


if __name__ == "__main__":
    main(sys.argv[1].encode())
