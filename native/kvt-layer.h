// kvt-layer.h - what llama_kv_cache keeps of ours for each layer (C++, inside libllama only)
#pragma once

struct kvt_cond_layer;

struct kvt_layer {
    bool rot_k = false; // K and V are Hadamard-rotated before they are written
    bool rot_v = false;

    const kvt_cond_layer * cond = nullptr; // how K is conditioned before it is written, null = not
};
