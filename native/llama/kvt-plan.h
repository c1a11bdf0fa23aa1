// kvt-plan.h - the plan of a model, and the types of one cache made from it (C++, inside libllama only)
#pragma once

#include "llama.h"
#include "ggml.h"

#include "kvt-cond.h"
#include "kvt-layer.h"

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

struct llama_model;
struct llama_model_loader;
struct llama_hparams;

// no type was planned for this layer and side
static const ggml_type KVT_TYPE_NONE = GGML_TYPE_COUNT;

// read-only once it hangs on a model, so that contexts and the model may share it
struct kvt_plan {
    const char * source = "none"; // "file", "override", "api", "none"

    std::vector<ggml_type>   type_k; // [n_layer], empty if no plan is in force
    std::vector<ggml_type>   type_v;
    std::vector<kvt_k_vectors> k_vectors; // [n_layer], empty if no layer's K is conditioned
    std::vector<std::string> notes;  // what was wrong with the metadata

    std::string weights; // names the model's tensors, whatever the plan

    bool in_force() const { return !type_k.empty(); }
};

// GGML_TYPE_COUNT if the name is not one of a cache type
ggml_type kvt_type_from_name(const char * name);

// read the plan of a model from its metadata and the overrides; never fails: a fault is a note, a warning, and f16
void kvt_plan_load(llama_model & model, const llama_model_loader & ml);

// flash attention "auto" becomes "on" where the plan needs it, as stock does for a quantized V
void kvt_plan_flash_attn(const llama_model & model, llama_context_params & params);

// names the tensors of a model by their names, types and shapes
std::string kvt_weights_hash(const llama_model_loader & ml);

// "0-3,7" for { 0, 1, 2, 3, 7 }
std::string kvt_layer_ranges(const std::vector<uint32_t> & il);

// set the calling thread's last error and return the code
int32_t kvt_error(int32_t code, const std::string & text);

// one line each, in buf, which may be null; returns the length needed without the 0 (as snprintf)
int32_t kvt_write_lines(const std::vector<std::string> & lines, char * buf, int32_t size);

//
// the types of one cache
//

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
                layer.kvt.rot_k =            rotated(attn_rot_k, layer.k->type);
                layer.kvt.rot_v = layer.v && rotated(attn_rot_v, layer.v->type);
            }
        }
    }

    // the vectors of layer il's K, in buft; null if K is cached as it is
    const kvt_cond_layer * cond(uint32_t il, ggml_backend_buffer_type_t buft);

    // once all layers are known
    void cond_alloc();

    // add what the vectors take to the bytes of each buffer type
    void cond_memory(std::map<ggml_backend_buffer_type_t, size_t> & sizes) const;

    // one warning per reason
    void warn() const;

    // "layers 0-3: ..." one per reason
    std::vector<std::string> notes() const;

private:
    const llama_model   & model;
    const llama_hparams & hparams;

    std::shared_ptr<const kvt_plan> plan;

    const ggml_type type_k;
    const ggml_type type_v;

    const bool v_trans;
    const bool offload;

    bool plan_k = false; // the plan decides this side
    bool plan_v = false;

    bool quantized_k = false; // some layer was given a quantized type
    bool quantized_v = false;

    std::map<std::string, std::vector<uint32_t>> departures; // from the plan: what is done instead, and why -> layers

    kvt_cond k_cond;

    bool rotated(bool attn_rot, ggml_type type) const { return attn_rot && (!in_force() || ggml_is_quantized(type)); }

    ggml_type accept(uint32_t il, const char * side, ggml_type type, uint32_t head_dim, bool needs_fa);
};

// names of the types that a cache holds, for a log line: "q8_0", or "q8_0 + q4_0"
std::string kvt_type_names(const std::vector<ggml_type> & types);

// of a side of layers, each a struct with the tensor at `side`; none: of a layer without one
template <typename L>
std::string kvt_type_names(const std::vector<L> & layers, ggml_tensor * L::*side, ggml_type none) {
    std::vector<ggml_type> types;
    for (const L & layer : layers) {
        types.push_back(layer.*side ? (layer.*side)->type : none);
    }
    return kvt_type_names(types);
}

// the type id of a layer's K, or V, in a state file; n_embd_head: of all layers, 0 = they differ. differs from ggml's only where the
// data is not rotated though the default rule would rotate it, or is conditioned, so that such a state is never read as other data,
// and all others stay as stock writes them
int32_t kvt_state_type_k(const ggml_tensor * k, const kvt_layer & kvt, int32_t n_embd_head);
int32_t kvt_state_type_v(const ggml_tensor * v, const kvt_layer & kvt, int32_t n_embd_head);

// log why a state is refused
void kvt_state_refused(const char * side, uint32_t il, int32_t have, int32_t want);
