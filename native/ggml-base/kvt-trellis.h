// kvt-trellis.h - how a block of each trellis type is written: its scale, and its codes by the best way around their ring (kvt-ways.h)
#pragma once

#include "kvt-ways.h"

template <typename block, typename ring>
struct kvt_codec_t : kvt_codec_ring<block, ring> {
    typedef ring R;
    using kvt_codec_ring<block, ring>::n;

    // as kvt_codec_levels: the scale that is stored is that with sum(x*x^) = sum(x*x), but for its rounding. What that takes from it or
    // gives to it is known before, as a rule, and the codes are chosen for it
    template <int T> KVT_FN kvt_half quantize(const float * x, uint8_t * c) {
        const int       n_own = n / T;
        constexpr float kept = R::kept[0], to_d = 1.0f / R::sigma / kept;
        float           a[n_own], v[n_own];
        int16_t         q[n_own], m[n_own];
        kvt_abs<n_own>(x, a);
        const float all   = kvt_sum_sq<n_own, T>(a);
        const float sigma = sqrtf(all / n);
        const float d     = kvt_from_half(kvt_to_e5m3(sigma * to_d, 127.0f));
        const float most  = sigma > 1e-30f ? KVT_RING_SIGMA / sigma : 0.0f;
        const float inv   = d > 0.0f ? kvt_least(1.0f / (kept * d), most) : most;
        for (int i = 0; i < n_own; i++) {
            q[i] = kvt_on_ring(x[i], a[i], inv);
        }
        kvt_ways<R, T>::find(q, c, m);
        for (int i = 0; i < n_own; i++) {
            v[i] = (x[i] < 0.0f ? -a[i] : a[i]) * m[i];
        }
        const float along = kvt_sum<n_own, T>(v);
        return kvt_to_e5m3(along > 0.0f ? all / along : d, 127.0f);
    }
};

typedef kvt_codec_t<kvt_block_t2_64, kvt_ring_t2> kvt_codec_t2_64;
typedef kvt_codec_t<kvt_block_t3_64, kvt_ring_t3> kvt_codec_t3_64;
typedef kvt_codec_t<kvt_block_t4_64, kvt_ring_t4> kvt_codec_t4_64;
