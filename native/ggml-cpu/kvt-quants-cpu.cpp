// kvt-quants-cpu.cpp - ggml-cpu's side of our types: the same encoder, compiled for the machine, and the dot product with q8_0
#include "kvt-quants.h"
#include "kvt-groups.h"
#include "kvt-trellis.h"

#define GGML_COMMON_DECL_CPP
#include "ggml-common.h"

template <typename C>
static inline float kvt_dot_row_q8_0(const void * x, const void * y, int64_t k) {
    const block_q8_0 * q   = (const block_q8_0 *) y;
    float              res = 0.0f;
    for (int64_t ib = 0; ib < k / C::n; ib++) {
        const typename C::block_t * b = (const typename C::block_t *) x + ib;
        int8_t                      l[C::n];
        C::levels(b, l);
        float dot = 0.0f;
        for (int i = 0; i < C::n; i += QK8_0, q++) {
            int32_t sum = 0;
            for (int j = 0; j < QK8_0; j++) {
                sum += (int) l[i + j] * q->qs[j];
            }
            dot += ggml_fp16_to_fp32(q->d) * sum;
        }
        res += kvt_from_half(KVT_HALF_OF(b->d)) * dot;
    }
    return res;
}

#define KVT_CPU(NAME, name, number, n, bits) \
    void kvt_quantize_row_##name(const float * x, void * y, int64_t k) { \
        kvt_encode_row<kvt_codec_##name>(x, y, k); \
    } \
    void kvt_vec_dot_##name##_q8_0(int k, float * s, size_t, const void * x, size_t, const void * y, size_t, int) { \
        *s = kvt_dot_row_q8_0<kvt_codec_##name>(x, y, k); \
    }
KVT_TYPES(KVT_CPU)
