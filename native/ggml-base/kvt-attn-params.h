// kvt-attn-params.h - what ggml_flash_attn_ext is told besides its tensors, for each of our kernels. C++ and CUDA
#pragma once

#include "kvt-blocks.h"

struct kvt_attn_params {
    float   scale; // of scores, divided by softcap where there is one
    float   max_bias, softcap;
    int32_t n_head;
};

static inline kvt_attn_params kvt_attn_params_of(const ggml_tensor * dst) {
    kvt_attn_params p;
    memcpy(&p.scale, (const float *) dst->op_params + 0, sizeof(float));
    memcpy(&p.max_bias, (const float *) dst->op_params + 1, sizeof(float));
    memcpy(&p.softcap, (const float *) dst->op_params + 2, sizeof(float));
    if (p.softcap != 0.0f) {
        p.scale /= p.softcap;
    }
    p.n_head = dst->src[0]->ne[2];
    return p;
}

// of ALiBi, as in ggml's soft_max
KVT_FN float kvt_attn_slope(const kvt_attn_params & p, int32_t head) {
    if (p.max_bias <= 0.0f) {
        return 1.0f;
    }
    int32_t n_log2 = 1;
    while (2 * n_log2 <= p.n_head) {
        n_log2 *= 2;
    }
    return head < n_log2 ? powf(powf(2.0f, -p.max_bias / n_log2), head + 1) : powf(powf(2.0f, -p.max_bias / 2.0f / n_log2), 2 * (head - n_log2) + 1);
}
