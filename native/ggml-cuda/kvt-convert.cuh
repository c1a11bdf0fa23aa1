// kvt-convert.cuh - our types in ggml-cuda's tables of conversions
#pragma once

#include "kvt-cuda.h"

#if !defined(GGML_USE_HIP) && !defined(GGML_USE_MUSA)
#include "kvt-blocks.cuh"

// values i and i + 1 of a block
template <ggml_type type>
static __device__ __forceinline__ void kvt_dequantize(const void * x, const int64_t ib, const int i, float2 & v) {
    float y[4];
    kvt_dequantize4<type>((const typename kvt_codec<type>::block_t *) x + ib, i / 4, y);
    v = i % 4 == 0 ? make_float2(y[0], y[1]) : make_float2(y[2], y[3]);
}
#endif

// in convert.cu: of a contiguous tensor, and of any, where iq4_nl is missing, too
#define KVT_TYPE_CONVERT(NAME, name, number, n, bits) \
    case GGML_TYPE_##NAME: return dequantize_block_cont_cuda<n, 1, kvt_dequantize<GGML_TYPE_##NAME>>;
#define KVT_TYPE_CONVERT_NC(NAME, name, number, n, bits) \
    case GGML_TYPE_##NAME: return dequantize_block_cuda<n, 1, kvt_dequantize<GGML_TYPE_##NAME>>;
#define KVT_CONVERT    KVT_CUDA_TYPES(KVT_TYPE_CONVERT)
#define KVT_CONVERT_NC KVT_CUDA_FATTN_TYPES(KVT_TYPE_CONVERT_NC)

// in getrows.cu
#define KVT_TYPE_GET_ROWS(NAME, name, number, n, bits) \
    case GGML_TYPE_##NAME: \
        get_rows_cuda_q<n, 1, kvt_dequantize<GGML_TYPE_##NAME>>(src0_d, src1_d, dst_d, \
            ne00, nb01, nb02, nb03, ne10, ne11, ne12, nb10, nb11, nb12, nb1, nb2, nb3, stream); \
        break;
