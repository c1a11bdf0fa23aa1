// kvt-attn-gemm.h - C[m][n] (+)= A[m][k] * B[k][n], blocked in registers, n a multiple of the vector; in floats, or in pairs of int16 with a scale.
#pragma once

#include "kvt-attn-simd.h"

#include <algorithm>

#if KVT_VW == 8 || !(defined(KVT_AVX512) || defined(__aarch64__))
static const int KVT_MR = 6, KVT_NR = 2; // 16 registers
#else
static const int KVT_MR = 6, KVT_NR = 4; // 32 registers
#endif

// What of K or V is fetched while the tile before it is computed, a little at a time: a burst would wait for memory.
struct kvt_ahead {
    const char * p;
    size_t       nb, size; // n runs of size bytes, nb apart
    int64_t      n, n_once;

    KVT_INLINE void fetch() {
        for (int64_t i = std::min(n, n_once); i > 0; i--) {
            for (size_t o = 0; o < size; o += 64) {
                kvt_prefetch(p + o);
            }
            p += nb;
            n--;
        }
    }
};

// one step of the sum: a value of A times a vector of B, whose elements may be of a narrower type
struct kvt_step_float {
    typedef float        value, element;
    typedef vf           vector;
    static KVT_INLINE vf set1(float x) { return vf_set1(x); }
    static KVT_INLINE vf load(const float * p) { return vf_load(p); }
    static KVT_INLINE vf fma(vf a, vf b, vf c) { return vf_fma(a, b, c); }
    static KVT_INLINE vf sum(vf c) { return c; }
};

struct kvt_step_f16 : kvt_step_float {
    typedef uint16_t     element;
    static KVT_INLINE vf load(const uint16_t * p) { return vf_load_f16(p); }
};

struct kvt_step_bf16 : kvt_step_float {
    typedef uint16_t     element;
    static KVT_INLINE vf load(const uint16_t * p) { return vf_load_bf16(p); }
};

#ifdef KVT_DOT
struct kvt_step_int {
    typedef int32_t      value, element;
    typedef vi           vector;
    static KVT_INLINE vi set1(int32_t x) { return vi_set1(x); }
    static KVT_INLINE vi load(const int32_t * p) { return vi_load(p); }
    static KVT_INLINE vi fma(vi a, vi b, vi c) { return vi_dot(a, b, c); }
    static KVT_INLINE vf sum(vi c) { return vi_float(c); }
};
#endif

// what the sum is multiplied by, in row i and the columns from j on
struct kvt_scale_none {
    KVT_INLINE vf operator()(vf x, int64_t, int64_t) const { return x; }
};

struct kvt_scale_rows {
    const float * scale;
    int64_t       ld;
    KVT_INLINE vf operator()(vf x, int64_t i, int64_t) const { return vf_mul(x, vf_set1(scale[i * ld])); }
};

struct kvt_scale_cols {
    const uint16_t * scale; // f16
    KVT_INLINE vf    operator()(vf x, int64_t, int64_t j) const { return vf_mul(x, vf_load_f16(scale + j)); }
};

template <typename T, typename S>
struct kvt_gemm_args {
    int64_t                     m, n, k;
    const typename T::value *   A;
    int64_t                     lda;
    const typename T::element * B;
    int64_t                     ldb;
    float *                     C;
    int64_t                     ldc;
    bool                        add;
    S                           scale;
};

template <int MR, int NR, typename T, typename S>
static KVT_INLINE void kvt_gemm_block(const kvt_gemm_args<T, S> & g, int64_t i0, int64_t j0, kvt_ahead & ahead) {
    typename T::vector c[MR][NR];
    for (int i = 0; i < MR; i++) {
        for (int j = 0; j < NR; j++) {
            c[i][j] = T::set1(0);
        }
    }
    const int64_t               k = g.k, lda = g.lda, ldb = g.ldb, ldc = g.ldc;
    const typename T::value *   A = g.A + i0 * lda;
    const typename T::element * B = g.B + j0;
    for (int64_t l = 0; l < k;) {
        ahead.fetch();
        for (const int64_t end = std::min(l + 4, k); l < end; l++, B += ldb) {
            typename T::vector b[NR];
            for (int j = 0; j < NR; j++) {
                typename T::vector x = T::load(B + j * KVT_VW);
                KVT_KEEP(x);
                b[j] = x;
            }
            for (int i = 0; i < MR; i++) {
                const typename T::vector a = T::set1(A[i * lda + l]);
                for (int j = 0; j < NR; j++) {
                    c[i][j] = T::fma(a, b[j], c[i][j]);
                }
            }
        }
    }
    const S scale = g.scale;
    float * C     = g.C + i0 * ldc + j0;
    if (g.add) {
        for (int i = 0; i < MR; i++) {
            for (int j = 0; j < NR; j++) {
                vf_store(C + i * ldc + j * KVT_VW, vf_add(vf_load(C + i * ldc + j * KVT_VW), scale(T::sum(c[i][j]), i0 + i, j0 + j * KVT_VW)));
            }
        }
    } else {
        for (int i = 0; i < MR; i++) {
            for (int j = 0; j < NR; j++) {
                vf_store(C + i * ldc + j * KVT_VW, scale(T::sum(c[i][j]), i0 + i, j0 + j * KVT_VW));
            }
        }
    }
}

// apart: inlined into more than it needs, it is compiled with fewer registers
template <int NR, typename T, typename S>
static KVT_NOINLINE void kvt_gemm_cols(const kvt_gemm_args<T, S> & g, int64_t j, kvt_ahead & ahead) {
    int64_t i = 0;
    for (; i + KVT_MR <= g.m; i += KVT_MR) {
        kvt_gemm_block<KVT_MR, NR>(g, i, j, ahead);
    }
    switch (g.m - i) {
        case 5: kvt_gemm_block<5, NR>(g, i, j, ahead); break;
        case 4: kvt_gemm_block<4, NR>(g, i, j, ahead); break;
        case 3: kvt_gemm_block<3, NR>(g, i, j, ahead); break;
        case 2: kvt_gemm_block<2, NR>(g, i, j, ahead); break;
        case 1: kvt_gemm_block<1, NR>(g, i, j, ahead); break;
        default: break;
    }
}

template <typename T, typename S>
static void kvt_gemm(const kvt_gemm_args<T, S> & g, kvt_ahead & ahead) {
    int64_t j = 0;
    for (; j + KVT_NR * KVT_VW <= g.n; j += KVT_NR * KVT_VW) {
        kvt_gemm_cols<KVT_NR>(g, j, ahead);
    }
    for (; j + 2 * KVT_VW <= g.n; j += 2 * KVT_VW) {
        kvt_gemm_cols<2>(g, j, ahead);
    }
    for (; j < g.n; j += KVT_VW) {
        kvt_gemm_cols<1>(g, j, ahead);
    }
}
