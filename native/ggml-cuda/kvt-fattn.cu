// kvt-fattn.cu - which pairs of types have a decoding kernel. The pairs are CMake's, from the list of cache types
#include "fattn-vec.cuh"

#include "kvt-cuda.h"
#include "kvt-fattn-pairs.h"

#define KVT_FATTN_DECLARE(K, V) \
    extern DECL_FATTN_VEC_CASE( 64, GGML_TYPE_##K, GGML_TYPE_##V); \
    extern DECL_FATTN_VEC_CASE(128, GGML_TYPE_##K, GGML_TYPE_##V); \
    extern DECL_FATTN_VEC_CASE(256, GGML_TYPE_##K, GGML_TYPE_##V);
KVT_FATTN_PAIRS_OURS(KVT_FATTN_DECLARE)

template <ggml_type type_k, ggml_type type_v>
static kvt_fattn_t kvt_fattn_of(int64_t head_dim) {
    switch (head_dim) {
        case 64: return ggml_cuda_flash_attn_ext_vec_case<64, type_k, type_v>;
        case 128: return ggml_cuda_flash_attn_ext_vec_case<128, type_k, type_v>;
        case 256: return ggml_cuda_flash_attn_ext_vec_case<256, type_k, type_v>;
        default: return nullptr;
    }
}

kvt_fattn_t kvt_cuda_fattn(int64_t head_dim, ggml_type type_k, ggml_type type_v) {
#define KVT_FATTN_GET(K, V) \
    if (type_k == GGML_TYPE_##K && type_v == GGML_TYPE_##V) { \
        return kvt_fattn_of<GGML_TYPE_##K, GGML_TYPE_##V>(head_dim); \
    }
    KVT_FATTN_PAIRS_OURS(KVT_FATTN_GET)
    return nullptr;
}

bool kvt_cuda_reads_pair(int64_t head_dim_k, int64_t head_dim_v, ggml_type type_k, ggml_type type_v) {
    if (type_k == GGML_TYPE_F16 && type_v == GGML_TYPE_F16) {
        return true;
    }
    if (head_dim_k != head_dim_v || (head_dim_k != 64 && head_dim_k != 128 && head_dim_k != 256)) {
        return false;
    }
#define KVT_FATTN_IS(K, V) \
    if (type_k == GGML_TYPE_##K && type_v == GGML_TYPE_##V) { \
        return true; \
    }
    KVT_FATTN_PAIRS(KVT_FATTN_IS)
    return false;
}
