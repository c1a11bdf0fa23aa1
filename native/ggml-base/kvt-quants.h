// kvt-quants.h - what our cache types do, in the forms that ggml's tables and switches want: KVT_TYPES(KVT_TYPE_...).
// Contract: ggml_type_traits and ggml_type_traits_cpu. Plain C.
#pragma once

#include "ggml.h"
#include "kvt-types.h"

#ifdef __cplusplus
extern "C" {
#endif

// In ggml-base: the reference. n is a multiple of the block.
// In ggml-cpu: the same bytes, compiled for the machine, and the dot product with q8_0 (n a multiple of 32, nrc = 1).
#define KVT_TYPE_DECLARE(NAME, name, number, n, bits) \
    GGML_API void   kvt_quantize_row_##name##_ref(const float * x, void * y, int64_t k); \
    GGML_API void   kvt_dequantize_row_##name    (const void * x, float * y, int64_t k); \
    GGML_API size_t kvt_quantize_##name          (const float * x, void * y, int64_t n_rows, int64_t n_per_row); \
    void kvt_quantize_row_##name(const float * x, void * y, int64_t k); \
    void kvt_vec_dot_##name##_q8_0(int k, float * s, size_t bs, const void * x, size_t bx, const void * y, size_t by, int nrc);
KVT_TYPES(KVT_TYPE_DECLARE)
#undef KVT_TYPE_DECLARE

#define KVT_TYPE_CHECK(NAME, name, number, n, bits) KVT_STATIC_ASSERT((number) < GGML_TYPE_COUNT, "KVT_TYPE_COUNT, for " #name);
KVT_TYPES(KVT_TYPE_CHECK)
#undef KVT_TYPE_CHECK

static inline bool kvt_is_type(enum ggml_type type) {
    switch (type) {
        KVT_TYPES(KVT_TYPE_CASE)
        return true;
        default:
            return false;
    }
}

#define KVT_GGML_ITEM(NAME)                        GGML_TYPE_##NAME,

#define KVT_TYPE_TRAITS(NAME, name, number, n, bits) \
    [GGML_TYPE_##NAME] = { \
        .type_name      = #name, \
        .blck_size      = (n), \
        .type_size      = sizeof(kvt_block_##name), \
        .is_quantized   = true, \
        .to_float       = kvt_dequantize_row_##name, \
        .from_float_ref = kvt_quantize_row_##name##_ref, \
    },

#define KVT_TYPE_TRAITS_CPU(NAME, name, number, n, bits) \
    [GGML_TYPE_##NAME] = { \
        .from_float   = kvt_quantize_row_##name, \
        .vec_dot      = kvt_vec_dot_##name##_q8_0, \
        .vec_dot_type = GGML_TYPE_Q8_0, \
        .nrows        = 1, \
    },

// in ggml_quantize_chunk and ggml_validate_row_data
#define KVT_TYPE_QUANTIZE_CHUNK(NAME, name, number, n, bits) \
    case GGML_TYPE_##NAME: result = kvt_quantize_##name(src + start, (char *) dst + start_row*row_size, nrows, n_per_row); break;
#define KVT_TYPE_VALIDATE(NAME, name, number, n, bits) \
    case GGML_TYPE_##NAME: \
        for (size_t i = 0; i < nb; i++) { \
            if (!validate_fp16(KVT_HALF_OF(((const kvt_block_##name *) data)[i].d), i)) { \
                return false; \
            } \
        } \
        break;

#ifdef __cplusplus
}
#endif
