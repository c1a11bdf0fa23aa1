// kvt-cache.cpp - which types a cache allocates, layer by layer, and why not the planned ones
#include "kvt-cache.h"
#include "kvt-arch.h"
#include "kvt-plan.h"
#include "kvt-refuses.h"
#include "kvt-text.h"

#include "llama-impl.h"
#include "llama-model.h"

kvt_cache::kvt_cache(const llama_model & model, const llama_hparams & hparams, ggml_type type_k, ggml_type type_v, bool v_trans, bool offload) :
    model(model), hparams(hparams), plan(model.kvt), type_k(type_k), type_v(type_v), v_trans(v_trans), offload(offload) {
    // a cache with hparams of its own (an indexer) is not what the plan speaks of
    const bool applies = plan && plan->in_force() && &hparams == &model.hparams;

    // an explicit type makes its side uniform; f16 cannot be told from "not given"
    plan_k = applies && type_k == GGML_TYPE_F16;
    plan_v = applies && type_v == GGML_TYPE_F16;
}

// why the layer's device can not write these types, or attend over the pair; null if it can
static const char * kvt_layer_refuses(const llama_model & model, const llama_hparams & hparams, uint32_t il, bool offload, bool fa, ggml_type type_k, ggml_type type_v) {
    ggml_backend_dev_t dev = offload ? model.dev_layer(il) : ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
    if (!dev) {
        return nullptr;
    }
    const kvt_pair_of_layer pair = {
        type_k,
        type_v,
        (int32_t) hparams.n_head(il),
        (int32_t) hparams.n_head_kv(il),
        (int32_t) hparams.n_embd_head_k(il),
        (int32_t) hparams.n_embd_head_v(il),
        fa,
        hparams.f_max_alibi_bias,
        hparams.attn_soft_cap ? hparams.f_attn_logit_softcapping : 0.0f,
    };
    switch (kvt_device_refuses(dev, &pair)) {
        case KVT_REFUSES_NOTHING: return nullptr;
        case KVT_REFUSES_AS_IT_IS: return "the layer's device has no decoding kernel for this pair and head size, and would convert it at every step";
        case KVT_REFUSES_ALL: return "the layer's device did not say whether it has a kernel for this pair";
        default: return "the layer's device has no kernel for this pair";
    }
}

// the planned type of one side, or f16 with a reason
ggml_type kvt_cache::accept(uint32_t il, const char * side, ggml_type type, uint32_t head_dim, bool needs_fa) {
    if (type == KVT_TYPE_NONE || !ggml_is_quantized(type)) {
        return type == KVT_TYPE_NONE ? GGML_TYPE_F16 : type;
    }
    if (head_dim % ggml_blck_size(type) != 0) {
        departures[format("%s %s: head_dim %u is not a multiple of its block of %d: f16 there", side, ggml_type_name(type), head_dim, (int) ggml_blck_size(type))].push_back(il);
        return GGML_TYPE_F16;
    }
    if (needs_fa && v_trans) {
        departures[format("%s %s needs flash attention, which is off: turn it on (-fa on, flash_attn=True): f16 there", side, ggml_type_name(type))].push_back(il);
        return GGML_TYPE_F16;
    }
    if (needs_fa && kvt_arch_has(model.arch, KVT_ARCH_KQ_BIAS)) {
        departures[format("%s %s: this architecture has a bias on KQ, so its attention is not fused: f16 there", side, ggml_type_name(type))].push_back(il);
        return GGML_TYPE_F16;
    }
    return type;
}

kvt_cache_types kvt_cache::types(uint32_t il) {
    kvt_cache_types res = { type_k, type_v };
    if (!in_force() || hparams.n_head_kv(il) == 0) { // a layer without attention (deci) has a cache of no values
        return res;
    }

    const bool is_mla = hparams.is_mla(); // K is also V: one tensor, under the rules of both

    if (plan_k) {
        res.k = accept(il, "K", plan->type_k[il], hparams.n_embd_head_k(il), is_mla);
    }
    if (plan_v) {
        res.v = is_mla ? res.k : accept(il, "V", plan->type_v[il], hparams.n_embd_head_v(il), true);
    }

    if (const char * reason = kvt_layer_refuses(model, hparams, il, offload, !v_trans, res.k, res.v)) {
        departures[format("%s/%s: %s: f16 there", ggml_type_name(res.k), ggml_type_name(res.v), reason)].push_back(il);
        res.k = plan_k ? GGML_TYPE_F16 : res.k;
        res.v = plan_v ? GGML_TYPE_F16 : res.v;
    }

    types_k[il] = res.k;
    quantized_v = quantized_v || ggml_is_quantized(res.v);

    return res;
}

// the vectors of layer il's K, in buft; null if K is cached as it is
const kvt_cond_layer * kvt_cache::cond(uint32_t il, ggml_backend_buffer_type_t buft) {
    if (!plan_k || plan->k_vectors.empty() || plan->k_vectors[il].empty() || hparams.n_head_kv(il) == 0) {
        return nullptr;
    }
    if (hparams.n_lora_kv > 0 || hparams.is_mla()) {
        departures["K cannot be conditioned with MLA: it is cached as it is"].push_back(il);
        return nullptr;
    }
    if (model.split_mode() == LLAMA_SPLIT_MODE_TENSOR) {
        departures["K cannot be conditioned where heads are split over devices (-sm tensor): it is cached as it is"].push_back(il);
        return nullptr;
    }

    kvt_k_vectors vectors = plan->k_vectors[il];
    if (!kvt_takes_basis(types_k.at(il))) {
        vectors.basis = nullptr;
    }

    // the mean shifts all scores of a query alike, which softmax ignores: unless they are capped, or compete with a sink
    const bool capped = hparams.attn_soft_cap || kvt_arch_has(model.arch, KVT_ARCH_CAPPED);
    const bool sinks  = il < model.layers.size() && model.layers[il].attn_sinks;
    if (!vectors.mean.empty() && (capped || sinks)) {
        departures[format("the mean of K is left in, since the attention has %s; the rest applies", sinks ? "sinks" : "a soft cap")].push_back(il);
        vectors.mean.clear();
    }
    return vectors.empty() ? nullptr : k_cond.add(il, vectors, types_k.at(il), hparams.n_head_kv(il), buft);
}

kvt_layer kvt_cache::layer(uint32_t il, ggml_backend_buffer_type_t buft) {
    const kvt_cond_layer * res  = cond(il, buft);
    const auto             type = types_k.find(il);

    if (type != types_k.end() && ggml_is_quantized(type->second) && !(res && res->basis_k)) {
        quantized_k = true;
        if (plan_k && kvt_takes_basis(type->second)) {
            departures[format("K %s without a basis, in which its groups would hold what matters: it loses much. Calibrate again", ggml_type_name(type->second))].push_back(il);
        }
    }
    return { false, false, res };
}

void kvt_cache::cond_alloc() {
    k_cond.alloc(hparams.no_alloc);
}

void kvt_cache::cond_memory(std::map<ggml_backend_buffer_type_t, size_t> & sizes) const {
    for (const auto & [buft, size] : k_cond.memory()) {
        sizes[buft] += size;
    }
}

std::vector<std::string> kvt_cache::notes() const {
    std::vector<std::string> res;
    for (const auto & [reason, il] : departures) {
        res.push_back(format("layers %s: %s", kvt_layer_ranges(il).c_str(), reason.c_str()));
    }
    return res;
}

void kvt_cache::warn() const {
    for (const auto & note : notes()) {
        LLAMA_LOG_WARN("%s: %s\n", __func__, note.c_str());
    }
}

bool kvt_cache::can_shift() const {
    // MLA: what RoPE touches is not at the start of the head, and a part of a quantized head cannot be copied back
    return hparams.n_lora_kv == 0 || !any_quantized_k();
}
