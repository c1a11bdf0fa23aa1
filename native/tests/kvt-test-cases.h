// kvt-test-cases.h - for upstream's tests of ops and of types: what they cannot know of ours
#pragma once

#include "kvt-quants.h"

// bits of a code of one of our types, which bound its error; 0 of any other
static inline int kvt_code_bits(ggml_type type) {
    switch (type) {
#define KVT_TYPE_BITS(NAME, name, number, n, bits) case GGML_TYPE_##NAME: return bits;
        KVT_TYPES(KVT_TYPE_BITS)
#undef KVT_TYPE_BITS
        default:
            return 0;
    }
}

// steps of the bounds of test-quantize-fns, by their names there. Its data is alike in all channels, and group types are for a K whose
// channels are not: so theirs are next above what was measured, 0.0096, 0.0075, 0.0036 and 0.0020; 0.073 in a dot product with k3_64
#define KVT_MAX_TOTAL_ERROR(type)                                        \
    (type) == GGML_TYPE_K2_64 ? MAX_QUANTIZATION_TOTAL_ERROR_TERNARY :   \
    (type) == GGML_TYPE_K3_64 ? MAX_QUANTIZATION_TOTAL_ERROR_2BITS :     \
    (type) == GGML_TYPE_K4_64 ? MAX_QUANTIZATION_TOTAL_ERROR_3BITS :     \
    (type) == GGML_TYPE_K5_64 ? MAX_QUANTIZATION_TOTAL_ERROR_FP4 :       \
    kvt_code_bits(type) == 2 ? MAX_QUANTIZATION_TOTAL_ERROR_2BITS :      \
    kvt_code_bits(type) == 3 ? MAX_QUANTIZATION_TOTAL_ERROR_3BITS :
#define KVT_MAX_DOT_ERROR(type) \
    (type) == GGML_TYPE_K3_64 ? 0.075f :

// every pair of a plan, in decode and in a prompt; at head sizes other than the usual two each type with itself and with f16: K and V are
// read apart from each other
template <typename test, typename cases>
static void kvt_flash_attn_cases(cases & list) {
    static const ggml_type types[] = { KVT_CACHE_TYPES(KVT_GGML_ITEM, KVT_TYPE_ITEM) };
    for (int hs : { 64, 80, 96, 128, 256 }) {
        for (ggml_type type_k : types) {
            for (ggml_type type_v : types) {
                if (hs != 64 && hs != 128 && type_k != type_v && type_k != GGML_TYPE_F16 && type_v != GGML_TYPE_F16) {
                    continue;
                }
                for (int n_q : { 1, 19 }) {
                    list.emplace_back(new test(hs, hs, 2, { 4, 1 }, 113, n_q, true, false, 0, 0, GGML_PREC_F32, type_k, type_v));
                }
            }
        }
    }
}
