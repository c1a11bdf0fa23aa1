// kvt-attn-gemm.h - C[m][n] (+)= A[m][k] * B[k][n], blocked in registers, n a multiple of the vector; in floats, or in integers with a scale.
#pragma once

#include "kvt-attn-simd.h"

#include <algorithm>
#include <type_traits>

#if KVT_VW == 8 || !(defined(KVT_AVX512) || defined(__aarch64__))
static const int KVT_REGISTERS = 16;
#else
static const int KVT_REGISTERS = 32;
#endif

// What of V is fetched while K is computed, and of the next K while V is, a little at a time: a burst would wait for memory.
struct kvt_ahead {
    const char * p;
    size_t       nb, size; // n runs of size bytes, nb apart
    int64_t      n, n_once;

    // over a product of m rows, n columns, at most `wide` at once, and k steps
    template <typename T>
    void spread(int64_t m, int64_t cols, int64_t wide, int64_t k) {
        const int64_t once = std::min<int64_t>(wide, T::NR * KVT_VW);
        spread((m + T::MR - 1) / T::MR * ((cols + once - 1) / once) * ((k + 3) / 4));
    }

    void spread(int64_t n_calls) {
        if (nb == size) { // one run: a part of it at each call
            const size_t all = n * size;
            nb = size = GGML_PAD(all / n_calls + 1, 64);
            n         = (int64_t) ((all + size - 1) / size);
        }
        n_once = (n + n_calls - 1) / n_calls;
    }

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

// one step of the sum: a value of A, of N_SUMS planes, times a vector of B, whose elements may be of a narrower type. MR rows of A by NR
// vectors are summed at once; the sums of a row start at from(). A step may take N_ROWS rows of B, ld apart, and as many values, as N_PARTS
// vectors. Values of integers are put N_PUT at a time
struct kvt_step_float {
    static const int     MR = 6, NR = KVT_REGISTERS / 8, N_SUMS = 1, N_ROWS = 1, N_PARTS = 1;
    static const bool    INTEGERS = false;
    typedef float        value, element;
    typedef vf           vector;
    static KVT_INLINE vf load(const float * p, int64_t = 0, int = 0) { return vf_load(p); }
    static KVT_INLINE vf from(int32_t, int) { return vf_set1(0); }
    static KVT_INLINE vf plane(const float * a, int) { return vf_set1(*a); }
    static KVT_INLINE vf fma(vf a, vf b, vf c) { return vf_fma(a, b, c); }
    static KVT_INLINE vf all(const vf * c) { return c[0]; }
};

struct kvt_step_f16 : kvt_step_float {
    typedef uint16_t     element;
    static KVT_INLINE vf load(const uint16_t * p, int64_t = 0, int = 0) { return vf_load_f16(p); }
};

struct kvt_step_bf16 : kvt_step_float {
    typedef uint16_t     element;
    static KVT_INLINE vf load(const uint16_t * p, int64_t = 0, int = 0) { return vf_load_bf16(p); }
};

#ifdef KVT_BYTES

static const int   KVT_SIDE_BY_SIDE = 4; // values of B in an int32
static const float KVT_MAX_INT      = 127 * 256 + 127; // of a value of A

// 256*hi + lo, signed bytes, of four values side by side
struct kvt_planes {
    int32_t hi, lo;
};

static KVT_INLINE int8_t kvt_low(int16_t x) {
    return (int8_t) x;
}

static KVT_INLINE int8_t kvt_high(int16_t x) {
    return (int8_t) ((x - kvt_low(x)) / 256);
}

#ifdef KVT_MATRICES

// both planes of eight values at once: 8 bytes of hi, then 8 of lo
struct kvt_step_int {
    static const int       MR = 6, NR = KVT_REGISTERS / 16, N_SUMS = 2, N_ROWS = 2, N_PARTS = 2, N_PUT = 8;
    static const bool      INTEGERS = true;
    typedef kvt_planes     value;
    typedef int32_t        element;
    typedef vi             vector;
    static KVT_INLINE vi   load(const int32_t * p, int64_t ld, int part) { return vi_zip(vi_load(p), vi_load(p + ld), part); }
    static KVT_INLINE vi   from(int32_t x, int) { return vi_halves(vi_set1(0), vi_set1(x), 0); }
    static KVT_INLINE vi   plane(const kvt_planes * a, int) { return vi_load(&a->hi); }
    static KVT_INLINE vi   fma(vi a, vi b, vi c) { return vi_matrix(a, b, c); }
    static KVT_INLINE vf   all(const vi * c) { return vi_float(vi_add(vi_shl8(vi_halves(c[0], c[1], 0)), vi_halves(c[0], c[1], 1))); }
    static KVT_INLINE void put_k(const int16_t * x, kvt_planes * a) {
        int8_t *hi = (int8_t *) a, *lo = hi + 8;
        for (int i = 0; i < 8; i++) {
            lo[i] = kvt_low(x[i]), hi[i] = kvt_high(x[i]);
        }
    }
    static KVT_INLINE void put_v(vi x, int16_t * w, int j) { vi_store_planes((int8_t *) (w + j / 8 * 8) + j % 8, 8, x); }
};

#else

struct kvt_step_int {
    static const int     MR = 3, NR = KVT_REGISTERS / 8, N_SUMS = 2, N_ROWS = 1, N_PARTS = 1, N_PUT = 4;
    static const bool    INTEGERS = true;
    typedef kvt_planes   value;
    typedef int32_t      element;
    typedef vi           vector;
    static KVT_INLINE vi load(const int32_t * p, int64_t, int) { return vi_load(p); }
    static KVT_INLINE vi from(int32_t x, int plane) { return vi_set1(plane == 0 ? 0 : x); }
    static KVT_INLINE vi plane(const kvt_planes * a, int plane) { return vi_set1(plane == 0 ? a->hi : a->lo); }
    static KVT_INLINE vi fma(vi a, vi b, vi c) { return vi_dot4(a, b, c); }
    static KVT_INLINE vf all(const vi * c) { return vi_float(vi_add(vi_shl8(c[0]), c[1])); }
    // four values, as B has those of K and V
    static KVT_INLINE void put_k(const int16_t * x, kvt_planes * a) {
        int8_t hi[4], lo[4];
        for (int i = 0; i < 4; i++) {
            lo[i] = kvt_low(x[i]), hi[i] = kvt_high(x[i]);
        }
        memcpy(&a->hi, hi, sizeof(hi));
        memcpy(&a->lo, lo, sizeof(lo));
    }
    static KVT_INLINE void put_v(vi x, int16_t * w, int j) { vi_store_planes((int8_t *) (w + j), 4, x); }
};

#endif

#elif defined(KVT_DOT)

static const int   KVT_SIDE_BY_SIDE = 2;
static const float KVT_MAX_INT      = 32767;

struct kvt_step_int {
    static const int       MR = 6, NR = KVT_REGISTERS / 8, N_SUMS = 1, N_ROWS = 1, N_PARTS = 1, N_PUT = 4;
    static const bool      INTEGERS = true;
    typedef int32_t        value, element;
    typedef vi             vector;
    static KVT_INLINE vi   load(const int32_t * p, int64_t, int) { return vi_load(p); }
    static KVT_INLINE vi   from(int32_t x, int) { return vi_set1(x); }
    static KVT_INLINE vi   plane(const int32_t * a, int) { return vi_set1(*a); }
    static KVT_INLINE vi   fma(vi a, vi b, vi c) { return vi_dot(a, b, c); }
    static KVT_INLINE void put_k(const int16_t * x, int32_t * a) {
        const int16_t y[4] = { x[0], x[2], x[1], x[3] };
        memcpy(a, y, sizeof(y));
    }
    static KVT_INLINE void put_v(vi x, int16_t * w, int j) { vi_store_pairs(w + j, x); }
    static KVT_INLINE vf   all(const vi * c) { return vi_float(c[0]); }
};

#else

static const int KVT_SIDE_BY_SIDE = 1;

#endif

static const int KVT_STEPS = 4 / KVT_SIDE_BY_SIDE; // of a product, for four values side by side

// what the sum is multiplied by, in row i and the columns from j on; plus(): and added to y, in one rounding, whatever the compiler would do
struct kvt_scale_none {
    KVT_INLINE vf operator()(vf x, int64_t, int64_t) const { return x; }
    KVT_INLINE vf plus(vf x, int64_t, int64_t, vf y) const { return vf_add(y, x); }
};

struct kvt_scale_rows {
    const float * scale;
    int64_t       ld;
    KVT_INLINE vf operator()(vf x, int64_t i, int64_t) const { return vf_mul(x, vf_set1(scale[i * ld])); }
    KVT_INLINE vf plus(vf x, int64_t i, int64_t, vf y) const { return vf_fma(x, vf_set1(scale[i * ld]), y); }
};

struct kvt_scale_cols {
    const uint16_t * scale; // f16
    KVT_INLINE vf    operator()(vf x, int64_t, int64_t j) const { return vf_mul(x, vf_load_f16(scale + j)); }
    KVT_INLINE vf    plus(vf x, int64_t, int64_t j, vf y) const { return vf_fma(x, vf_load_f16(scale + j), y); }
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
    const int32_t *             start; // of each row, ld_start apart; null: 0
    int64_t                     ld_start;
};

// sums of MR rows of A by NR vectors of B, in registers
template <typename T, int MR, int NR>
struct kvt_sums {
    typename T::vector c[MR][NR][T::N_SUMS];

    // start: of each row, ld apart; null: 0
    KVT_INLINE void begin(const int32_t * start, int64_t ld) {
        for (int i = 0; i < MR; i++) {
            for (int p = 0; p < T::N_SUMS; p++) {
                const typename T::vector from = T::from(start ? start[i * ld] : 0, p);
                for (int j = 0; j < NR; j++) {
                    c[i][j][p] = from;
                }
            }
        }
    }

    KVT_INLINE void step(const typename T::value * A, int64_t lda, typename T::vector (*b)[T::N_PARTS]) {
        for (int i = 0; i < MR; i++) {
            for (int p = 0; p < T::N_SUMS; p++) {
                const typename T::vector a = T::plane(A + i * lda, p);
                for (int j = 0; j < NR; j++) {
                    typename T::vector x = T::fma(a, b[j][p % T::N_PARTS], c[i][j][p]);
                    KVT_KEEP(x);
                    c[i][j][p] = x;
                }
            }
        }
    }
};

template <int MR, int NR, typename T, typename S>
static KVT_INLINE void kvt_gemm_block(const kvt_gemm_args<T, S> & g, int64_t i0, int64_t j0, kvt_ahead & ahead) {
    kvt_sums<T, MR, NR> sums;
    sums.begin(g.start ? g.start + i0 * g.ld_start : nullptr, g.ld_start);
    const int64_t               k = g.k, lda = g.lda, ldb = g.ldb, ldc = g.ldc;
    const typename T::value *   A    = g.A + i0 * lda;
    const typename T::element * B    = g.B + j0;
    const auto                  step = [&](int64_t l) KVT_LAMBDA {
        typename T::vector b[NR][T::N_PARTS];
        for (int j = 0; j < NR; j++) {
            for (int part = 0; part < T::N_PARTS; part++) {
                typename T::vector x = T::load(B + j * KVT_VW, ldb, part);
                KVT_KEEP(x);
                b[j][part] = x;
            }
        }
        sums.step(A + l, lda, b);
        B += T::N_ROWS * ldb;
    };
    for (int64_t l = 0; l < k;) {
        ahead.fetch();
        if (T::INTEGERS && l + 4 <= k) {
            KVT_UNROLL
            for (int u = 0; u < 4; u += T::N_ROWS) {
                step(l + u);
            }
            l += 4;
            continue;
        }
        for (const int64_t end = std::min(l + 4, k); l < end; l += T::N_ROWS) {
            step(l);
        }
    }
    const S scale = g.scale;
    float * C     = g.C + i0 * ldc + j0;
    if (g.add) {
        for (int i = 0; i < MR; i++) {
            for (int j = 0; j < NR; j++) {
                float * y = C + i * ldc + j * KVT_VW;
                vf_store(y, scale.plus(T::all(sums.c[i][j]), i0 + i, j0 + j * KVT_VW, vf_load(y)));
            }
        }
    } else {
        for (int i = 0; i < MR; i++) {
            for (int j = 0; j < NR; j++) {
                vf_store(C + i * ldc + j * KVT_VW, scale(T::all(sums.c[i][j]), i0 + i, j0 + j * KVT_VW));
            }
        }
    }
}

// f(i, n) for n rows from i on, n a constant, at most MR
template <typename T, typename F>
static KVT_INLINE void kvt_each_rows(int64_t m, F f) {
    int64_t i = 0;
    for (; i + T::MR <= m; i += T::MR) {
        f(i, std::integral_constant<int, T::MR>());
    }
    switch (m - i) { // less than MR
        case 5: f(i, std::integral_constant<int, std::min(5, T::MR)>()); break;
        case 4: f(i, std::integral_constant<int, std::min(4, T::MR)>()); break;
        case 3: f(i, std::integral_constant<int, std::min(3, T::MR)>()); break;
        case 2: f(i, std::integral_constant<int, 2>()); break;
        case 1: f(i, std::integral_constant<int, 1>()); break;
        default: break;
    }
}

// f(j, n) for n vectors of columns from j on, likewise
template <typename T, typename F>
static KVT_INLINE void kvt_each_cols(int64_t n, F f) {
    int64_t j = 0;
    for (; j + T::NR * KVT_VW <= n; j += T::NR * KVT_VW) {
        f(j, std::integral_constant<int, T::NR>());
    }
    for (; j + 2 * KVT_VW <= n; j += 2 * KVT_VW) {
        f(j, std::integral_constant<int, 2>());
    }
    for (; j < n; j += KVT_VW) {
        f(j, std::integral_constant<int, 1>());
    }
}

// The inner loop is apart: inlined into more than it needs, it is compiled with fewer registers

template <int MR, typename T, typename S>
static KVT_NOINLINE void kvt_gemm_rows(const kvt_gemm_args<T, S> & g, int64_t i, kvt_ahead & ahead) {
    kvt_each_cols<T>(g.n, [&](int64_t j, auto cols) KVT_LAMBDA { kvt_gemm_block<MR, cols>(g, i, j, ahead); });
}

template <int NR, typename T, typename S>
static KVT_NOINLINE void kvt_gemm_cols(const kvt_gemm_args<T, S> & g, int64_t j, kvt_ahead & ahead) {
    kvt_each_rows<T>(g.m, [&](int64_t i, auto rows) KVT_LAMBDA { kvt_gemm_block<rows, NR>(g, i, j, ahead); });
}

template <typename T, typename S>
static void kvt_gemm(const kvt_gemm_args<T, S> & g, kvt_ahead & ahead) {
    if constexpr (T::INTEGERS) { // a block's columns stay in the L1 cache
        kvt_each_rows<T>(g.m, [&](int64_t i, auto rows) KVT_LAMBDA { kvt_gemm_rows<rows>(g, i, ahead); });
    } else {
        kvt_each_cols<T>(g.n, [&](int64_t j, auto cols) KVT_LAMBDA { kvt_gemm_cols<cols>(g, j, ahead); });
    }
}
