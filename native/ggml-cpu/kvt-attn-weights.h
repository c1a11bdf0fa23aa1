// kvt-attn-weights.h - weights: exponentials of a tile's scores, and what a row keeps of them.
#pragma once

#include "kvt-attn-side.h"

#include <algorithm>
#include <cmath>

// e^x, about 2 ulp; x is clamped at TOP, and 0 is returned below -87 and of NaN. The polynomial is that of ggml_v_expf.
template <int TOP = 88>
static KVT_INLINE vf vf_exp(vf x) {
    const vf lim = vf_set1(-87.0f);
    const vf y   = vf_min(vf_set1(TOP), x); // of NaN: NaN
    const vf r   = vf_set1(12582912.0f);
    const vf z   = vf_fma(y, vf_set1(1.44269502e+0f), r);
    const vf n   = vf_sub(z, r);
    const vf b   = vf_fma(n, vf_set1(-1.42860677e-6f), vf_fma(n, vf_set1(-6.93145752e-1f), y));
    const vf u   = vf_mul(b, b);
    const vf p   = vf_fma(vf_fma(vf_set1(8.24739039e-3f), b, vf_set1(4.18997668e-2f)), u,
            vf_fma(vf_set1(1.66683957e-1f), b, vf_set1(4.99991268e-1f)));
    const vf j   = vf_fma(p, u, vf_fma(vf_set1(0.999999404f), b, vf_set1(1.0f)));
    return vf_scale2(j, n, z, x, lim);
}

// tanh(x) = 1 - 2/(e^2x + 1)
static KVT_INLINE vf vf_tanh(vf x) {
    const vf one = vf_set1(1.0f);
    return vf_sub(one, vf_div(vf_set1(2.0f), vf_add(vf_exp(vf_add(x, x)), one)));
}

struct kvt_soft_max {
    float softcap;
    bool  own; // weights against a part's own max, whatever else there is: V's are rounded
};

// Scales and masks a part of a row of scores, if there is more to it than its scale; mask: null, or of as many entries. -> their max, scaled. A
// score that is seen and is no number makes the row none.
template <bool PLAIN>
static KVT_INLINE float kvt_row_max(const kvt_soft_max & a, const uint16_t * mask, float * s, kvt_row & row) {
    vf top = vf_set1(-INFINITY), zero = vf_set1(0);
    for (int j = 0; j < KVT_PART; j += KVT_VW) {
        vf x = vf_load(s + j), seen = x;
        if (!PLAIN) {
            x = seen = vf_mul(x, vf_set1(row.scale));
            if (a.softcap != 0.0f) {
                x = vf_mul(vf_set1(a.softcap), vf_tanh(x));
            }
            if (mask) {
                const vf hidden = vf_load_f16(mask + j);
                seen            = vf_where_gt(seen, hidden, vf_set1(-INFINITY));
                x               = vf_fma(hidden, vf_set1(row.slope), x);
            }
            vf_store(s + j, x);
        }
        zero = vf_fma(seen, vf_set1(0), zero);
        top  = vf_max(x, top); // of NaN, as a masked cell may hold: top
    }
    if (vf_any_nan(zero)) {
        row.sum = NAN;
    }
    return PLAIN ? vf_hmax(top) * row.scale : vf_hmax(top);
}

// s: exp(s*times - base) of n_parts parts -> their sums, times their factors
static KVT_INLINE float kvt_row_exp(float * s, int n_parts, float times, const float * base, const float * factor) {
    vf all = vf_set1(0);
    for (int p = 0; p < n_parts; p++) {
        const vf top   = vf_set1(-base[p]);
        vf       total = vf_set1(0);
        for (int j = p * KVT_PART; j < (p + 1) * KVT_PART; j += KVT_VW) {
            const vf x = vf_exp<0>(vf_fma(vf_load(s + j), vf_set1(times), top)); // of the largest, rounded, may be above 0: no weight is above 1
            vf_store(s + j, x);
            total = vf_add(total, x);
        }
        all = vf_fma(total, vf_set1(factor[p]), all);
    }
    return vf_hsum(all);
}

// Turns scores into exp(score - max) and scales out [rows][n_out] to a new max. tile.factor: of what each part of a row is to be multiplied by,
// 0 where all its cells are masked.
static void kvt_weights(const kvt_soft_max & a, const kvt_seen & seen, kvt_row * rows, float * out, int64_t n_out, kvt_tile & tile) {
    const int        n_parts = tile.n / KVT_PART;
    const uint16_t * mask    = nullptr;
    for (int r = 0; r < seen.n_rows; r++) {
        kvt_row & row = rows[r];
        float     top[KVT_PARTS], all = -INFINITY;
        mask             = seen.as_before(r) ? mask : seen.mask(r);
        const bool plain = !mask && a.softcap == 0.0f;
        tile.times[r]    = plain ? row.scale : 1.0f;
        for (int p = 0; p < n_parts; p++) {
            float * s = tile.S + r * tile.n + p * KVT_PART;
            if (plain) {
                top[p] = kvt_row_max<true>(a, nullptr, s, row);
            } else {
                top[p] = kvt_row_max<false>(a, mask ? mask + p * KVT_PART : nullptr, s, row);
            }
            all = std::max(all, top[p]);
        }
        if (all > row.max) {
            const float ms = expf(row.max - all);
            for (int64_t i = r * n_out; i < (r + 1) * n_out; i += KVT_VW) {
                vf_store(out + i, vf_mul(vf_load(out + i), vf_set1(ms)));
            }
            row.sum *= ms;
            row.max = all;
        }
        for (int p = 0; p < n_parts; p++) {
            const bool hidden = top[p] == -INFINITY;

            tile.factor[r * KVT_PARTS + p] = hidden ? -INFINITY : a.own ? top[p] - row.max
                                                                        : 0.0f;
            tile.minus[r * KVT_PARTS + p]  = hidden ? INFINITY : a.own ? top[p]
                                                                       : row.max; // less infinity, all are 0
        }
    }
    for (int i = 0; i < seen.n_rows * KVT_PARTS; i += KVT_VW) {
        vf_store(tile.factor + i, vf_exp<0>(vf_load(tile.factor + i)));
    }
    for (int r = 0; r < seen.n_rows; r++) {
        rows[r].sum += kvt_row_exp(tile.S + r * tile.n, n_parts, tile.times[r], tile.minus + r * KVT_PARTS, tile.factor + r * KVT_PARTS);
    }
}
