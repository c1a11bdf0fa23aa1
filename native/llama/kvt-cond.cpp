// kvt-cond.cpp - conditioning of K: read from metadata, kept beside the cache, applied in the graph
#include "kvt-cond.h"
#include "kvt.h"
#include "kvt-hash.h"
#include "kvt-plan.h"

#include "llama-impl.h"
#include "llama-hparams.h"
#include "llama-io.h"
#include "llama-model.h"
#include "llama-model-loader.h"

#include "gguf.h"

#include <algorithm>
#include <cinttypes>
#include <cmath>
#include <cstring>
#include <stdexcept>

// what is beyond is no calibration's. kvectors.py has the same bounds
static const float KVT_MEAN_MAX     = 65504.0f; // K is measured in f16
static const float KVT_SCALE_MIN    = 1e-4f;
static const float KVT_SCALE_MAX    = 1e4f;
static const float KVT_SCALE_SPREAD = 1.001e6f; // largest over smallest in a head; a calibration stays 1e3 to either side, but for rounding

//
// vectors
//

std::string kvt_k_vectors_fault(const kvt_k_vectors & vectors, const llama_hparams & hparams, uint32_t il) {
    const size_t n_have = hparams.has_kv(il) ? hparams.n_embd_k_gqa(il) : 0;

    for (const auto * v : { &vectors.mean, &vectors.scale }) {
        const char * side = v == &vectors.mean ? "mean" : "scale";
        if (!v->empty() && v->size() != n_have) {
            return format("layer %u: %s of K has %zu values, the layer's K has %zu", il, side, v->size(), n_have);
        }
        for (size_t i = 0; i < v->size(); i++) {
            const float x = (*v)[i];
            if (!std::isfinite(x)) {
                return format("layer %u: %s of K in channel %zu is %f, need a finite number", il, side, i, x);
            }
            if (v == &vectors.mean && std::fabs(x) > KVT_MEAN_MAX) {
                return format("layer %u: mean of K in channel %zu is %g, need %g to %g", il, i, x, -KVT_MEAN_MAX, KVT_MEAN_MAX);
            }
            if (v == &vectors.scale && !(x >= KVT_SCALE_MIN && x <= KVT_SCALE_MAX)) {
                return format("layer %u: scale of K in channel %zu is %g, need %g to %g", il, i, x, KVT_SCALE_MIN, KVT_SCALE_MAX);
            }
        }
    }
    const auto & scale = vectors.scale;
    const size_t n_head_dim = hparams.n_embd_head_k(il); // 0 in a file without head counts
    for (size_t i = 0; n_head_dim > 0 && i + n_head_dim <= scale.size(); i += n_head_dim) {
        const auto [low, high] = std::minmax_element(scale.begin() + i, scale.begin() + i + n_head_dim);
        if (*high > *low*KVT_SCALE_SPREAD) {
            return format("layer %u: scale of K in head %zu is %g to %g, need a factor of 1e6 at most", il, i/n_head_dim, *low, *high);
        }
    }
    return "";
}

// the array of one key, cut into layers by KEY.n_values. false, with a note, if it cannot be used; true if there is none
static bool kvt_read_vectors(const gguf_context * gguf, const std::string & key, uint32_t n_layer, std::vector<std::vector<float>> & layers, std::vector<std::string> & notes) {
    layers.assign(n_layer, {});

    const std::string key_n = key + ".n_values";

    const int64_t kid   = gguf_find_key(gguf, key.c_str());
    const int64_t kid_n = gguf_find_key(gguf, key_n.c_str());
    if (kid < 0 && kid_n < 0) {
        return true;
    }
    if (kid < 0 || kid_n < 0) {
        notes.push_back(format("%s is missing", kid < 0 ? key.c_str() : key_n.c_str()));
        return false;
    }
    const auto arr_type = [&](int64_t id) {
        return gguf_get_kv_type(gguf, id) == GGUF_TYPE_ARRAY ? gguf_get_arr_type(gguf, id) : GGUF_TYPE_COUNT;
    };
    if (arr_type(kid) != GGUF_TYPE_FLOAT32) {
        notes.push_back(format("%s is not an array of f32", key.c_str()));
        return false;
    }
    if (arr_type(kid_n) != GGUF_TYPE_UINT32) {
        notes.push_back(format("%s is not an array of u32", key_n.c_str()));
        return false;
    }
    if (gguf_get_arr_n(gguf, kid_n) != n_layer) {
        notes.push_back(format("%s has %zu entries, the model has %u layers", key_n.c_str(), gguf_get_arr_n(gguf, kid_n), n_layer));
        return false;
    }

    std::vector<uint32_t> n_values(n_layer);
    memcpy(n_values.data(), gguf_get_arr_data(gguf, kid_n), n_layer*sizeof(uint32_t));

    uint64_t sum = 0;
    for (const uint32_t n : n_values) {
        sum += n;
    }
    if (sum != gguf_get_arr_n(gguf, kid)) {
        notes.push_back(format("%s has %zu values, %s adds up to %" PRIu64, key.c_str(), gguf_get_arr_n(gguf, kid), key_n.c_str(), sum));
        return false;
    }

    const char * data = (const char *) gguf_get_arr_data(gguf, kid);
    for (uint32_t il = 0; il < n_layer; il++) {
        layers[il].resize(n_values[il]);
        if (n_values[il] > 0) { // an empty vector's memory is null
            memcpy(layers[il].data(), data, n_values[il]*sizeof(float));
        }
        data += n_values[il]*sizeof(float);
    }
    return true;
}

void kvt_cond_read(const llama_model_loader & ml, const llama_hparams & hparams, kvt_plan & plan) {
    const uint32_t n_layer = hparams.n_layer_all;

    std::vector<std::vector<float>> mean;
    std::vector<std::vector<float>> scale;

    bool ok = kvt_read_vectors(ml.metadata, "kvtuner.k_mean",  n_layer, mean,  plan.notes) &&
              kvt_read_vectors(ml.metadata, "kvtuner.k_scale", n_layer, scale, plan.notes);

    std::vector<kvt_k_vectors> vectors(n_layer);
    for (uint32_t il = 0; ok && il < n_layer; il++) {
        vectors[il] = { std::move(mean[il]), std::move(scale[il]) };

        const std::string fault = kvt_k_vectors_fault(vectors[il], hparams, il);
        if (!fault.empty()) {
            plan.notes.push_back(fault);
            ok = false;
        }
    }
    if (!ok) {
        plan.notes.back() += ": K is not conditioned. Calibrate again";
        return;
    }
    plan.k_vectors = std::move(vectors);
}

bool kvt_cond_override(const std::string & key, const llama_model_kv_override & o, kvt_plan & plan) {
    const bool is_mean = key == "kvtuner.k_mean";
    if (!is_mean && key != "kvtuner.k_scale") {
        return false;
    }
    if (o.tag != LLAMA_KV_OVERRIDE_TYPE_BOOL) {
        plan.notes.push_back(format("override %s is not a bool: it is ignored", key.c_str()));
        return true;
    }
    for (auto & vectors : plan.k_vectors) {
        if (!o.val_bool) {
            (is_mean ? vectors.mean : vectors.scale).clear();
        }
    }
    return true;
}

int32_t kvt_model_set_k_vectors(llama_model * model, int32_t il, const float * mean, const float * scale, int32_t n_values) {
    if (!model || il < 0 || il >= (int32_t) model->hparams.n_layer_all || n_values < 0) {
        return kvt_error(KVT_E_ARG, format("kvt_model_set_k_vectors: model is null, layer %d is not one of it, or n_values %d is negative", il, n_values));
    }
    if (!model->kvt || !model->kvt->in_force()) {
        return kvt_error(KVT_E_STATE, "kvt_model_set_k_vectors: no plan is in force. Set the types first");
    }

    kvt_k_vectors vectors;
    if (mean)  { vectors.mean .assign(mean,  mean  + n_values); }
    if (scale) { vectors.scale.assign(scale, scale + n_values); }

    const std::string fault = kvt_k_vectors_fault(vectors, model->hparams, il);
    if (!fault.empty()) {
        return kvt_error(KVT_E_ARG, fault);
    }

    auto plan = std::make_shared<kvt_plan>(*model->kvt); // contexts that exist keep the old one
    plan->k_vectors.resize(model->hparams.n_layer_all);
    plan->k_vectors[il] = std::move(vectors);
    model->kvt = std::move(plan);
    return 0;
}

int32_t kvt_model_rope(const llama_model * model, int32_t il, int32_t * n_rot, bool * far) {
    if (!model || !n_rot || !far || il < 0 || il >= (int32_t) model->hparams.n_layer_all) {
        return kvt_error(KVT_E_ARG, format("kvt_model_rope: an argument is null, or layer %d is not one of the model", il));
    }
    const llama_hparams & hparams = model->hparams;

    *n_rot = hparams.rope_type != LLAMA_ROPE_TYPE_NONE && hparams.has_rope(il) ? hparams.n_rot(il) : 0;
    *far   = hparams.rope_type != LLAMA_ROPE_TYPE_NORM; // NEOX, and those made of it
    return 0;
}

//
// tensors
//

ggml_context * kvt_cond::ctx_for(ggml_backend_buffer_type_t buft) {
    auto & ctx = ctxs[buft];
    if (!ctx) {
        ggml_init_params params = {
            /*.mem_size   =*/ 3*LLAMA_MAX_LAYERS*ggml_tensor_overhead(),
            /*.mem_buffer =*/ nullptr,
            /*.no_alloc   =*/ true,
        };
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
        ggml_tensor * t = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, values.size()/n_head_kv, n_head_kv);
        ggml_format_name(t, "k_%s_l%u", name, il);
        data.emplace_back(t, values);
        return t;
    };
    const auto add_hash = [&](char tag, const std::vector<float> & values) {
        hash = kvt_hash(hash, &tag, sizeof(tag));
        hash = kvt_hash(hash, values.data(), values.size()*sizeof(float));
    };

    std::vector<float> scale_inv(vectors.scale.size());
    for (size_t i = 0; i < scale_inv.size(); i++) {
        scale_inv[i] = 1.0f/vectors.scale[i];
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
            buf = ggml_backend_buft_alloc_buffer(buft, 0);
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
    const int64_t n_rep     = n_head/n_head_kv; // neighbours share a KV head

    GGML_ASSERT(q->ne[0] == scale->ne[0] && n_head % n_head_kv == 0 && q->ne[3] == 1);

    if (n_rep == 1 || n_head_kv == 1) {
        return ggml_mul(ctx, q, scale);
    }
    const int64_t n_tokens = q->ne[2];

    q     = ggml_view_4d(ctx, q, q->ne[0], n_rep, n_head_kv, n_tokens, q->nb[1], q->nb[1]*n_rep, q->nb[2], 0);
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
