// kvt-quants.cpp - ggml-base's side of our types: the reference encoder, and to_float
#include "kvt-quants.h"
#include "kvt-groups.h"
#include "kvt-trellis.h"

#define KVT_BASE(NAME, name, number, n, bits) \
    void kvt_quantize_row_##name##_ref(const float * x, void * y, int64_t k) { \
        kvt_encode_row<kvt_codec_##name>(x, y, k); \
    } \
    void kvt_dequantize_row_##name(const void * x, float * y, int64_t k) { \
        kvt_decode_row<kvt_codec_##name>(x, y, k); \
    } \
    size_t kvt_quantize_##name(const float * x, void * y, int64_t n_rows, int64_t n_per_row) { \
        kvt_encode_row<kvt_codec_##name>(x, y, n_rows*n_per_row); \
        return n_rows*ggml_row_size(GGML_TYPE_##NAME, n_per_row); \
    }
KVT_TYPES(KVT_BASE)
