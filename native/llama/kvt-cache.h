// kvt-cache.h - the types of one cache, made from the plan of its model (C++, inside libllama only)
#pragma once

#include "kvt-cond.h"
#include "kvt-layer.h"
#include "kvt-names.h"

#include "ggml.h"
#include "ggml-backend.h"

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

struct kvt_plan;
struct llama_hparams;
struct llama_model;

struct kvt_cache_types {
    ggml_type k;
    ggml_type v;
};

// decides the types of each layer of one llama_kv_cache, and remembers where and why it left the plan
struct kvt_cache {
    kvt_cache(const llama_model & model, const llama_hparams & hparams, ggml_type type_k, ggml_type type_v, bool v_trans, bool offload);

    // the types to allocate for layer il
    kvt_cache_types types(uint32_t il);

    // true if K or V of this cache may differ from layer to layer
    bool in_force() const { return plan_k || plan_v; }

    // whether a context shift is possible
    bool can_shift() const;

    // true if the cache may need the Hadamard rotation of a side
    bool any_quantized_k() const { return ggml_is_quantized(type_k) || quantized_k; }
    bool any_quantized_v() const { return ggml_is_quantized(type_v) || quantized_v; }

    // decide which sides of the layers are rotated; attn_rot: whether the cache rotates them at all
    // shared: whether a layer is another cache's, and as its owner has it
    template <typename L, typename F>
    void rotate(std::vector<L> & layers, bool attn_rot_k, bool attn_rot_v, const F & shared) const {
        for (L & layer : layers) {
            if (!shared(layer.il)) {
                layer.kvt.rot_k = rotated(attn_rot_k, layer.k->type) && !(layer.kvt.cond && layer.kvt.cond->basis_k);
                layer.kvt.rot_v = layer.v && rotated(attn_rot_v, layer.v->type);
            }
        }
    }

    // what to keep of layer il, whose types() were asked for before, and whose tensors are in buft; not rotated yet
    kvt_layer layer(uint32_t il, ggml_backend_buffer_type_t buft);

    // the vectors of K, once all layers are known
    void cond_alloc();

    // add what the vectors take to the bytes of each buffer type
    void cond_memory(std::map<ggml_backend_buffer_type_t, size_t> & sizes) const;

    // one warning per reason
    void warn() const;

    // "layers 0-3: ..." one per reason
    std::vector<std::string> notes() const;

private:
    const llama_model &   model;
    const llama_hparams & hparams;

    std::shared_ptr<const kvt_plan> plan;

    const ggml_type type_k;
    const ggml_type type_v;

    const bool v_trans;
    const bool offload;

    bool plan_k = false; // the plan decides this side
    bool plan_v = false;

    bool quantized_k = false; // some layer was given a quantized type, and no basis, which is in the place of the rotation
    bool quantized_v = false;

    std::map<std::string, std::vector<uint32_t>> departures; // from the plan: what is done instead, and why -> layers

    kvt_cond k_cond;

    std::map<uint32_t, ggml_type> types_k; // of K, as types() gave them

    bool rotated(bool attn_rot, ggml_type type) const { return attn_rot && (!in_force() || ggml_is_quantized(type)); }

    const kvt_cond_layer * cond(uint32_t il, ggml_backend_buffer_type_t buft);

    ggml_type accept(uint32_t il, const char * side, ggml_type type, uint32_t head_dim, bool needs_fa);
};
