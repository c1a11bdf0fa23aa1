// kvt-attn-codes.h - K and V of blocks as products take them: codes, side by side, and scales; or as floats, where there are no products of integers.
#pragma once

#include "kvt-attn-unpack.h"

#ifdef KVT_DOT

// n_rows rows, a multiple of KVT_VW, of n values, nb bytes apart
typedef void (*kvt_codes_t)(const char * src, size_t nb, int n_rows, int64_t n, int32_t * dst, int64_t ld);

// get(i, q, by) for i of 0 to 3: of KVT_VW rows from p on, those from row i on, each fourth, are at q, by bytes apart
template <typename F>
static KVT_INLINE void kvt_each_fourth(const char * p, size_t nb, F get) {
    for (int i = 0; i < 4; i++) {
        KVT_OPAQUE(nb);
        get(i, p, 4 * nb);
        p += nb;
    }
}

// A block of KVT_VW*NR rows from p on. step(s, b) for values 4s to 4s + 3: 4 bytes of each row, KVT_VW rows in a vector
template <typename T, int NR, typename F>
static KVT_INLINE void kvt_each_step(const char * p, size_t nb, F step) {
    static const int N = T::n / 16, N_PIECE = T::PIECES > 0 ? N / T::PIECES : 1;
    vb               c[NR][N][4];
    if constexpr (T::PIECES == 0) {
        for (int j = 0; j < NR; j++) {
            kvt_each_fourth(p + j * KVT_VW * nb, nb, [&](int i, const char * q, size_t by) KVT_LAMBDA {
                vb x[N];
                T::codes(q, by, x);
                for (int k = 0; k < N; k++) {
                    c[j][k][i] = x[k];
                }
            });
        }
    }
    KVT_UNROLL
    for (int piece = 0; piece < N / N_PIECE; piece++) {
        vb x[NR][4];
        for (int j = 0; j < NR; j++) {
            if constexpr (T::PIECES > 0) {
                kvt_each_fourth(p + j * KVT_VW * nb, nb, [&](int i, const char * q, size_t by) KVT_LAMBDA { c[j][0][i] = T::load(q, by, piece); });
            }
            vb_transpose(c[j][T::PIECES > 0 ? 0 : piece], x[j]);
        }
        KVT_UNROLL
        for (int u = 0; u < 4; u++) {
            vb y[NR][N_PIECE];
            for (int j = 0; j < NR; j++) {
                if constexpr (T::PIECES > 0) {
                    T::unpack(x[j][u], y[j]);
                } else {
                    y[j][0] = x[j][u];
                }
            }
            for (int k = 0; k < N_PIECE; k++) {
                vb b[NR][1];
                for (int j = 0; j < NR; j++) {
                    b[j][0] = y[j][k];
                }
                step(4 * (piece * N_PIECE + k) + u, b);
            }
        }
    }
}

// A block of 4 rows from p on: a value of each row, KVT_VW values in a vector
template <typename T>
static KVT_INLINE void kvt_fours(const char * p, size_t nb, vb * c) {
    static const int N = T::n / 16, N_FOUR = 16 / KVT_VW;
    vb               a[N_FOUR], x[N_FOUR];
    if constexpr (T::PIECES > 0) {
        static const int N_PIECE = N / T::PIECES;
        for (int piece = 0; piece < T::PIECES; piece++) {
            for (int i = 0; i < N_FOUR; i++) {
                a[i] = T::load(p + i * nb, N_FOUR * nb, piece);
            }
            vb_across_rows(a, x);
            for (int i = 0; i < N_FOUR; i++) {
                vb y[N_PIECE];
                T::unpack(x[i], y);
                for (int k = 0; k < N_PIECE; k++) {
                    c[(piece * N_PIECE + k) * N_FOUR + i] = y[k];
                }
            }
        }
    } else {
        vb y[N_FOUR][N];
        for (int i = 0; i < N_FOUR; i++) {
            T::codes(p + i * nb, N_FOUR * nb, y[i]);
        }
        for (int k = 0; k < N; k++) {
            for (int i = 0; i < N_FOUR; i++) {
                a[i] = y[i][k];
            }
            vb_across_rows(a, c + k * N_FOUR);
        }
    }
}

// Fours of codes as products take them, by put(i, x): in one vector, or in two, of the first and the third, and of the others
template <typename F>
static KVT_INLINE void kvt_each_put(vb c, F put) {
#ifdef KVT_BYTES
    put(0, c);
#else
    put(0, vi_even(c));
    put(1, vi_odd(c));
#endif
}

// as [n/side by side][ld]: some values of each row
template <typename T>
static void kvt_codes_k(const char * src, size_t nb, int n_rows, int64_t n, int32_t * dst, int64_t ld) {
    for (int r = 0; r < n_rows; r += KVT_VW) {
        for (int64_t b = 0; b < n / T::n; b++) {
            int32_t * to = dst + b * T::n / KVT_SIDE_BY_SIDE * ld + r;
            kvt_each_step<T, 1>(src + r * nb + b * sizeof(typename T::block), nb, [=](int s, const vb(*x)[1]) KVT_LAMBDA {
                kvt_each_put(**x, [=](int i, auto y) KVT_LAMBDA { vb_store(to + (s * KVT_STEPS + i) * ld, y); });
            });
        }
    }
}

// as [n_rows/side by side][ld]: one value of some rows
template <typename T>
static void kvt_codes_v(const char * src, size_t nb, int n_rows, int64_t n, int32_t * dst, int64_t ld) {
    static const int N = T::n / KVT_VW;
    for (int r = 0; r < n_rows; r += 4) {
        for (int64_t b = 0; b < n / T::n; b++) {
            vb c[N];
            kvt_fours<T>(src + r * nb + b * sizeof(typename T::block), nb, c);
            int32_t * to = dst + r / KVT_SIDE_BY_SIDE * ld + b * T::n;
            for (int k = 0; k < N; k++) {
                kvt_each_put(c[k], [=](int i, auto y) KVT_LAMBDA { vb_store(to + i * ld + k * KVT_VW, y); });
            }
        }
    }
}

// d and, if the type has it, m, f16, as [blocks][ld]
typedef void (*kvt_scales_t)(const char * src, size_t nb, int n_rows, int64_t n, uint16_t * d, uint16_t * m, int64_t ld);

template <typename T>
static void kvt_scales(const char * src, size_t nb, int n_rows, int64_t n, uint16_t * d, uint16_t * m, int64_t ld) {
    typedef typename T::block block;
    for (int64_t b = 0; b < n / T::n; b++) {
        const char * p = src + b * sizeof(block);
        KVT_UNROLL
        for (int r = 0; r < n_rows; r++, p += nb) {
            d[b * ld + r] = KVT_HALF_OF(((const block *) p)->d);
            if (T::HAS_MIN) {
                memcpy(m + b * ld + r, KVT_AT(d) + sizeof(*d), sizeof(*m));
            }
        }
    }
}

#elif defined(KVT_BLOCKS)

template <typename T>
static void kvt_unpack_block(const char * src, size_t nb, int n_rows, int64_t n, float * dst, int64_t ld) {
    typedef typename T::block block;
    for (int r = 0; r < n_rows; r++) {
        for (int64_t b = 0; b < n / T::n; b++) {
            const char * p   = src + r * nb + b * sizeof(block);
            ggml_half    min = 0;
            if (T::HAS_MIN) {
                memcpy(&min, KVT_AT(d) + sizeof(min), sizeof(min));
            }
            const vf d = vf_set1(GGML_CPU_FP16_TO_FP32(KVT_HALF_OF(((const block *) p)->d))), m = vf_set1(GGML_CPU_FP16_TO_FP32(min));
            vb       c[T::n / 16];
            kvt_codes<T>(p, nb, c);
            for (int j = 0; j < T::n / 16; j++) {
                vf x[16 / KVT_VW];
                vb_floats(c[j], x);
                for (int i = 0; i < 16 / KVT_VW; i++) {
                    vf_store(dst + r * ld + b * T::n + j * 16 + i * KVT_VW, vf_fma(x[i], d, m));
                }
            }
        }
    }
}

#endif
