// kvt-query.cpp - what a context has really allocated
#include "kvt.h"
#include "kvt-plan.h"

#include "llama-impl.h"
#include "llama-kv-cache.h"
#include "llama-kv-cache-iswa.h"
#include "llama-kv-cache-dsa.h"
#include "llama-kv-cache-dsa-iswa.h"
#include "llama-kv-cache-msa.h"
#include "llama-memory-hybrid.h"
#include "llama-memory-hybrid-iswa.h"

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
