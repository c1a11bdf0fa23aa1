// kvt-cond.cpp - conditioning of K: kept beside the cache, applied in the graph, told by a state
#include "kvt-cond.h"
#include "kvt-hash.h"

#include "llama-impl.h"
#include "llama-hparams.h"
#include "llama-io.h"

#include <cinttypes>
#include <stdexcept>

//
// tensors
//

ggml_context * kvt_cond::ctx_for(ggml_backend_buffer_type_t buft) {
    auto & ctx = ctxs[buft];
    if (!ctx) {
        ggml_init_params params = { 3 * LLAMA_MAX_LAYERS * ggml_tensor_overhead(), nullptr, true }; // mem_size, mem_buffer, no_alloc
        ctx.reset(ggml_init(params));
        if (!ctx) {
            throw std::runtime_error("failed to create ggml context for the vectors of K");
        }
    }
    return ctx.get();
}

const kvt_cond_layer * kvt_cond::add(uint32_t il, const kvt_k_vectors & vectors, int64_t n_head_kv, ggml_backend_buffer_type_t buft) {
    ggml_context * ctx = ctx_for(buft);

    uint64_t hash = KVT_HASH_START;

    const auto tensor = [&](const char * name, const std::vector<float> & values) -> ggml_tensor * {
        if (values.empty()) {
            return nullptr;
        }
        ggml_tensor * t = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, values.size() / n_head_kv, n_head_kv);
        ggml_format_name(t, "k_%s_l%u", name, il);
        data.emplace_back(t, values);
        return t;
    };
    const auto add_hash = [&](char tag, const std::vector<float> & values) {
        hash = kvt_hash(hash, &tag, sizeof(tag));
        hash = kvt_hash(hash, values.data(), values.size() * sizeof(float));
    };

    std::vector<float> scale_inv(vectors.scale.size());
    for (size_t i = 0; i < scale_inv.size(); i++) {
        scale_inv[i] = 1.0f / vectors.scale[i];
    }

    add_hash('m', vectors.mean);
    add_hash('s', vectors.scale);

    return &(layers[il] = { tensor("mean", vectors.mean), tensor("scale", vectors.scale), tensor("scale_inv", scale_inv), hash });
}

void kvt_cond::alloc(bool no_alloc) {
    for (auto & [buft, ctx] : ctxs) {
        ggml_backend_buffer_t buf;
        if (no_alloc) {
            sizes[buft] = ggml_backend_alloc_ctx_tensors_from_buft_size(ctx.get(), buft);
            buf         = ggml_backend_buft_alloc_buffer(buft, 0);
            for (ggml_tensor * t = ggml_get_first_tensor(ctx.get()); t; t = ggml_get_next_tensor(ctx.get(), t)) {
                t->buffer = buf; // so that the scheduler does not allocate it
            }
        } else {
            buf = ggml_backend_alloc_ctx_tensors_from_buft(ctx.get(), buft);
            if (!buf) {
                throw std::runtime_error("failed to allocate the vectors of K");
            }
            sizes[buft] = ggml_backend_buffer_get_size(buf);
        }
        bufs.emplace_back(buf);
    }
    for (const auto & [t, values] : data) {
        if (!no_alloc) {
            ggml_backend_tensor_set(t, values.data(), 0, ggml_nbytes(t));
        }
    }
    data.clear();
}

//
// graph
//

ggml_tensor * kvt_cond_k(ggml_context * ctx, const kvt_cond_layer * cond, ggml_tensor * k) {
    if (!cond || !k) {
        return k;
    }
    if (cond->mean) {
        k = ggml_sub(ctx, k, cond->mean);
    }
    return cond->scale_inv ? ggml_mul(ctx, k, cond->scale_inv) : k;
}

ggml_tensor * kvt_cond_k_undo(ggml_context * ctx, const kvt_cond_layer * cond, ggml_tensor * k) {
    if (!cond || !k) {
        return k;
    }
    if (cond->scale) {
        k = ggml_mul(ctx, k, cond->scale);
    }
    return cond->mean ? ggml_add(ctx, k, cond->mean) : k;
}

static ggml_tensor * kvt_cond_q(ggml_context * ctx, const kvt_cond_layer * cond, ggml_tensor * q) {
    if (!cond || !cond->scale) {
        return q;
    }
    ggml_tensor * scale = cond->scale;

    const int64_t n_head    = q->ne[1];
    const int64_t n_head_kv = scale->ne[1];
    const int64_t n_rep     = n_head / n_head_kv; // neighbours share a KV head

    GGML_ASSERT(q->ne[0] == scale->ne[0] && n_head % n_head_kv == 0 && q->ne[3] == 1);

    if (n_rep == 1 || n_head_kv == 1) {
        return ggml_mul(ctx, q, scale);
    }
    const int64_t n_tokens = q->ne[2];

    q     = ggml_view_4d(ctx, q, q->ne[0], n_rep, n_head_kv, n_tokens, q->nb[1], q->nb[1] * n_rep, q->nb[2], 0);
    scale = ggml_reshape_3d(ctx, scale, scale->ne[0], 1, n_head_kv);

    return ggml_reshape_3d(ctx, ggml_mul(ctx, q, scale), q->ne[0], n_head, n_tokens);
}

void kvt_cond_qk(ggml_context * ctx, const kvt_cond_layer * cond, ggml_tensor *& q, ggml_tensor *& k) {
    q = kvt_cond_q(ctx, cond, q);
    k = kvt_cond_k(ctx, cond, k);
}

//
// state
//

void kvt_cond_state_write(llama_io_write_i & io, const kvt_cond_layer * cond) {
    if (cond) {
        io.write(&cond->hash, sizeof(cond->hash));
    }
}

bool kvt_cond_state_read(llama_io_read_i & io, const kvt_cond_layer * cond, uint32_t il) {
    if (!cond) {
        return true;
    }
    uint64_t hash;
    io.read(&hash, sizeof(hash));
    if (hash != cond->hash) {
        LLAMA_LOG_ERROR("%s: layer %u: the state's K has a mean or scale of %016" PRIx64 ", this context's has %016" PRIx64 ": it was saved under another plan. Load it where it was saved, or process the prompt again\n",
                __func__, il, hash, cond->hash);
        return false;
    }
    return true;
}
