// kvt-layer.h - what llama_kv_cache keeps of ours for each layer, and what follows from it (C++, inside libllama only)
#pragma once

#include <cstdint>

struct ggml_context;
struct ggml_tensor;

struct kvt_cond_layer;

struct kvt_layer {
    bool rot_k = false; // K and V are Hadamard-rotated before they are written
    bool rot_v = false;

    const kvt_cond_layer * cond = nullptr; // how K is conditioned before it is written, null = not

    // the cache's rotations -> this layer's, null = not rotated
    void only_rotated(ggml_tensor *& k, ggml_tensor *& v) const {
        k = rot_k ? k : nullptr;
        v = rot_v ? v : nullptr;
    }
};

// a context shift of K: does it copy whole heads, also where RoPE touches a part of them? does it go through f32 (backends have RoPE
// for f32 and f16 only)?
bool kvt_shift_whole(const ggml_tensor * k, const kvt_layer & kvt);
bool kvt_shift_f32(const ggml_tensor * k, const kvt_layer & kvt);

// K as it was before it was written (not rotated, not conditioned), and back; rot: the Hadamard matrix, null = none in this cache
ggml_tensor * kvt_shift_read(ggml_context * ctx, const kvt_layer & kvt, ggml_tensor * rot, ggml_tensor * k);
ggml_tensor * kvt_shift_write(ggml_context * ctx, const kvt_layer & kvt, ggml_tensor * rot, ggml_tensor * k);

// the type id of a layer's K, or V, in a state file; n_embd_head: of all layers, 0 = they differ. differs from ggml's only where the
// data is not rotated though the default rule would rotate it, or is conditioned, so that such a state is never read as other data,
// and all others stay as stock writes them
int32_t kvt_state_type_k(const ggml_tensor * k, const kvt_layer & kvt, int32_t n_embd_head);
int32_t kvt_state_type_v(const ggml_tensor * v, const kvt_layer & kvt, int32_t n_embd_head);

// log why a state is refused
void kvt_state_refused(const char * side, uint32_t il, int32_t have, int32_t want);
