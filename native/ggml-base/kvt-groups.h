// kvt-groups.h - how a block of each group type is written and read: four groups of 16 values with bits of their own, under one scale.
// The rules are those of kvt-blocks.h, for the CPU and a GPU alike
#pragma once

#include "kvt-blocks.h"

// a group's levels, by the bits of its codes; kept: the share of a normal value's energy that the codes keep, weight: of its squared error
// in the choice of the block's scale, as 1/sqrt(error of a normal value)
template <int bits> struct kvt_levels_k;

#define KVT_LEVELS_K(BITS, KEPT, WEIGHT) \
    template <> struct kvt_levels_k<BITS> { \
        static const int        n_level  = 1 << (BITS - 1); \
        static constexpr int8_t levels[] = KVT_LEVELS_K##BITS; \
        KVT_FN float weight() { \
            return WEIGHT; \
        } \
        KVT_FN float level(int k) { \
            const float all[] = KVT_LEVELS_K##BITS; \
            return all[n_level + k] * KEPT; \
        } \
    };
KVT_LEVELS_K(1, 0.6366f, 1.0f)
KVT_LEVELS_K(2, 0.8825f, 1.75f)
KVT_LEVELS_K(3, 0.9655f, 3.25f)
KVT_LEVELS_K(4, 0.9905f, 6.0f)
#undef KVT_LEVELS_K

template <> struct kvt_levels_k<6> {
    static const int n_level = 32;

    KVT_FN float weight() {
        return 18.0f;
    }
};

// the level of |x|, and its number among the positive ones, k
template <int bits>
KVT_FN float kvt_nearest_k(float a, float d, int * k) {
    if constexpr (bits == 6) {
        const float q = kvt_least(a * (d > 1e-30f ? 1.0f / (4.0f * d) : 0.0f), 31.5f);
        const float r = (q - 0.5f + 12582912.0f) - 12582912.0f; // 1.5*2^23: to the nearest
        *k            = (int) r;
        return 4.0f * r + 2.0f;
    } else {
        typedef kvt_levels_k<bits> B;
        *k      = 0;
        float m = B::level(0);
        for (int j = 0; j + 1 < B::n_level; j++) {
            const bool above = a > d * (0.5f * (B::level(j) + B::level(j + 1)));
            *k += above;
            m = above ? B::level(j + 1) : m;
        }
        return m;
    }
}

// four groups of n values each that a thread holds, w*a*m and w*m*m of each
template <int bits, int n>
KVT_FN void kvt_products_k(const float * a, float d, float * am, float * mm) {
    const float w = kvt_levels_k<bits>::weight();
    for (int i = 0; i < n; i++) {
        int         k;
        const float m = kvt_nearest_k<bits>(a[i], d, &k);
        am[i]         = w * (a[i] * m);
        mm[i]         = w * (m * m);
    }
}

template <int bits, int n>
KVT_FN void kvt_codes_k(const float * x, const float * a, float d, uint8_t * c) {
    typedef kvt_levels_k<bits> B;
    for (int i = 0; i < n; i++) {
        int k;
        kvt_nearest_k<bits>(a[i], d, &k);
        c[i] = x[i] < 0.0f ? B::n_level - 1 - k : B::n_level + k;
    }
}

template <int bits, int n>
static inline void kvt_levels_of(const uint8_t * c, int8_t * l) {
    for (int i = 0; i < n; i++) {
        if constexpr (bits == 6) {
            l[i] = (int8_t) (4 * c[i] - 126);
        } else {
            l[i] = kvt_level<kvt_levels_k<bits>>(c[i]);
        }
    }
}

static inline void kvt_pack_k(const uint8_t * c, kvt_block_k2_64 * y) {
    for (int i = 0; i < 16; i++) {
        const uint8_t *a = c + i, *b = a + 16, *e = a + 32, *f = a + 48;
        y->qs[i] = (*a & 3) | *b << 2 | (*e | (*a >> 1 & 2)) << 4 | (*f | (*a >> 2 & 2)) << 6;
    }
}

static inline void kvt_unpack_k(const kvt_block_k2_64 * x, uint8_t * c) {
    for (int i = 0; i < 16; i++) {
        const uint8_t q = x->qs[i];
        c[i]            = (q & 3) | (q >> 3 & 4) | (q >> 4 & 8);
        c[i + 16]       = q >> 2 & 3;
        c[i + 32]       = q >> 4 & 1;
        c[i + 48]       = q >> 6 & 1;
    }
}

static inline void kvt_pack_k(const uint8_t * c, kvt_block_k3_64 * y) {
    for (int i = 0; i < 16; i++) {
        const uint8_t *a = c + i, *b = a + 16, *e = a + 32, *f = a + 48;
        y->qs[i] = (*a & 3) | (*b & 3) << 2 | *e << 4 | (*f | (*b >> 1 & 2)) << 6;
    }
    for (int i = 0; i < 8; i++) {
        y->qh[i] = c[i] >> 2 | (c[i + 8] >> 2) << 4;
    }
}

static inline void kvt_unpack_k(const kvt_block_k3_64 * x, uint8_t * c) {
    for (int i = 0; i < 16; i++) {
        const uint8_t q = x->qs[i];
        c[i]            = q & 3;
        c[i + 16]       = (q >> 2 & 3) | (q >> 5 & 4);
        c[i + 32]       = q >> 4 & 3;
        c[i + 48]       = q >> 6 & 1;
    }
    for (int i = 0; i < 8; i++) {
        c[i] |= (x->qh[i] & 15) << 2;
        c[i + 8] |= (x->qh[i] >> 4) << 2;
    }
}

static inline void kvt_pack_k(const uint8_t * c, kvt_block_k4_64 * y) {
    for (int i = 0; i < 16; i++) {
        const uint8_t *a = c + i, *b = a + 16, *e = a + 32, *f = a + 48;
        y->qs[i] = (*a & 3) | (*b & 3) << 2 | (*e & 3) << 4 | (*f & 3) << 6;
        y->qh[i] = *a >> 2 | (*b >> 2) << 4 | (*e >> 2) << 6 | (*f >> 2) << 7;
    }
}

static inline void kvt_unpack_k(const kvt_block_k4_64 * x, uint8_t * c) {
    for (int i = 0; i < 16; i++) {
        const uint8_t q = x->qs[i], h = x->qh[i];
        c[i]      = (q & 3) | (h & 15) << 2;
        c[i + 16] = (q >> 2 & 3) | (h >> 2 & 12);
        c[i + 32] = (q >> 4 & 3) | (h >> 4 & 4);
        c[i + 48] = (q >> 6 & 3) | (h >> 5 & 4);
    }
}

// K in groups of 16 values, whose codes have b0, b1, b2 and b3 bits
template <typename block, int b0, int b1, int b2, int b3>
struct kvt_codec_k {
    static const int n = 64;
    typedef block    block_t;

    template <int T> KVT_FN kvt_fit refit(const float * a, float d) {
        const int m   = n / T / 4; // of a group
        kvt_fit   res = { d, 0.0f };
        for (int r = 0; r < 2; r++) {
            float am[n / T], mm[n / T];
            kvt_products_k<b0, m>(a + 0 * m, res.d, am + 0 * m, mm + 0 * m);
            kvt_products_k<b1, m>(a + 1 * m, res.d, am + 1 * m, mm + 1 * m);
            kvt_products_k<b2, m>(a + 2 * m, res.d, am + 2 * m, mm + 2 * m);
            kvt_products_k<b3, m>(a + 3 * m, res.d, am + 3 * m, mm + 3 * m);
            const float sum_am = kvt_sum<n / T, T>(am);
            const float sum_mm = kvt_sum<n / T, T>(mm);
            res                = { sum_am / sum_mm, sum_am * (sum_am / sum_mm) };
        }
        return res;
    }

    // many levels have several minima: three starts around the scale of a block whose values are as they are meant to be
    template <int T> KVT_FN kvt_half quantize(const float * x, uint8_t * c) {
        const int m = n / T / 4;
        float     a[n / T];
        kvt_abs<n / T>(x, a);
        const float start = kvt_rms<n, T>(a) * (1.0f / 38.5f);
        kvt_fit     best  = refit<T>(a, start);
        for (int i = 0; i < 2; i++) {
            const kvt_fit fit = refit<T>(a, start * (i == 0 ? 0.9f : 1.1f));
            best              = fit.gain > best.gain ? fit : best;
        }
        const kvt_half d = kvt_to_e5m3(best.d, 126.0f);
        const float    f = kvt_from_half(d);
        kvt_codes_k<b0, m>(x + 0 * m, a + 0 * m, f, c + 0 * m);
        kvt_codes_k<b1, m>(x + 1 * m, a + 1 * m, f, c + 1 * m);
        kvt_codes_k<b2, m>(x + 2 * m, a + 2 * m, f, c + 2 * m);
        kvt_codes_k<b3, m>(x + 3 * m, a + 3 * m, f, c + 3 * m);
        return d;
    }

    static void levels(const block * x, int8_t * l) {
        uint8_t c[n];
        kvt_unpack_k(x, c);
        kvt_levels_of<b0, 16>(c + 0, l + 0);
        kvt_levels_of<b1, 16>(c + 16, l + 16);
        kvt_levels_of<b2, 16>(c + 32, l + 32);
        kvt_levels_of<b3, 16>(c + 48, l + 48);
    }

    static void pack(const uint8_t * c, block * y) {
        kvt_pack_k(c, y);
    }
};

typedef kvt_codec_k<kvt_block_k2_64, 4, 2, 1, 1> kvt_codec_k2_64;
typedef kvt_codec_k<kvt_block_k3_64, 6, 3, 2, 1> kvt_codec_k3_64;
typedef kvt_codec_k<kvt_block_k4_64, 6, 4, 3, 3> kvt_codec_k4_64;
