// kvt-blocks.h - how a block of each type is written and read: one struct per type, the reference of every faster version
//
// Only + - * / sqrt and comparisons of floats, in one order (sums add halves onto halves), to be compiled without
// contraction: the bytes are the same from every compiler and instruction set. Values are kept within f16's range,
// and a NaN counts as 0, so that a scale is always finite.
//
// A GPU runs the same code. There T threads share a block of N values, and thread j holds values j, j + T, j + 2*T, ...
// in arrays of N/T: halves are added within a thread first, then across threads.
#pragma once

#include "ggml.h"
#include "kvt-types.h"

#include <cmath>
#include <cstring>

#ifdef __CUDACC__
#define KVT_FN static __device__ __forceinline__
#define KVT_SHUFFLE(v, bit) __shfl_xor_sync(0xFFFFFFFF, v, bit)
#else
#define KVT_FN static inline
#ifndef KVT_SHUFFLE
#define KVT_SHUFFLE(v, bit) (v) // that of the thread whose number differs in this bit: there is one thread only
#endif
#endif

KVT_FN float kvt_least(float a, float b) {
    return a < b ? a : b;
}

KVT_FN float kvt_most(float a, float b) {
    return a > b ? a : b;
}

// (v[0] + v[n/2]) + ..., halves onto halves; n is what a thread holds
template <int n, int T>
KVT_FN float kvt_sum(const float * v) {
    if constexpr (n == 1) {
        float s = v[0];
        for (int bit = T / 2; bit > 0; bit /= 2) {
            s += KVT_SHUFFLE(s, bit);
        }
        return s;
    } else {
        float t[n / 2];
        for (int j = 0; j < n / 2; j++) {
            t[j] = v[j] + v[j + n / 2];
        }
        return kvt_sum<n / 2, T>(t);
    }
}

template <int n, int T>
KVT_FN float kvt_sum_sq(const float * v) {
    float vv[n];
    for (int i = 0; i < n; i++) {
        vv[i] = v[i] * v[i];
    }
    return kvt_sum<n, T>(vv);
}

// of all N values of a block
template <int N, int T>
KVT_FN float kvt_rms(const float * v) {
    return sqrtf(kvt_sum_sq<N / T, T>(v) / N);
}

template <int n, int T>
KVT_FN float kvt_max(const float * v) {
    if constexpr (n == 1) {
        float s = v[0];
        for (int bit = T / 2; bit > 0; bit /= 2) {
            const float other = KVT_SHUFFLE(s, bit);
            s                 = kvt_most(s, other);
        }
        return s;
    } else {
        float t[n / 2];
        for (int j = 0; j < n / 2; j++) {
            t[j] = kvt_most(v[j], v[j + n / 2]);
        }
        return kvt_max<n / 2, T>(t);
    }
}

// |x| within f16's range
template <int n>
KVT_FN void kvt_abs(const float * x, float * a) {
    for (int i = 0; i < n; i++) {
        const float v = x[i] > 0.0f ? x[i] : 0.0f - x[i]; // +0 for both zeros
        const float w = v < 65504.0f ? v : 65504.0f; // NaN is not less, ...
        a[i]          = v == v ? w : 0.0f;                    // ... and not itself
    }
}

KVT_FN kvt_half kvt_to_half(float v) {
#ifdef __CUDACC__
    return __half_as_ushort(__float2half_rn(v));
#else
    return ggml_fp32_to_fp16(v);
#endif
}

KVT_FN float kvt_from_half(kvt_half d) {
#ifdef __CUDACC__
    return __half2float(__ushort_as_half(d));
#else
    return ggml_fp16_to_fp32(d);
#endif
}

// to the nearest integer, of numbers below 2^22: by 1.5*2^23
KVT_FN float kvt_round(float v) {
    return (v + 12582912.0f) - 12582912.0f;
}

// the nearest f16 that is a kvt_e5m3, of a number that is not negative; times level it is within f16's range
KVT_FN kvt_half kvt_to_e5m3(float v, float level) {
    return (kvt_half) ((kvt_to_half(kvt_least(v, 65504.0f / level)) + 64) & ~127);
}

// a scale, and by how much it lowers the squared error: the larger, the better
struct kvt_fit {
    float d;
    float gain;
};

//
// symmetric levels: B::level(k), the positive half, ascending
//

// the level of |x|, given the thresholds t between neighbours
template <typename B>
KVT_FN float kvt_nearest(float a, const float * t) {
    float m = B::level(0);
    for (int k = 0; k + 1 < B::n_level; k++) {
        m += a > t[k] ? B::level(k + 1) - B::level(k) : 0.0f;
    }
    return m;
}

template <typename B>
KVT_FN void kvt_thresholds(float d, float * t) {
    for (int k = 0; k + 1 < B::n_level; k++) {
        t[k] = d * (0.5f * (B::level(k) + B::level(k + 1)));
    }
}

// rounds of: each value to its nearest level, then the scale with the least squared error for these levels
template <typename B, int N, int T>
KVT_FN kvt_fit kvt_refit(const float * a, float d, int n_round) {
    kvt_fit res = { d, 0.0f };
    for (int r = 0; r < n_round; r++) {
        float t[B::n_level];
        kvt_thresholds<B>(res.d, t);
        float am[N / T];
        float mm[N / T];
        for (int i = 0; i < N / T; i++) {
            const float m = kvt_nearest<B>(a[i], t);
            am[i]         = a[i] * m;
            mm[i]         = m * m;
        }
        const float sum_am = kvt_sum<N / T, T>(am);
        const float sum_mm = kvt_sum<N / T, T>(mm);
        res                = { sum_am / sum_mm, sum_am * (sum_am / sum_mm) };
    }
    return res;
}

// codes of the values under a scale; 2*n_level codes, ascending with the level
template <typename B, int n>
KVT_FN void kvt_codes(const float * x, const float * a, float d, uint8_t * c) {
    float t[B::n_level];
    kvt_thresholds<B>(d, t);
    for (int i = 0; i < n; i++) {
        int m = 0;
        for (int k = 0; k + 1 < B::n_level; k++) {
            m += a[i] > t[k];
        }
        c[i] = x[i] < 0.0f ? B::n_level - 1 - m : B::n_level + m;
    }
}

struct kvt_levels_q2 {
    static const int        n_level  = 2;
    static constexpr int8_t levels[] = KVT_LEVELS_Q2;

    KVT_FN float level(int k) {
        const float all[] = KVT_LEVELS_Q2;
        return all[n_level + k];
    }

    // from where the scale of a normal distribution is best: its outer level is at 1.51 standard deviations (Lloyd, Max)
    template <int N, int T> KVT_FN kvt_fit fit(const float * a) {
        return kvt_refit<kvt_levels_q2, N, T>(a, kvt_rms<N, T>(a) * (1.51f / 10), 3);
    }
};

struct kvt_levels_q3 {
    static const int        n_level  = 4;
    static constexpr int8_t levels[] = KVT_LEVELS_Q3;

    KVT_FN float level(int k) {
        const float all[] = KVT_LEVELS_Q3;
        return all[n_level + k];
    }

    // eight levels have several minima, and the best is near the maximum: two starts below it
    template <int N, int T> KVT_FN kvt_fit fit(const float * a) {
        const float   top = kvt_max<N / T, T>(a);
        const kvt_fit lo  = kvt_refit<kvt_levels_q3, N, T>(a, top * (0.75f / 127), 2);
        const kvt_fit hi  = kvt_refit<kvt_levels_q3, N, T>(a, top * (0.95f / 127), 2);
        return hi.gain > lo.gain ? hi : lo;
    }
};

// codes of 2 bits, as in kvt-types.h
template <int N>
static inline void kvt_pack2(const uint8_t * c, uint8_t * qs) {
    const int n = N / 4;
    for (int i = 0; i < n; i++) {
        qs[i] = (c[i] & 3) | (c[i + n] & 3) << 2 | (c[i + 2 * n] & 3) << 4 | (c[i + 3 * n] & 3) << 6;
    }
}

template <int N>
static inline void kvt_unpack2(const uint8_t * qs, uint8_t * c) {
    const int n = N / 4;
    for (int j = 0; j < 4; j++) {
        for (int i = 0; i < n; i++) {
            c[j * n + i] = (qs[i] >> 2 * j) & 3;
        }
    }
}

// the integer level of a code, as a sum of steps: no table, so that compilers vectorise it
template <typename B>
static inline int8_t kvt_level(uint8_t c) {
    uint8_t l = (uint8_t) B::levels[0]; // modulo 256
    for (int k = 1; k < 2 * B::n_level; k++) {
        l += (uint8_t) -(c >= k) & (uint8_t) (B::levels[k] - B::levels[k - 1]);
    }
    return (int8_t) l;
}

//
// the types. quantize: the scale, and the codes of what a thread holds; pack and levels: of a whole block
//

template <typename B, int N>
struct kvt_codec_levels {
    // The scale of the least squared error makes values too short, by the share of their energy that it loses, and attention averages
    // errors away, but not that. So the codes are by this scale, and the one that is stored makes up for it: sum(x*x^) = sum(x*x)
    template <int T> KVT_FN kvt_half quantize(const float * x, uint8_t * c) {
        float a[N / T];
        kvt_abs<N / T>(x, a);
        const kvt_fit fit = B::template fit<N, T>(a);
        const float   all = kvt_sum_sq<N / T, T>(a); // in no branch: every thread of a warp takes part, those of other blocks, too
        kvt_codes<B, N / T>(x, a, fit.d, c);
        return kvt_to_half(kvt_least(fit.gain > 0.0f ? fit.d * (all / fit.gain) : fit.d, 65504.0f / B::level(B::n_level - 1)));
    }
};

template <typename block, int N>
struct kvt_codec_q2 : kvt_codec_levels<kvt_levels_q2, N> {
    static const int n = N;
    typedef block    block_t;

    static void pack(const uint8_t * c, block * y) {
        kvt_pack2<N>(c, y->qs);
    }

    static void levels(const block * x, int8_t * l) {
        uint8_t c[N];
        kvt_unpack2<N>(x->qs, c);
        for (int i = 0; i < N; i++) {
            l[i] = kvt_level<kvt_levels_q2>(c[i]);
        }
    }
};

template <typename block, int N>
struct kvt_codec_q3 : kvt_codec_levels<kvt_levels_q3, N> {
    static const int n = N;
    typedef block    block_t;

    static void pack(const uint8_t * c, block * y) {
        kvt_pack2<N>(c, y->qs);
        for (int i = 0; i < N / 8; i++) {
            int h = 0;
            for (int j = 0; j < 8; j++) {
                h |= (c[8 * i + j] >> 2) << j;
            }
            y->qh[i] = h;
        }
    }

    static void levels(const block * x, int8_t * l) {
        uint8_t c[N];
        kvt_unpack2<N>(x->qs, c);
        uint8_t h[N], bit[N];
        for (int i = 0; i < N / 8; i++) {
            memset(h + 8 * i, x->qh[i], 8);
        }
        for (int i = 0; i < N; i++) {
            bit[i] = (uint8_t) (1 << i % 8);
        }
        for (int i = 0; i < N; i++) {
            c[i] |= (h[i] & bit[i]) ? 4 : 0;
        }
        for (int i = 0; i < N; i++) {
            l[i] = kvt_level<kvt_levels_q3>(c[i]);
        }
    }
};

struct kvt_codec_q6_32 {
    static const int        n = 32;
    typedef kvt_block_q6_32 block_t;

    // x/d to the nearest of -32..31; d = 0 gives 0
    template <int T> KVT_FN void round(const float * x, float d, float * q) {
        const float inv = d > 1e-30f || d < -1e-30f ? 1.0f / d : 0.0f;
        for (int i = 0; i < n / T; i++) {
            float v = x[i] * inv;
            v       = v > -32.0f ? v : -32.0f;
            v       = v < 31.0f ? v : 31.0f;
            q[i]    = kvt_round(v);
        }
    }

    template <int T> KVT_FN kvt_fit refit(const float * x, float d) {
        float q[n / T];
        round<T>(x, d, q);
        float xq[n / T];
        float qq[n / T];
        for (int i = 0; i < n / T; i++) {
            xq[i] = x[i] * q[i];
            qq[i] = q[i] * q[i];
        }
        const float sum_xq = kvt_sum<n / T, T>(xq);
        const float sum_qq = kvt_sum<n / T, T>(qq);
        return sum_qq > 0.0f ? kvt_fit { sum_xq / sum_qq, sum_xq * (sum_xq / sum_qq) } : kvt_fit { 0.0f, 0.0f };
    }

    // the largest value is given one of the two lowest codes, the sign of d follows from it
    template <int T> KVT_FN kvt_half quantize(const float * x, uint8_t * c) {
        float a[n / T], v[n / T], q[n / T];
        kvt_abs<n / T>(x, a);
        for (int i = 0; i < n / T; i++) {
            v[i] = x[i] < 0.0f ? -a[i] : a[i];
        }
        const float    top = kvt_max<n / T, T>(a);
        const float    end = kvt_max<n / T, T>(v) == top ? top : -top;
        const kvt_fit  lo  = refit<T>(v, end / -32);
        const kvt_fit  hi  = refit<T>(v, end / -31);
        const kvt_half d   = kvt_to_half(hi.gain > lo.gain ? hi.d : lo.d);
        round<T>(v, kvt_from_half(d), q);
        for (int i = 0; i < n / T; i++) {
            c[i] = (uint8_t) ((int) q[i] + 32);
        }
        return d;
    }

    static void pack(const uint8_t * c, kvt_block_q6_32 * y) {
        uint8_t h[n];
        for (int i = 0; i < 16; i++) {
            y->ql[i] = (c[i] & 15) | (c[i + 16] & 15) << 4;
        }
        for (int i = 0; i < n; i++) {
            h[i] = c[i] >> 4;
        }
        kvt_pack2<n>(h, y->qh);
    }

    static void levels(const kvt_block_q6_32 * x, int8_t * l) {
        uint8_t h[n];
        kvt_unpack2<n>(x->qh, h);
        for (int i = 0; i < 16; i++) {
            l[i]      = (int8_t) (((x->ql[i] & 15) | h[i] << 4) - 32);
            l[i + 16] = (int8_t) (((x->ql[i] >> 4) | h[i + 16] << 4) - 32);
        }
    }
};

typedef kvt_codec_q2<kvt_block_q2_64, 64> kvt_codec_q2_64;
typedef kvt_codec_q2<kvt_block_q2_32, 32> kvt_codec_q2_32;
typedef kvt_codec_q3<kvt_block_q3_64, 64> kvt_codec_q3_64;
typedef kvt_codec_q3<kvt_block_q3_32, 32> kvt_codec_q3_32;

#ifndef __CUDACC__ // a GPU's threads share a block
//
// rows
//

template <typename C>
static inline void kvt_encode_row(const float * x, void * y, int64_t k) {
    for (int64_t ib = 0; ib < k / C::n; ib++) {
        uint8_t               c[C::n];
        typename C::block_t * b = (typename C::block_t *) y + ib;
        const kvt_half        d = C::template quantize<1>(x + ib * C::n, c);
        KVT_SET_SCALE(b->d, d);
        C::pack(c, b);
    }
}

template <typename C>
static inline void kvt_decode_row(const void * x, float * y, int64_t k) {
    for (int64_t ib = 0; ib < k / C::n; ib++) {
        const typename C::block_t * b = (const typename C::block_t *) x + ib;
        const float                 d = kvt_from_half(KVT_HALF_OF(b->d));
        int8_t                      l[C::n];
        C::levels(b, l);
        for (int i = 0; i < C::n; i++) {
            y[ib * C::n + i] = d * l[i];
        }
    }
}
#endif
