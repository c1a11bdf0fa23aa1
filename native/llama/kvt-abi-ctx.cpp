// kvt-abi-ctx.cpp - kvt.h: what a context has really allocated, and what it holds
#include "kvt.h"
#include "kvt-cache.h"
#include "kvt-error.h"
#include "kvt-text.h"

#include "llama-ext.h"
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
    // a memory that another is made of. planned: a plan speaks of it, unlike of an indexer's cache and of a recurrent state
    struct part {
        llama_memory_i * mem;
        bool             planned;
    };

    // of a context's memory; none of one that is a cache itself, is recurrent, or of a kind that is not known here
    static std::vector<part> parts(llama_memory_i * mem) {
        if (auto * iswa = dynamic_cast<llama_kv_cache_iswa *>(mem)) {
            return { { iswa->get_base(), true }, { iswa->get_swa(), true } };
        }
        if (auto * hybrid = dynamic_cast<llama_memory_hybrid *>(mem)) {
            std::vector<part> res     = { { hybrid->get_mem_attn(), true }, { hybrid->get_mem_recr(), false } };
            auto *            indexed = dynamic_cast<llama_memory_hybrid_idx *>(mem);
            if (indexed && indexed->get_mem_idx()) {
                res.push_back({ indexed->get_mem_idx(), false });
            }
            return res;
        }
        if (auto * hybrid_iswa = dynamic_cast<llama_memory_hybrid_iswa *>(mem)) {
            return { { hybrid_iswa->get_mem_attn(), true }, { hybrid_iswa->get_mem_recr(), false } };
        }
        if (auto * dsa = dynamic_cast<llama_kv_cache_dsa *>(mem)) {
            return { { dsa->get_mla(), true }, { dsa->get_lid(), false } };
        }
        if (auto * dsa_iswa = dynamic_cast<llama_kv_cache_dsa_iswa *>(mem)) {
            return { { dsa_iswa->get_dsa(), true }, { dsa_iswa->get_swa(), true } };
        }
        if (auto * msa = dynamic_cast<llama_kv_cache_msa *>(mem)) {
            return { { msa->get_base(), true }, { msa->get_idx(), false } };
        }
        return {};
    }

    // the attention caches that a plan speaks of; a context may have several (full and sliding window)
    static std::vector<const llama_kv_cache *> caches(const llama_context * ctx) {
        std::vector<const llama_kv_cache *> res;
        add(res, ctx ? llama_get_memory(ctx) : nullptr);
        return res;
    }

    static void add(std::vector<const llama_kv_cache *> & res, llama_memory_i * mem) {
        if (auto * kv = dynamic_cast<llama_kv_cache *>(mem)) {
            res.push_back(kv);
        }
        for (const part & p : parts(mem)) {
            if (p.planned) {
                add(res, p.mem);
            }
        }
    }

    // whether all that a token of seq_id at pos builds on is there. a memory that is not known holds it only where it stands at pos
    static bool holds(llama_memory_i * mem, llama_seq_id seq_id, llama_pos pos) {
        if (auto * kv = dynamic_cast<llama_kv_cache *>(mem)) {
            return holds_cells(*kv, seq_id, pos);
        }
        const std::vector<part> all = parts(mem);
        if (all.empty()) {
            return mem->seq_pos_max(seq_id) == pos - 1; // recurrent: one state, of all tokens up to its position
        }
        return std::all_of(all.begin(), all.end(), [&](const part & p) { return holds(p.mem, seq_id, pos); });
    }

    // cell by cell: after a roll-back cells are reused out of order, so that there may be holes above the first position
    static bool holds_cells(const llama_kv_cache & kv, llama_seq_id seq_id, llama_pos pos) {
        const bool windowed = kv.swa_type != LLAMA_SWA_TYPE_NONE;
        llama_pos  next     = windowed ? pos : 0; // the first that a token at pos sees. windows only move on: later tokens see none before it
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
            next             = std::max({ next, it->first + 1, is_2d ? std::max(ext.x, ext.y) + 1 : 0 });
        }
        return next >= pos;
    }

    // layer il where it has KV of its own; null with the error set where it has none
    static const llama_kv_cache::kv_layer * layer(const llama_context * ctx, int32_t il, const llama_kv_cache ** cache) {
        for (const llama_kv_cache * kv : caches(ctx)) {
            for (const auto & l : kv->layers) {
                if ((int32_t) l.il == il && !ggml_is_empty(l.k)) {
                    *cache = kv;
                    return &l;
                }
            }
        }
        kvt_error(KVT_E_NONE, format("layer %d has no KV of its own in this context", il));
        return nullptr;
    }

    // block of the rotation of K: the largest power of two that divides the head size. of V: 64
    static int32_t rot_k(const llama_kv_cache & kv) {
        int32_t n = 64;
        while (kv.n_embd_head_k_all % (2 * n) == 0) {
            n *= 2;
        }
        return n;
    }

    static uint32_t n_cells(const llama_kv_cache & kv) { return kv.get_size() * kv.n_stream; }
    static uint64_t total_size(const llama_kv_cache & kv) { return kv.total_size(); }

    static const kvt_cache & types(const llama_kv_cache & kv) { return *kv.kvt; }
};

int32_t kvt_ctx_layer(const llama_context * ctx, int32_t il, kvt_layer_cache * layer) {
    if (!ctx || !layer) {
        return kvt_error(KVT_E_ARG, "kvt_ctx_layer: ctx and layer must not be null");
    }
    const llama_kv_cache * kv = nullptr;
    const auto *           l  = kvt_query::layer(ctx, il, &kv);
    if (!l) {
        return KVT_E_NONE;
    }
    layer->type_k  = ggml_type_name(l->k->type);
    layer->type_v  = l->v ? ggml_type_name(l->v->type) : "";
    layer->bytes_k = ggml_nbytes(l->k);
    layer->bytes_v = l->v ? ggml_nbytes(l->v) : 0;
    layer->n_cells = kvt_query::n_cells(*kv);
    layer->rot_k   = l->kvt.rot_k && l->v ? kvt_query::rot_k(*kv) : 0; // the attention of MLA never rotates
    layer->rot_v   = l->kvt.rot_v && l->v ? 64 : 0;
    return 0;
}

int32_t kvt_ctx_k_cond(const llama_context * ctx, int32_t il) {
    if (!ctx) {
        return kvt_error(KVT_E_ARG, "kvt_ctx_k_cond: ctx is null");
    }
    const llama_kv_cache * kv = nullptr;
    const auto *           l  = kvt_query::layer(ctx, il, &kv);
    if (!l) {
        return KVT_E_NONE;
    }
    const kvt_cond_layer * cond = l->kvt.cond;
    return cond ? (cond->mean ? KVT_K_MEAN : 0) | (cond->scale ? KVT_K_SCALE : 0) | (cond->basis_k ? KVT_K_BASIS : 0) : 0;
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

int32_t kvt_ctx_memory(const llama_context * ctx, kvt_memory * memory) {
    if (!ctx || !memory) {
        return kvt_error(KVT_E_ARG, "kvt_ctx_memory: ctx or memory is null");
    }
    *memory = {};
    for (const auto & [buft, of_type] : llama_get_memory_breakdown(ctx)) {
        memory->weights += of_type.model;
        memory->cache += of_type.context;
        memory->compute += of_type.compute;
    }
    return 0;
}

int32_t kvt_ctx_notes(const llama_context * ctx, char * buf, int32_t size) {
    std::vector<std::string> lines;
    for (const llama_kv_cache * kv : kvt_query::caches(ctx)) {
        const auto notes = kvt_query::types(*kv).notes();
        lines.insert(lines.end(), notes.begin(), notes.end());
    }
    return kvt_write_lines(lines, buf, size);
}
