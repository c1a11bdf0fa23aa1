// kvt-cond.h - conditioning of K: what is done to it between RoPE and the cache, and to Q to match (C++, inside libllama only)
//
//   K becomes (K - mean)/scale, Q becomes Q*scale. The scale cancels in Q*K; the mean shifts all scores of a query by the
//   same Q*mean, which softmax ignores. So attention is the same, of a K that is easier to quantize.
//
//   With a basis K becomes M*(K - mean), and Q is multiplied by the inverse transpose of M, which holds the scale and the rotation, too:
//   for types whose groups of channels have bits of their own, and where K is not quantized. Other types keep to the scale.
#pragma once

#include "kvt-vectors.h"

#include "ggml.h"
#include "ggml-backend.h"
#include "ggml-cpp.h"

#include <cstdint>
#include <map>
#include <utility>
#include <vector>

struct llama_io_read_i;
struct llama_io_write_i;

// a layer's vectors as tensors [head_dim, n_head_kv] beside the layer's cache; null = none
struct kvt_cond_layer {
    ggml_tensor * mean      = nullptr;
    ggml_tensor * scale     = nullptr;
    ggml_tensor * scale_inv = nullptr;

    ggml_tensor * basis_k = nullptr; // [head_dim, head_dim, n_head_kv], in the place of the scale and the rotation
    ggml_tensor * basis_q = nullptr;

    ggml_custom_op_t in_one = nullptr; // all of it in one op, for a few tokens: on the CPU

    uint64_t hash = 0; // of the vectors: a state tells by it how its K was conditioned
};

// the vectors of one cache, in the buffer types of its layers
struct kvt_cond {
    // tensors for a layer whose K is cached in type_k; no data before alloc()
    const kvt_cond_layer * add(uint32_t il, const kvt_k_vectors & vectors, ggml_type type_k, int64_t n_head_kv, ggml_backend_buffer_type_t buft);

    // one buffer per type, filled. no_alloc: sizes only
    void alloc(bool no_alloc);

    const std::map<ggml_backend_buffer_type_t, size_t> & memory() const { return sizes; }

private:
    ggml_context * ctx_for(ggml_backend_buffer_type_t buft);

    std::map<uint32_t, kvt_cond_layer>                        layers; // nodes stay where they are
    std::map<ggml_backend_buffer_type_t, ggml_context_ptr>    ctxs;
    std::vector<ggml_backend_buffer_ptr>                      bufs;
    std::map<ggml_backend_buffer_type_t, size_t>              sizes;
    std::vector<std::pair<ggml_tensor *, std::vector<float>>> data; // until alloc()

    ggml_tensor * add_tensor(ggml_context * ctx, const char * name, uint32_t il, ggml_type type, std::vector<int64_t> ne, const std::vector<float> & values);
};

// whether a K of this type is cached in its layer's basis, if there is one
bool kvt_takes_basis(ggml_type type);

// graph operations; cond or k may be null, which changes nothing
//   k [head_dim, n_head_kv, n_tokens], q [head_dim, n_head, n_tokens]
ggml_tensor * kvt_cond_k(ggml_context * ctx, const kvt_cond_layer * cond, ggml_tensor * k);
ggml_tensor * kvt_cond_k_undo(ggml_context * ctx, const kvt_cond_layer * cond, ggml_tensor * k);
void          kvt_cond_qk(ggml_context * ctx, const kvt_cond_layer * cond, ggml_tensor *& q, ggml_tensor *& k);

// the hash in a state file, after the type id of a conditioned K; the read is false, with an error in the log, if it is another
void kvt_cond_state_write(llama_io_write_i & io, const kvt_cond_layer * cond);
bool kvt_cond_state_read(llama_io_read_i & io, const kvt_cond_layer * cond, uint32_t il);
