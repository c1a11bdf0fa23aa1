// kvt-cond.cpp - conditioning of K: kept beside the cache, applied in the graph, told by a state
#include "kvt-cond.h"
#include "kvt-cond-op.h"
#include "kvt-hash.h"
#include "kvt-table.h"

#include "llama-impl.h"
#include "llama-hparams.h"
#include "llama-io.h"

#include <algorithm>
#include <cinttypes>
#include <cmath>
#include <stdexcept>

//
// tensors
//

ggml_context * kvt_cond::ctx_for(ggml_backend_buffer_type_t buft) {
    auto & ctx = ctxs[buft];
    if (!ctx) {
        ggml_init_params params = { 5 * LLAMA_MAX_LAYERS * ggml_tensor_overhead(), nullptr, true }; // mem_size, mem_buffer, no_alloc
        ctx.reset(ggml_init(params));
        if (!ctx) {
            throw std::runtime_error("failed to create ggml context for the vectors of K");
        }
    }
    return ctx.get();
}

ggml_tensor * kvt_cond::add_tensor(ggml_context * ctx, const char * name, uint32_t il, ggml_type type, std::vector<int64_t> ne, const std::vector<float> & values) {
    if (values.empty()) {
        return nullptr;
    }
    ggml_tensor * t = ggml_new_tensor(ctx, type, ne.size(), ne.data());
    ggml_format_name(t, "k_%s_l%u", name, il);
    data.emplace_back(t, values);
    return t;
}

// of a basis's matrices, which every token reads whole: what f16 rounds is little beside a quantized K's error
static ggml_type kvt_basis_type(const kvt_k_basis & basis, ggml_type type_k) {
    const auto fits = [](const std::vector<float> & values) {
        return std::all_of(values.begin(), values.end(), [](float v) { return std::fabs(v) <= 65504.0f; });
    };
    return ggml_is_quantized(type_k) && fits(basis.of_k) && fits(basis.of_q) ? GGML_TYPE_F16 : GGML_TYPE_F32;
}

// of a layer in such a buffer, or null
static ggml_custom_op_t kvt_cond_in_one(ggml_backend_buffer_type_t buft) {
    ggml_backend_dev_t dev = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
    if (buft != ggml_backend_cpu_buffer_type() || !dev) {
        return nullptr;
    }
    return (ggml_custom_op_t) ggml_backend_reg_get_proc_address(ggml_backend_dev_backend_reg(dev), KVT_COND_PROC);
}

const kvt_cond_layer * kvt_cond::add(uint32_t il, const kvt_k_vectors & vectors, ggml_type type_k, int64_t n_head_kv, ggml_backend_buffer_type_t buft) {
    ggml_context * ctx = ctx_for(buft);

    uint64_t hash = KVT_HASH_START;

    const auto add_hash = [&](char tag, const auto & values) {
        hash = kvt_hash(hash, &tag, sizeof(tag));
        hash = kvt_hash(hash, values.data(), values.size() * sizeof(values[0]));
    };
    add_hash('m', vectors.mean);
    add_hash('s', vectors.scale);

    kvt_cond_layer & layer = layers[il];
    if (const kvt_k_basis * basis = vectors.basis.get()) {
        const int64_t n = basis->rows.size() / basis->row_scale.size();

        add_hash('b', basis->rows);
        add_hash('r', basis->row_scale);
        const ggml_type type = kvt_basis_type(*basis, type_k);
        layer.basis_k        = add_tensor(ctx, "basis_k", il, type, { n, n, n_head_kv }, basis->of_k);
        layer.basis_q        = add_tensor(ctx, "basis_q", il, type, { n, n, n_head_kv }, basis->of_q);
    }
    const auto vector = [&](const char * name, const std::vector<float> & values) {
        return add_tensor(ctx, name, il, GGML_TYPE_F32, { (int64_t) values.size() / n_head_kv, n_head_kv }, values);
    };
    layer.mean   = vector("mean", vectors.mean);
    layer.hash   = hash;
    layer.in_one = kvt_cond_in_one(buft);
    if (layer.basis_k) {
        return &layer;
    }

    std::vector<float> scale_inv(vectors.scale.size());
    for (size_t i = 0; i < scale_inv.size(); i++) {
        scale_inv[i] = 1.0f / vectors.scale[i];
    }

    layer.scale     = vector("scale", vectors.scale);
    layer.scale_inv = vector("scale_inv", scale_inv);
    return &layer;
}

bool kvt_takes_basis(ggml_type type) {
#define KVT_TYPE_IS(NAME) || type == GGML_TYPE_##NAME
    return !ggml_is_quantized(type) KVT_GROUP_TYPES(KVT_TYPE_IS);
#undef KVT_TYPE_IS
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
        if (no_alloc) {
            continue;
        }
        if (t->type == GGML_TYPE_F16) {
            std::vector<ggml_fp16_t> halves(values.size());
            ggml_fp32_to_fp16_row(values.data(), halves.data(), values.size());
            ggml_backend_tensor_set(t, halves.data(), 0, ggml_nbytes(t));
        } else {
            ggml_backend_tensor_set(t, values.data(), 0, ggml_nbytes(t));
        }
    }
    data.clear();
}

//
// graph
//

// m [n, n, n_head_kv] times x [n, n_head, n_tokens], whose neighbours share a matrix
static ggml_tensor * kvt_in_basis(ggml_context * ctx, ggml_tensor * m, ggml_tensor * x) {
    GGML_ASSERT(x->ne[0] == m->ne[0] && x->ne[1] % m->ne[2] == 0 && x->ne[3] == 1);
    if (x->ne[2] == 1) {
        x = ggml_is_contiguous(x) ? x : ggml_cont(ctx, x);
        x = ggml_reshape_3d(ctx, x, x->ne[0], x->ne[1] / m->ne[2], m->ne[2]);
        x = ggml_mul_mat(ctx, m, x);
        return ggml_reshape_3d(ctx, x, x->ne[0], x->ne[1] * x->ne[2], 1);
    }
    x = ggml_cont(ctx, ggml_permute(ctx, x, 0, 2, 1, 3)); // a head's tokens beside each other: one large product
    return ggml_cont(ctx, ggml_permute(ctx, ggml_mul_mat(ctx, m, x), 0, 2, 1, 3));
}

ggml_tensor * kvt_cond_k(ggml_context * ctx, const kvt_cond_layer * cond, ggml_tensor * k) {
    if (!cond || !k) {
        return k;
    }
    if (cond->mean) {
        k = ggml_sub(ctx, k, cond->mean);
    }
    if (cond->basis_k) {
        return kvt_in_basis(ctx, cond->basis_k, k);
    }
    return cond->scale_inv ? ggml_mul(ctx, k, cond->scale_inv) : k;
}

ggml_tensor * kvt_cond_k_undo(ggml_context * ctx, const kvt_cond_layer * cond, ggml_tensor * k) {
    if (!cond || !k) {
        return k;
    }
    if (cond->basis_q) { // its transpose is the inverse of basis_k
        k = kvt_in_basis(ctx, ggml_cont(ctx, ggml_transpose(ctx, cond->basis_q)), k);
    }
    if (cond->scale) {
        k = ggml_mul(ctx, k, cond->scale);
    }
    return cond->mean ? ggml_add(ctx, k, cond->mean) : k;
}

static ggml_tensor * kvt_cond_q(ggml_context * ctx, const kvt_cond_layer * cond, ggml_tensor * q) {
    if (cond && cond->basis_q) {
        return kvt_in_basis(ctx, cond->basis_q, q);
    }
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

// so many tokens at most: more are faster in products of matrices
static constexpr int64_t KVT_COND_IN_ONE_TOKENS = 8;

// whether it was done: a token's work is less than the barriers between its steps
static bool kvt_cond_qk_in_one(ggml_context * ctx, const kvt_cond_layer & cond, ggml_tensor *& q, ggml_tensor *& k) {
    ggml_tensor * of_q = cond.basis_q ? cond.basis_q : cond.scale;
    ggml_tensor * of_k = cond.basis_k ? cond.basis_k : cond.scale_inv;
    if (!cond.in_one || !of_q || q->ne[2] > KVT_COND_IN_ONE_TOKENS || q->ne[0] > KVT_COND_MAX_HEAD_DIM) {
        return false;
    }
    const auto is_row = [](const ggml_tensor * t) { return t->type == GGML_TYPE_F32 && t->nb[0] == sizeof(float) && t->ne[3] == 1; };
    if (!is_row(q) || !is_row(k)) {
        return false;
    }
    ggml_tensor * args[] = { q, k, of_q, of_k, cond.mean };
    ggml_tensor * both =
            ggml_custom_4d(ctx, GGML_TYPE_F32, ggml_nelements(q) + ggml_nelements(k), 1, 1, 1, args, cond.mean ? 5 : 4, cond.in_one, GGML_N_TASKS_MAX, nullptr);

    const auto part = [&](const ggml_tensor * t, size_t offset) {
        return ggml_view_3d(ctx, both, t->ne[0], t->ne[1], t->ne[2], t->ne[0] * sizeof(float), t->ne[0] * t->ne[1] * sizeof(float), offset);
    };
    const size_t size_q = ggml_nelements(q) * sizeof(float);
    q                   = part(q, 0);
    k                   = part(k, size_q);
    return true;
}

void kvt_cond_qk(ggml_context * ctx, const kvt_cond_layer * cond, ggml_tensor *& q, ggml_tensor *& k) {
    if (cond && k && kvt_cond_qk_in_one(ctx, *cond, q, k)) {
        return;
    }
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
        LLAMA_LOG_ERROR("%s: layer %u: the state's K has a mean, scale or basis of %016" PRIx64 ", this context's has %016" PRIx64 ": it was saved under another plan. Load it where it was saved, or process the prompt again\n",
                __func__, il, hash, cond->hash);
        return false;
    }
    return true;
}
