// kvt-attn-few.h - products of a few rows of Q, or of weights, with K or V, straight from the codes: what they give is that of a tile of codes, bit for
// bit, without its way through memory.
#pragma once

#include "kvt-attn-codes.h"
#include "kvt-attn-seen.h"

#ifdef KVT_DOT

struct kvt_few_k {
    const char *                src;
    size_t                      nb;
    int64_t                     n_blocks;
    const kvt_step_int::value * Q;
    int64_t                     ld;    // of Q
    const int32_t *             start; // [rows][ldq]
    const float *               sum;
    int64_t                     ldq;
    const uint16_t *            d, *m; // [blocks][KVT_TILE]
    float *                     S; // [rows][lds]
    int64_t                     lds;
};

struct kvt_few_v {
    const char *                src, *rest; // rest: of what fills no four of rows
    size_t                      nb, nb_rest;
    const kvt_step_int::value * W; // [rows][ld]
    int64_t                     ld;
    const int32_t *             start; // [rows][KVT_PARTS]
    const float *               scale;
    float *                     out; // [rows][ldo]
    int64_t                     ldo;
};

// n_rows rows of Q or weights, KVT_FEW_ROWS or few_v_max at most, with n KV rows: whole vectors of K, any of V
typedef void (*kvt_few_k_t)(const kvt_few_k & g, int n_rows, int n, kvt_ahead & ahead);
typedef void (*kvt_few_v_t)(const kvt_few_v & g, int n_rows, int n, kvt_ahead & ahead);

#ifndef KVT_FEW

static const int KVT_FEW_ROWS = 0;

#else

static const int KVT_FEW_SUMS = KVT_REGISTERS == 32 ? 24 : 8; // in registers
static const int KVT_FEW_ROWS = KVT_REGISTERS == 16 && kvt_step_int::N_SUMS == 1 ? 6 : 4;

// Rows of weights, at most, or 0. With 16 registers V is unpacked anew for each few columns, which pays where these are two vectors at least, and bytes are unpacked
// one by one.
template <typename T>
static constexpr int kvt_few_v_max() {
    return KVT_REGISTERS == 32 ? KVT_FEW_ROWS : T::PIECES > 0 ? KVT_FEW_SUMS / 2 / kvt_step_int::N_SUMS
                                                              : 0;
}

template <int N>
struct kvt_few_step : kvt_step_int {
    static const int MR = N;
};

// the step of the sums that 4 values of K, or rows of V, are
template <int M, int NR>
static KVT_INLINE void kvt_few_sum(kvt_sums<kvt_step_int, M, NR> & sums, const kvt_step_int::value * A, int64_t ld, vb (*x)[1]) {
    vi y[KVT_STEPS][NR][1];
    for (int j = 0; j < NR; j++) {
        kvt_each_put(*x[j], [&](int i, auto v) KVT_LAMBDA { *y[i][j] = v; });
    }
    for (int i = 0; i < KVT_STEPS; i++) {
        sums.step(A + i, ld, y[i]);
    }
}

//
// scores
//

template <typename T, int M, int NR>
static KVT_INLINE void kvt_few_k_block(const kvt_few_k & g, int r, kvt_ahead & ahead) {
    vf S[M][NR];
    for (int64_t b = 0; b < g.n_blocks; b++) {
        ahead.fetch();
        kvt_sums<kvt_step_int, M, NR> sums;
        sums.begin(g.start + b, g.ldq);
        const kvt_step_int::value * Q = g.Q + b * T::n / KVT_SIDE_BY_SIDE;
        kvt_each_step<T, NR>(g.src + r * g.nb + b * sizeof(typename T::block), g.nb, [&](int s, vb(*x)[1]) KVT_LAMBDA { kvt_few_sum(sums, Q + s * KVT_STEPS, g.ld, x); });
        for (int j = 0; j < NR; j++) {
            const int64_t at = b * KVT_TILE + r + j * KVT_VW;
            const vf      d  = vf_load_f16(g.d + at);
            for (int i = 0; i < M; i++) {
                const vf x = kvt_step_int::all(sums.c[i][j]);
                S[i][j]    = b == 0 ? vf_mul(x, d) : vf_fma(x, d, S[i][j]);
                if (T::HAS_MIN) {
                    S[i][j] = vf_fma(vf_load_f16(g.m + at), vf_set1(g.sum[i * g.ldq + b]), S[i][j]);
                }
            }
        }
    }
    for (int i = 0; i < M; i++) {
        for (int j = 0; j < NR; j++) {
            vf_store(g.S + i * g.lds + r + j * KVT_VW, S[i][j]);
        }
    }
}

template <typename T, int M>
static KVT_NOINLINE void kvt_few_k_rows(const kvt_few_k & g, int n, kvt_ahead & ahead) {
    static const int NR = KVT_REGISTERS / 16;
    int              r  = 0;
    for (; r + NR * KVT_VW <= n; r += NR * KVT_VW) {
        kvt_few_k_block<T, M, NR>(g, r, ahead);
    }
    for (; r < n; r += KVT_VW) {
        kvt_few_k_block<T, M, 1>(g, r, ahead);
    }
}

//
// out += weights V, of a block
//

// of C vectors of columns, from vector C0 on
template <typename T, int M, int C, int C0>
static KVT_INLINE void kvt_few_v_cols(const kvt_few_v & g, int n, kvt_ahead & ahead) {
    kvt_sums<kvt_step_int, M, C> sums;
    sums.begin(g.start, KVT_PARTS);
    const kvt_step_int::value * W    = g.W;
    const char *                p    = g.src;
    size_t                      nb   = g.nb;
    const auto                  four = [&]() KVT_LAMBDA {
        vb c[T::n / KVT_VW][1];
        KVT_OPAQUE(nb);
        kvt_fours<T>(p, nb, *c);
        kvt_few_sum(sums, W, g.ld, c + C0);
        W += KVT_STEPS;
        p += 4 * nb;
    };
    int r = 0;
    for (; r + 16 <= n; r += 16) {
        ahead.fetch();
        KVT_UNROLL
        for (int i = 0; i < 4; i++) {
            four();
        }
    }
    for (; r < n; r += 4) {
        if (r + 4 > n) {
            p = g.rest, nb = g.nb_rest;
        }
        four();
    }
    for (int i = 0; i < M; i++) {
        const vf scale = vf_set1(g.scale[i * KVT_PARTS]);
        for (int j = 0; j < C; j++) {
            float * y = g.out + i * g.ldo + (C0 + j) * KVT_VW;
            vf_store(y, vf_fma(kvt_step_int::all(sums.c[i][j]), scale, vf_load(y)));
        }
    }
}

// as many columns at once as there are registers for their sums
static constexpr int kvt_few_cols(int n, int n_rows) {
    return n * n_rows * kvt_step_int::N_SUMS > KVT_FEW_SUMS ? kvt_few_cols(n / 2, n_rows) : n;
}

template <typename T, int M, int C0 = 0>
static KVT_NOINLINE void kvt_few_v_rows(const kvt_few_v & g, int n, kvt_ahead & ahead) {
    static const int N = T::n / KVT_VW, C = kvt_few_cols(N, M);
    kvt_few_v_cols<T, M, C, C0>(g, n, ahead);
    if constexpr (C0 + C < N) {
        kvt_few_v_rows<T, M, C0 + C>(g, n, ahead);
    }
}

template <typename T>
static void kvt_few_k_of(const kvt_few_k & g, int n_rows, int n, kvt_ahead & ahead) {
    kvt_each_rows<kvt_few_step<KVT_FEW_ROWS>>(n_rows, [&](int64_t, auto rows) KVT_LAMBDA { kvt_few_k_rows<T, rows>(g, n, ahead); });
}

template <typename T>
static void kvt_few_v_of(const kvt_few_v & g, int n_rows, int n, kvt_ahead & ahead) {
    if constexpr (kvt_few_v_max<T>() > 0) {
        kvt_each_rows<kvt_few_step<kvt_few_v_max<T>()>>(n_rows, [&](int64_t, auto rows) KVT_LAMBDA { kvt_few_v_rows<T, rows>(g, n, ahead); });
    }
}

#endif

#endif
