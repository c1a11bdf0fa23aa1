// kvt.h - the whole C ABI of kvtuner-gguf: per-layer K/V cache types for llama.cpp
//
// Ints, floats and pointers only. Nothing is thrown across it. Functions return 0 or a negative KVT_E_*; the text of the
// last error of the calling thread is kvt_last_error(). Strings that are returned live as long as the library, unless said.
// Thread safety: setting a plan on a model must not run beside the creation of a context of that model.
#pragma once

#include "llama.h"

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define KVT_E_ARG   (-1) // an argument is null or out of range
#define KVT_E_TYPE  (-2) // a type name is not known, or is no cache type
#define KVT_E_NONE  (-3) // there is no such thing here (a layer without KV of its own, a model without plan)
#define KVT_E_STATE (-4) // the object is not in a state for this call

// id of the pin, the patch series and the sources in native/ that this library was built from; Python refuses a mismatch
LLAMA_API const char * kvt_build_id(void);

LLAMA_API const char * kvt_last_error(void);

//
// cache types
//

// the types that a plan may hold, from the most to the least precise; NULL past the end
LLAMA_API const char * kvt_type_name(int32_t i);

// ggml's number of one of them, for type_k and type_v of llama_context_params
LLAMA_API int32_t kvt_type_number(const char * type);

// the run time's own codec, as the CPU writes and reads the cache. x and y: [n_rows, n_per_row], row-major
// kvt_encode writes n_rows*kvt_row_bytes() bytes to dst
LLAMA_API int64_t kvt_row_bytes(const char * type, int64_t n_per_row);
LLAMA_API int32_t kvt_encode(const char * type, const float * x, int64_t n_rows, int64_t n_per_row, void * dst);
LLAMA_API int32_t kvt_decode(const char * type, const void * src, int64_t n_rows, int64_t n_per_row, float * y);

//
// the plan of a model
//

// number of layers that a plan of this model has (block_count)
LLAMA_API int32_t kvt_model_n_layer(const struct llama_model * model);

// what RoPE does to K of layer il: the first n_rot channels of a head turn in pairs (0 = none); far: channel i with i + n_rot/2,
// else with its neighbour. Vectors that are equal within a pair commute with it
LLAMA_API int32_t kvt_model_rope(const struct llama_model * model, int32_t il, int32_t * n_rot, bool * far);

// positions that the model has a row for in a table that it learned; a token beyond them cannot be read. 0 = no table, no end
LLAMA_API int32_t kvt_model_n_pos(const struct llama_model * model);

// values of K and V that a token has at most, all layers together
LLAMA_API int64_t kvt_model_kv_values(const struct llama_model * model);

// set the plan for contexts that are created from now on; contexts that exist keep theirs
// type_k, type_v: n_layer names, "" where a layer is left at f16 or has no KV of its own
LLAMA_API int32_t kvt_model_set_plan(struct llama_model * model, const char * const * type_k, const char * const * type_v, int32_t n_layer);

// mean and scale of a layer's K, n_values = n_head_kv*head_dim each, NULL = none: K is cached as (K - mean)/scale, and Q
// multiplied by scale. Part of the plan in force, which kvt_model_set_plan starts without them (KVT_E_STATE if there is none)
LLAMA_API int32_t kvt_model_set_k_vectors(struct llama_model * model, int32_t il, const float * mean, const float * scale, int32_t n_values);

// basis of a layer's K: rows, n_values = n_head_kv*head_dim*head_dim, and a scale for each of the n_rows of them, NULL = none. K is cached as
// M*(K - mean), where row i of M is row_scale[i]*rows[i]/scale, and Q multiplied by the inverse transpose; where K has a type of groups
// (kB_N) or is not quantized. kvt_model_set_k_vectors, which comes before, takes it off
LLAMA_API int32_t kvt_model_set_k_basis(struct llama_model * model, int32_t il, const int8_t * rows, int32_t n_values, const float * row_scale, int32_t n_rows);

// the weights that the plan in force was calibrated on, as kvt_model_weights_hash names them: others make a note, and no error.
// KVT_E_STATE if there is no plan
LLAMA_API int32_t kvt_model_set_plan_weights(struct llama_model * model, const char * hash);

// 16 hex digits that name the model's tensors by their names, types and shapes. lives as long as the model's plan
LLAMA_API const char * kvt_model_weights_hash(const struct llama_model * model);

// names the model's weights by their values as well, of which it reads a few of each tensor: what K and V were computed with
LLAMA_API int32_t kvt_model_fingerprint(const struct llama_model * model, uint64_t * fingerprint);

// no plan for contexts that are created from now on
LLAMA_API int32_t kvt_model_clear_plan(struct llama_model * model);

// where the plan in force comes from: "file", "environment" (KVTUNER_GGUF_PLAN), "override", "api", or "none"
LLAMA_API const char * kvt_model_plan_source(const struct llama_model * model);

// the planned pair of a layer, before the rules of a context; "" for none. KVT_E_NONE if no plan is in force
LLAMA_API int32_t kvt_model_plan_layer(const struct llama_model * model, int32_t il, const char ** type_k, const char ** type_v);

// what was wrong with the plan when it was read: one line each, in buf; returns the length needed without the 0 (as snprintf)
LLAMA_API int32_t kvt_model_plan_notes(const struct llama_model * model, char * buf, int32_t size);

//
// what a context has allocated
//

// one layer as allocated. V of an MLA layer: type "", 0 bytes
struct kvt_layer_cache {
    const char * type_k;
    const char * type_v;
    uint64_t     bytes_k; // of the K and V tensors
    uint64_t     bytes_v;
    uint32_t     n_cells; // of the layer's cache, all streams
    int32_t      rot_k;   // size of the Hadamard block that K and V are rotated by before they are written; 0 = not rotated
    int32_t      rot_v;
};

// KVT_E_NONE if the layer has no KV of its own in this context
LLAMA_API int32_t kvt_ctx_layer(const struct llama_context * ctx, int32_t il, struct kvt_layer_cache * layer);

// how the K of layer il is conditioned in this context: 0, or the sum of what is in force. The scale is a part of the basis, if there is
// one. KVT_E_NONE as above
#define KVT_K_MEAN  1
#define KVT_K_SCALE 2
#define KVT_K_BASIS 4
LLAMA_API int32_t kvt_ctx_k_cond(const struct llama_context * ctx, int32_t il);

// 1 if all is there that a token of the sequence at position pos builds on, else 0: in every cache each earlier position that it
// may see, and of a recurrent memory the state that stands right before it. 0 means that the sequence must be read again
LLAMA_API int32_t kvt_ctx_holds(const struct llama_context * ctx, llama_seq_id seq_id, llama_pos pos);

// bytes of the buffers behind all attention caches of the context (with the buffers' padding; 0 with no_alloc)
LLAMA_API uint64_t kvt_ctx_buffer_bytes(const struct llama_context * ctx);

// bytes of a context, on all devices: of its model's weights, of its caches (also of recurrent layers, with the vectors of K that are in
// force), and of the buffers that it computes in. With no_alloc, what it would allocate
struct kvt_memory {
    uint64_t weights;
    uint64_t cache;
    uint64_t compute;
};

LLAMA_API int32_t kvt_ctx_memory(const struct llama_context * ctx, struct kvt_memory * memory);

// every fallback from the plan: one line each, in buf; returns the length needed without the 0 (as snprintf)
LLAMA_API int32_t kvt_ctx_notes(const struct llama_context * ctx, char * buf, int32_t size);

//
// tap: see the inputs and the output of every attention node, for calibration
//

struct kvt_tap;

// one attention node. pointers are valid during the call only; rows are dense, in this order:
//   q [n_head][n_q][head_dim_k] f32   k [n_head_kv][n_kv][head_dim_k] f16   v [n_head_kv][n_kv][head_dim_v] f16
//   mask [n_q][n_kv] f32, additive (NULL = none)   sinks [n_head] f32 (NULL = none)   out [n_head][n_q][head_dim_v] f32
struct kvt_tap_node {
    int32_t          il; // the layer whose cache is read
    int32_t          n_q, n_kv, n_head, n_head_kv, head_dim_k, head_dim_v;
    float            scale, max_bias, logit_softcap;
    const float *    q;
    const uint16_t * k;
    const uint16_t * v;
    const float *    mask;
    const float *    sinks;
    const float *    out;
};

typedef void (*kvt_tap_fn)(const struct kvt_tap_node * node, void * user);

// n_q_max: query rows that are handed over, spread evenly over the batch
LLAMA_API struct kvt_tap * kvt_tap_new(kvt_tap_fn fn, void * user, int32_t n_q_max);
LLAMA_API void             kvt_tap_free(struct kvt_tap * tap);

// off at first; the run time is slowed down only while it is on
LLAMA_API void kvt_tap_enable(struct kvt_tap * tap, bool on);

// text of what the tap could not hand over since it was enabled ("" = nothing)
LLAMA_API const char * kvt_tap_error(const struct kvt_tap * tap);

// share of the residual stream that a layer's attention makes up where it joins it: |branch|^2 / |sum|^2 of each token of
// the last batch, mean over tokens. KVT_E_NONE if it was not seen
LLAMA_API int32_t kvt_tap_share(const struct kvt_tap * tap, int32_t il, float * share);

// llama_context_params.cb_eval, with the tap as cb_eval_user_data; needs flash attention
LLAMA_API bool kvt_tap_eval(struct ggml_tensor * t, bool ask, void * tap);

//
// hidden states between layers, for runs of one text that differ in their upper layers alone: kept once, then taken
//

struct kvt_hidden;

// rows: [n_slot][n_rows][n_embd], the caller's, which outlive it: the states of n_rows tokens after every stride-th layer
LLAMA_API struct kvt_hidden * kvt_hidden_new(float * rows, int32_t n_slot, int32_t stride, int64_t n_rows, int32_t n_embd);
LLAMA_API void                kvt_hidden_free(struct kvt_hidden * hidden);

// llama_context_params.cb_eval, with the hidden states as cb_eval_user_data
LLAMA_API bool kvt_hidden_eval(struct ggml_tensor * t, bool ask, void * hidden);

// from now on runs keep theirs, from row 0 on: the same tokens, in batches of any size, as the runs that take them
LLAMA_API void kvt_hidden_keep(struct kvt_hidden * hidden);

// from now on runs take them from this row on, and begin with layer il, or one before: the one that is returned. 0: with the first, as
// nothing else was kept. For runs whose layers below are those of the run that was kept. A graph that lets no layer be left out is run whole
LLAMA_API int32_t kvt_hidden_start(struct kvt_hidden * hidden, int32_t il, int64_t row);

// rows that runs took since: 0 where they were whole, more than there are where they went wrong
LLAMA_API int64_t kvt_hidden_taken(const struct kvt_hidden * hidden);

//
// hosts over RPC: programs elsewhere that hold layers of a model, with their caches, and compute them
//

struct kvt_rpc_host {
    int32_t  n_devices;
    uint64_t free; // bytes of all its devices
    uint64_t total;
};

// models that are loaded from now on use the host's devices, before this machine's own, for as many layers as n_gpu_layers says. "HOST:PORT".
// KVT_E_NONE if it is not reached, or is of another build: the log says which
LLAMA_API int32_t kvt_rpc_use(const char * endpoint, struct kvt_rpc_host * host);

// "HOST:PORT" of one that the context's model has lost: it ended, or the network did. All is refused then until contexts and model are
// freed, after which the host is reached anew. NULL if none is
LLAMA_API const char * kvt_ctx_lost_host(struct llama_context * ctx);

// be such a host, for one client after another: its GPUs, or else its processors. cache_dir: where large tensors are kept, so that they are
// sent once; may be null. Does not return unless it fails
LLAMA_API int32_t kvt_rpc_serve(const char * endpoint, const char * cache_dir, int32_t n_threads);

#ifdef __cplusplus
}
#endif
