// C[m][n] (+)= A[m][k] * B[k][n] in floats, blocked in registers; n is a multiple of the vector.
#pragma once

#include "kvt-attn-simd.h"

#if KVT_VW == 8 || !(defined(KVT_AVX512) || defined(__aarch64__))
static const int KVT_MR = 6, KVT_NR = 2; // 16 registers
#else
static const int KVT_MR = 6, KVT_NR = 4; // 32 registers
#endif

// rows of K or V that are fetched while a product runs, one in each of its steps: a burst in unpack would wait for memory
struct kvt_ahead {
    const char * p;
    size_t nb, size;
    int64_t n;
};

template <int MR, int NR>
static KVT_INLINE void kvt_gemm_block(int64_t k, const float * A, int64_t lda, const float * B, int64_t ldb, float * C, int64_t ldc, bool add, kvt_ahead ahead) {
    vf c[MR][NR];
    for (int i = 0; i < MR; i++) {
        for (int j = 0; j < NR; j++) {
            c[i][j] = add ? vf_load(C + i*ldc + j*KVT_VW) : vf_set1(0);
        }
    }
    for (int64_t l = 0; l < k; l++) {
        if (l < ahead.n) {
            for (size_t o = 0; o < ahead.size; o += 64) {
                kvt_prefetch(ahead.p + l*ahead.nb + o);
            }
        }
        vf b[NR];
        for (int j = 0; j < NR; j++) {
            b[j] = vf_load(B + l*ldb + j*KVT_VW);
        }
        for (int i = 0; i < MR; i++) {
            const vf x = vf_set1(A[i*lda + l]);
            for (int j = 0; j < NR; j++) {
                c[i][j] = vf_fma(x, b[j], c[i][j]);
            }
        }
    }
    for (int i = 0; i < MR; i++) {
        for (int j = 0; j < NR; j++) {
            vf_store(C + i*ldc + j*KVT_VW, c[i][j]);
        }
    }
}

template <int NR>
static void kvt_gemm_cols(int64_t m, int64_t k, const float * A, int64_t lda, const float * B, int64_t ldb, float * C, int64_t ldc, bool add, kvt_ahead ahead) {
    int64_t i = 0;
    for (; i + KVT_MR <= m; i += KVT_MR) {
        kvt_gemm_block<KVT_MR, NR>(k, A + i*lda, lda, B, ldb, C + i*ldc, ldc, add, ahead);
        ahead.n = 0;
    }
    switch (m - i) {
        case 5: kvt_gemm_block<5, NR>(k, A + i*lda, lda, B, ldb, C + i*ldc, ldc, add, ahead); break;
        case 4: kvt_gemm_block<4, NR>(k, A + i*lda, lda, B, ldb, C + i*ldc, ldc, add, ahead); break;
        case 3: kvt_gemm_block<3, NR>(k, A + i*lda, lda, B, ldb, C + i*ldc, ldc, add, ahead); break;
        case 2: kvt_gemm_block<2, NR>(k, A + i*lda, lda, B, ldb, C + i*ldc, ldc, add, ahead); break;
        case 1: kvt_gemm_block<1, NR>(k, A + i*lda, lda, B, ldb, C + i*ldc, ldc, add, ahead); break;
        default: break;
    }
}

static void kvt_gemm(int64_t m, int64_t n, int64_t k, const float * A, int64_t lda, const float * B, int64_t ldb, float * C, int64_t ldc, bool add, kvt_ahead ahead) {
    int64_t j = 0;
    for (; j + KVT_NR*KVT_VW <= n; j += KVT_NR*KVT_VW) {
        kvt_gemm_cols<KVT_NR>(m, k, A, lda, B + j, ldb, C + j, ldc, add, ahead);
        ahead.n = 0;
    }
    for (; j < n; j += KVT_VW) {
        kvt_gemm_cols<1>(m, k, A, lda, B + j, ldb, C + j, ldc, add, ahead);
        ahead.n = 0;
    }
}
