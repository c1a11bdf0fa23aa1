// kvt-groups.h - how a block of each group type is written and read: four groups of 16 values with bits of their own, under one scale. The
// groups with few bits are on a ring (kvt-trellis.h), the first of k3_64 and k4_64 has a grid of its own. The rules are those of kvt-blocks.h
#pragma once

#include "kvt-trellis.h"

static inline void kvt_pack_k(int i, int bits, int, kvt_block_k2_64 * y) {
    y->qs[i] = (uint8_t) bits;
}

static inline void kvt_pack_k(int i, int bits, int first, kvt_block_k3_64 * y) {
    y->qs[i]     = (uint8_t) (bits | first >> 4 << 6);
    y->qh[i % 8] = (uint8_t) (i < 8 ? first & 15 : y->qh[i % 8] | (first & 15) << 4);
}

static inline void kvt_pack_k(int i, int bits, int first, kvt_block_k4_64 * y) {
    y->qs[i] = (uint8_t) bits;
    y->qh[i] = (uint8_t) (bits >> 8 | first << 1);
}

// the bits on the ring; c: that of the first group
static inline int kvt_unpack_k(int i, const kvt_block_k2_64 * x, int *) {
    return x->qs[i];
}

static inline int kvt_unpack_k(int i, const kvt_block_k3_64 * x, int * first) {
    *first = (x->qh[i % 8] >> (i < 8 ? 0 : 4) & 15) | x->qs[i] >> 6 << 4;
    return x->qs[i] & 63;
}

static inline int kvt_unpack_k(int i, const kvt_block_k4_64 * x, int * first) {
    *first = x->qh[i] >> 1;
    return x->qs[i] | (x->qh[i] & 1) << 8;
}

// K in groups of 16 values; of the first, codes of `bits` bits stand for odd multiples of half a step, if it is not on the ring
template <typename block, typename ring, int bits, int step>
struct kvt_codec_k {
    static const int n = 64;
    typedef block    block_t;
    typedef ring     R;
    static const int n_first = 4 - R::n_value; // groups that are not on the ring

    // of a phase: from values in levels to those of the search
    template <int p> static constexpr float to_search = R::fine[p] / (64.0f * R::kept[p]);

    template <int T, int p = 0> KVT_FN void on_ring(const float * x, const float * a, float inv, int16_t * q) {
        constexpr float factor = to_search<p>;
        for (int i = 0; i < 16 / T; i++) {
            q[i] = kvt_on_ring(x[i], a[i], inv * factor);
        }
        if constexpr (p + 1 < R::n_value) {
            on_ring<T, p + 1>(x + 16 / T, a + 16 / T, inv, q + 16 / T);
        }
    }

    // the scale is what a block should have whose values are as they are meant to be
    template <int T> KVT_FN kvt_half quantize(const float * x, uint8_t * c) {
        const int       n_group = 16 / T;
        constexpr float to_d = 1.0f / R::sigma, most = KVT_RING_SIGMA / to_search<0>;
        float           a[n / T];
        int16_t         q[n / T], m[n / T];
        kvt_abs<n / T>(x, a);
        const float    sigma = kvt_rms<n, T>(a);
        const kvt_half d     = kvt_to_e5m3(sigma * to_d, 127.0f);
        const float    f     = kvt_from_half(d);
        const float    inv   = f > 0.0f ? kvt_least(1.0f / f, most / sigma) : 0.0f;
        on_ring<T>(x + n_first * n_group, a + n_first * n_group, inv, q);
        kvt_ways<R, T>::find(q, c + n_first * n_group, m);
        if constexpr (n_first > 0) {
            const float half = 1 << (bits - 1);
            for (int i = 0; i < n_group; i++) {
                const float r = (kvt_least(a[i] * inv * (1.0f / step), half - 0.5f) - 0.5f + 12582912.0f) - 12582912.0f; // 1.5*2^23: to the nearest
                c[i]          = (uint8_t) (x[i] < 0.0f ? half - 1 - r : half + r);
            }
        }
        return d;
    }

    static void levels(const block * x, int8_t * l) {
        int first  = 0;
        int before = kvt_unpack_k(15, x, &first);
        for (int i = 0; i < 16; i++) {
            const int own = kvt_unpack_k(i, x, &first);
            if constexpr (n_first > 0) {
                l[i] = (int8_t) (step * first + step / 2 - (step << (bits - 1)));
            }
            kvt_levels_on_ring<R>(before, own, l + 16 * n_first + i);
            before = own;
        }
    }

    static void pack(const uint8_t * c, block * y) {
        for (int i = 0; i < 16; i++) {
            kvt_pack_k(i, kvt_bits_on_ring<R>(c + 16 * n_first + i), c[i], y);
        }
    }
};

typedef kvt_codec_k<kvt_block_k2_64, kvt_ring_k2, 0, 0> kvt_codec_k2_64;
typedef kvt_codec_k<kvt_block_k3_64, kvt_ring_k3, 6, 4> kvt_codec_k3_64;
typedef kvt_codec_k<kvt_block_k4_64, kvt_ring_k4, 7, 2> kvt_codec_k4_64;
