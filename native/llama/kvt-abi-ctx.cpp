// kvt-abi-ctx.cpp - kvt.h: what a context has really allocated, and what it holds
#include "kvt.h"
#include "kvt-cache.h"
#include "kvt-error.h"
#include "kvt-text.h"

#include "llama-impl.h"
#include "llama-kv-cache.h"
#include "llama-kv-cache-iswa.h"
#include "llama-kv-cache-dsa.h"
#include "llama-kv-cache-dsa-iswa.h"
#include "llama-kv-cache-msa.h"
#include "llama-model.h"
#include "llama-memory-hybrid.h"
#include "llama-memory-hybrid-idx.h"
#include "llama-memory-hybrid-iswa.h"
#include "llama-memory-recurrent.h"

#include <algorithm>

// friend of llama_kv_cache
struct kvt_query {
    // the attention caches that a plan speaks of; a context may have several (full and sliding window)
    static std::vector<const llama_kv_cache *> caches(const llama_context * ctx) {
        std::vector<const llama_kv_cache *> res;
        add(res, ctx ? llama_get_memory(ctx) : nullptr);
        return res;
    }

    static void add(std::vector<const llama_kv_cache *> & res, llama_memory_i * mem) {
        if (auto * kv = dynamic_cast<llama_kv_cache *>(mem)) {
            res.push_back(kv);
        } else if (auto * iswa = dynamic_cast<llama_kv_cache_iswa *>(mem)) {
            add(res, iswa->get_base());
            add(res, iswa->get_swa());
        } else if (auto * hybrid = dynamic_cast<llama_memory_hybrid *>(mem)) {
            add(res, hybrid->get_mem_attn());
        } else if (auto * hybrid_iswa = dynamic_cast<llama_memory_hybrid_iswa *>(mem)) {
            add(res, hybrid_iswa->get_mem_attn());
        } else if (auto * dsa = dynamic_cast<llama_kv_cache_dsa *>(mem)) {
            add(res, dsa->get_mla());
        } else if (auto * dsa_iswa = dynamic_cast<llama_kv_cache_dsa_iswa *>(mem)) {
            add(res, dsa_iswa->get_dsa());
            add(res, dsa_iswa->get_swa());
        } else if (auto * msa = dynamic_cast<llama_kv_cache_msa *>(mem)) {
            add(res, msa->get_base());
        }
    }

    // whether all that a token of seq_id at pos builds on is there. a memory that is not known holds it only where it stands at pos
    static bool holds(llama_memory_i * mem, llama_seq_id seq_id, llama_pos pos) {
        if (auto * kv = dynamic_cast<llama_kv_cache *>(mem)) {
            return holds_cells(*kv, seq_id, pos);
        } else if (auto * iswa = dynamic_cast<llama_kv_cache_iswa *>(mem)) {
            return holds(iswa->get_base(), seq_id, pos) && holds(iswa->get_swa(), seq_id, pos);
        } else if (auto * hybrid = dynamic_cast<llama_memory_hybrid *>(mem)) {
            auto * indexed = dynamic_cast<llama_memory_hybrid_idx *>(mem);
            return holds(hybrid->get_mem_attn(), seq_id, pos) && holds(hybrid->get_mem_recr(), seq_id, pos) &&
                (!indexed || !indexed->get_mem_idx() || holds(indexed->get_mem_idx(), seq_id, pos));
        } else if (auto * hybrid_iswa = dynamic_cast<llama_memory_hybrid_iswa *>(mem)) {
            return holds(hybrid_iswa->get_mem_attn(), seq_id, pos) && holds(hybrid_iswa->get_mem_recr(), seq_id, pos);
        } else if (auto * dsa = dynamic_cast<llama_kv_cache_dsa *>(mem)) {
            return holds(dsa->get_mla(), seq_id, pos) && holds(dsa->get_lid(), seq_id, pos);
        } else if (auto * dsa_iswa = dynamic_cast<llama_kv_cache_dsa_iswa *>(mem)) {
            return holds(dsa_iswa->get_dsa(), seq_id, pos) && holds(dsa_iswa->get_swa(), seq_id, pos);
        } else if (auto * msa = dynamic_cast<llama_kv_cache_msa *>(mem)) {
            return holds(msa->get_base(), seq_id, pos) && holds(msa->get_idx(), seq_id, pos);
        }
        return mem->seq_pos_max(seq_id) == pos - 1; // recurrent: one state, of all tokens up to its position
    }

    // cell by cell: after a roll-back cells are reused out of order, so that there may be holes above the first position
    static bool holds_cells(const llama_kv_cache & kv, llama_seq_id seq_id, llama_pos pos) {
        const bool windowed = kv.swa_type != LLAMA_SWA_TYPE_NONE;
        llama_pos next = windowed ? pos : 0; // the first that a token at pos sees. windows only move on: later tokens see none before it
        while (windowed && next > 0 && !llama_hparams::is_masked_swa(kv.n_swa, kv.swa_type, next - 1, pos)) {
            next--;
        }
        const auto & cells = kv.get_cells(seq_id);
        const auto & held  = cells.seq_pos_get(seq_id); // (position, cell), in order
        const bool   is_2d = kv.hparams.n_pos_per_embd() > 1;

        if (!is_2d && !held.empty() && held.size() == (size_t) (held.rbegin()->first - held.begin()->first) + 1) { // no hole
            return next == pos || (held.begin()->first <= next && held.rbegin()->first >= pos - 1);
        }
        for (auto it = is_2d ? held.begin() : held.lower_bound({ next, 0 }); it != held.end() && it->first <= next; ++it) {
            const auto & ext = cells.ext_get(it->second); // an image's cells stand at one position and cover a square from there
            next = std::max({ next, it->first + 1, is_2d ? std::max(ext.x, ext.y) + 1 : 0 });
        }
        return next >= pos;
    }

    static const llama_kv_cache::kv_layer * layer(const llama_kv_cache & kv, int32_t il) {
        for (const auto & l : kv.layers) {
            if ((int32_t) l.il == il) {
                return &l;
            }
        }
        return nullptr;
    }

    // block of the rotation of K: the largest power of two that divides the head size. of V: 64
    static int32_t rot_k(const llama_kv_cache & kv) {
        int32_t n = 64;
        while (kv.n_embd_head_k_all % (2*n) == 0) {
            n *= 2;
        }
        return n;
    }

    static uint32_t n_cells(const llama_kv_cache & kv)   { return kv.get_size()*kv.n_stream; }
    static uint64_t total_size(const llama_kv_cache & kv) { return kv.total_size(); }

    static const kvt_cache & types(const llama_kv_cache & kv) { return *kv.kvt; }
};

int32_t kvt_ctx_layer(
        const llama_context * ctx, int32_t il,
        const char ** type_k, const char ** type_v,
        uint64_t * bytes_k, uint64_t * bytes_v,
        uint32_t * n_cells, int32_t * rot_k, int32_t * rot_v) {
    if (!ctx) {
        return kvt_error(KVT_E_ARG, "kvt_ctx_layer: ctx is null");
    }
    for (const llama_kv_cache * kv : kvt_query::caches(ctx)) {
        const auto * l = kvt_query::layer(*kv, il);
        if (!l || ggml_is_empty(l->k)) {
            continue;
        }
        if (type_k)  { *type_k  = ggml_type_name(l->k->type); }
        if (type_v)  { *type_v  = l->v ? ggml_type_name(l->v->type) : ""; }
        if (bytes_k) { *bytes_k = ggml_nbytes(l->k); }
        if (bytes_v) { *bytes_v = l->v ? ggml_nbytes(l->v) : 0; }
        if (n_cells) { *n_cells = kvt_query::n_cells(*kv); }
        if (rot_k)   { *rot_k   = l->kvt.rot_k && l->v ? kvt_query::rot_k(*kv) : 0; } // the attention of MLA never rotates
        if (rot_v)   { *rot_v   = l->kvt.rot_v && l->v ? 64 : 0; }
        return 0;
    }
    return kvt_error(KVT_E_NONE, format("layer %d has no KV of its own in this context", il));
}

int32_t kvt_ctx_k_cond(const llama_context * ctx, int32_t il) {
    if (!ctx) {
        return kvt_error(KVT_E_ARG, "kvt_ctx_k_cond: ctx is null");
    }
    for (const llama_kv_cache * kv : kvt_query::caches(ctx)) {
        const auto * l = kvt_query::layer(*kv, il);
        if (l && !ggml_is_empty(l->k)) {
            return l->kvt.cond ? (l->kvt.cond->mean ? KVT_K_MEAN : 0) | (l->kvt.cond->scale ? KVT_K_SCALE : 0) : 0;
        }
    }
    return kvt_error(KVT_E_NONE, format("layer %d has no KV of its own in this context", il));
}

int32_t kvt_ctx_holds(const llama_context * ctx, llama_seq_id seq_id, llama_pos pos) {
    llama_memory_i * mem = ctx ? llama_get_memory(ctx) : nullptr;
    if (!mem || seq_id < 0 || seq_id >= (llama_seq_id) llama_n_seq_max(ctx) || pos < 0) {
        return kvt_error(KVT_E_ARG, format("kvt_ctx_holds: ctx is null or has no memory, sequence %d is not one of it, or position %d is negative", seq_id, pos));
    }
    return kvt_query::holds(mem, seq_id, pos);
}

uint64_t kvt_ctx_buffer_bytes(const llama_context * ctx) {
    uint64_t res = 0;
    for (const llama_kv_cache * kv : kvt_query::caches(ctx)) {
        res += kvt_query::total_size(*kv);
    }
    return res;
}

int32_t kvt_ctx_notes(const llama_context * ctx, char * buf, int32_t size) {
    std::vector<std::string> lines;
    for (const llama_kv_cache * kv : kvt_query::caches(ctx)) {
        const auto notes = kvt_query::types(*kv).notes();
        lines.insert(lines.end(), notes.begin(), notes.end());
    }
    return kvt_write_lines(lines, buf, size);
}
