// kvt-fattn.cuh - our types in ggml-cuda's vector kernel of attention, which decodes
#pragma once

#if defined(GGML_USE_HIP) || defined(GGML_USE_MUSA)
#define kvt_get_vec_dot_KQ   get_vec_dot_KQ
#define kvt_get_dequantize_V get_dequantize_V
template <ggml_type type_k, ggml_type type_v> constexpr __host__ __device__ int kvt_unroll(int n_row) { return n_row; }
#else
#include "kvt-blocks.cuh"

template <ggml_type type, int D, int nthreads>
static __device__ __forceinline__ float kvt_vec_dot_KQ(const char * __restrict__ K, const void * __restrict__ Q_v, const int * __restrict__ Q_q8, const void * __restrict__ Q_ds) {
    GGML_UNUSED(Q_v);
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < D / 4; i += nthreads) {
        sum += kvt_dot4<type>(K, i + threadIdx.x % nthreads, Q_q8[i / nthreads], ((const float2 *) Q_ds)[i / nthreads].x);
    }
    return sum;
}

template <ggml_type type, typename T, int ne>
static __device__ __forceinline__ void kvt_dequantize_V(const void * __restrict__ V, void * __restrict__ dst, const int64_t i0) {
    static_assert(ne == 4, "bad ne");
    float y[ne];
    kvt_dequantize4<type>(V, unsigned(i0) / ne, y);
#pragma unroll
    for (int l = 0; l < ne; l++) {
        ((T *) dst)[l] = y[l];
    }
}

template <ggml_type type, int D, int nthreads>
constexpr __device__ vec_dot_KQ_t kvt_get_vec_dot_KQ() {
    if constexpr (kvt_codec<type>::n > 0) {
        return kvt_vec_dot_KQ<type, D, nthreads>;
    } else {
        return get_vec_dot_KQ<type, D, nthreads>();
    }
}

// rows of K or V whose loads are in flight at once
template <ggml_type type_k, ggml_type type_v>
constexpr __host__ __device__ int kvt_unroll(int n_row) {
    const int n_k = kvt_codec<type_k>::n_ahead, n_v = kvt_codec<type_v>::n_ahead, most = n_k < n_v ? n_k : n_v;
    return n_row < most ? n_row : most;
}

template <ggml_type type, typename T, int ne>
constexpr __device__ dequantize_V_t kvt_get_dequantize_V() {
    if constexpr (kvt_codec<type>::n > 0) {
        return kvt_dequantize_V<type, T, ne>;
    } else {
        return get_dequantize_V<type, T, ne>();
    }
}
#endif
