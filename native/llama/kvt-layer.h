// kvt-layer.h - what llama_kv_cache keeps of ours for each layer (C++, inside libllama only)
#pragma once

struct ggml_context;
struct ggml_tensor;

struct kvt_cond_layer;

struct kvt_layer {
    bool rot_k = false; // K and V are Hadamard-rotated before they are written
    bool rot_v = false;

    const kvt_cond_layer * cond = nullptr; // how K is conditioned before it is written, null = not
};

// a context shift of K: does it copy whole heads, also where RoPE touches a part of them? does it go through f32 (backends have RoPE
// for f32 and f16 only)?
bool kvt_shift_whole(const ggml_tensor * k, const kvt_layer & kvt);
bool kvt_shift_f32  (const ggml_tensor * k, const kvt_layer & kvt);

// K as it was before it was written (not rotated, not conditioned), and back; rot: the Hadamard matrix, null = none in this cache
ggml_tensor * kvt_shift_read (ggml_context * ctx, const kvt_layer & kvt, ggml_tensor * rot, ggml_tensor * k);
ggml_tensor * kvt_shift_write(ggml_context * ctx, const kvt_layer & kvt, ggml_tensor * rot, ggml_tensor * k);
