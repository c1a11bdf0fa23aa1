// kvt-groups.h - how a block of each group type is written and read: four groups of 16 values with bits of their own, under one scale. The
// groups with few bits are on a ring (kvt-rings.h), the first of k3_64, k4_64 and k5_64 has a grid of its own. The rules are those of kvt-blocks.h
#pragma once

#include "kvt-ways.h"

template <typename block, typename ring>
struct kvt_codec_k : kvt_codec_ring<block, ring> {
    typedef ring                        R;
    typedef kvt_codec_ring<block, ring> C;
    using C::n;
    using C::n_first;

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

    // the scale is what a block should have whose values are as they are meant to be; more where the first group, whose errors weigh
    // most, would be cut off
    template <int T> KVT_FN kvt_half quantize(const float * x, uint8_t * c) {
        const int       n_group = 16 / T;
        constexpr float to_d = 1.0f / R::sigma, most = KVT_RING_SIGMA / to_search<0>;
        constexpr float top_to_d = 1.0f / (n_first > 0 ? 127.0f : KVT_RING_MAX);
        float           a[n / T];
        int16_t         q[n / T], m[n / T];
        kvt_abs<n / T>(x, a);
        const float    sigma = kvt_rms<n, T>(a);
        const kvt_half d     = kvt_to_e5m3(kvt_most(sigma * to_d, kvt_max<n_group, T>(a) * top_to_d), 127.0f);
        const float    f     = kvt_from_half(d);
        const float    inv   = f > 0.0f ? kvt_least(1.0f / f, most / sigma) : 0.0f;
        on_ring<T>(x + n_first * n_group, a + n_first * n_group, inv, q);
        kvt_ways<R, T>::find(q, c + n_first * n_group, m);
        if constexpr (R::finer > 0) {
            for (int i = 0; i < n_group; i++) {
                const float v = a[n_first * n_group + i] * inv, s = x[n_first * n_group + i] < 0.0f ? -v : v;
                c[n_first * n_group + i] |= (s > m[i]) << R::bits[0];
            }
        }
        if constexpr (n_first > 0) {
            const float half = 1 << (C::bits - 1), mid = C::step > 1 ? 0.5f : 0.0f; // a step of one has a level of 0
            for (int i = 0; i < n_group; i++) {
                const float r = kvt_round(kvt_least(a[i] * inv * (1.0f / C::step), half - 1.0f + mid) - mid);
                c[i]          = (uint8_t) (x[i] < 0.0f ? half - 2.0f * mid - r : half + r);
            }
        }
        return d;
    }
};

typedef kvt_codec_k<kvt_block_k2_64, kvt_ring_k2> kvt_codec_k2_64;
typedef kvt_codec_k<kvt_block_k3_64, kvt_ring_k3> kvt_codec_k3_64;
typedef kvt_codec_k<kvt_block_k4_64, kvt_ring_k4> kvt_codec_k4_64;
typedef kvt_codec_k<kvt_block_k5_64, kvt_ring_k5> kvt_codec_k5_64;
