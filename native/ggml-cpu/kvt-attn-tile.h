// kvt-attn-tile.h - a tile of KV rows: scores of K, and the product of their weights with V. In floats, or, of blocks of codes, in integers.
// Q and the weights are rounded to 16 bits there.
#pragma once

#include "kvt-attn-gemm.h"
#include "kvt-attn-weights.h"

#include <algorithm>
#include <cmath>

//
// scores
//

// as [DKp][tile.n]: a step of the product takes one value of many KV rows
static void kvt_scores_float(const kvt_side & k, const char * src, int n, int n_rows, const float * Q, float * S, kvt_tile & tile, kvt_ahead & ahead) {
    for (int r = 0; r < n; r += KVT_VW) {
        k.floats(src + r * k.t->nb[1], std::min(KVT_VW, n - r), tile.tmp);
        for (int64_t i = 0; i < k.Dp; i += KVT_VW) {
            vf_transpose(tile.tmp + i, k.Dp, tile.kt + i * tile.n + r, tile.n);
        }
    }
    ahead.spread<kvt_step_float>(n_rows, n, n, k.Dp);
    kvt_gemm<kvt_step_float, kvt_scale_none>({ n_rows, kvt_pad(n), k.Dp, Q, kvt_q_size(k), tile.kt, tile.n, S, tile.n, false, {}, nullptr, 0 }, ahead);
}

#ifdef KVT_DOT

// rows of a tile that fill no vector go by way of tmp, the last ones with nothing behind them: there may be the end of the cache. -> where they are
static const char * kvt_rest(const kvt_side & s, const char * src, int n_full, int n, kvt_tile & tile) {
    char * tmp = (char *) tile.tmp;
    memset(tmp, 0, KVT_VW * s.row_size);
    for (int r = n_full; r < n; r++) {
        memcpy(tmp + (r - n_full) * s.row_size, src + r * s.t->nb[1], s.row_size);
    }
    return tmp;
}

static void kvt_set_scales(const kvt_side & s, const char * src, int n, kvt_tile & tile) {
    s.type->scales(src, s.t->nb[1], n, s.D, tile.d, tile.m, KVT_TILE);
    for (int64_t b = 0; b < s.n_blocks && n < KVT_TILE; b++) {
        std::fill(tile.d + b * KVT_TILE + n, tile.d + (b + 1) * KVT_TILE, (uint16_t) 0);
        std::fill(tile.m + b * KVT_TILE + n, tile.m + (b + 1) * KVT_TILE, (uint16_t) 0);
    }
}

static void kvt_codes(const kvt_side & s, kvt_codes_t codes, const char * src, int n, int32_t * dst, int64_t row, int64_t ld, kvt_tile & tile) {
    const int n_full = n / KVT_VW * KVT_VW;
    codes(src, s.t->nb[1], n_full, s.D, dst, ld);
    if (n_full < n) {
        codes(kvt_rest(s, src, n_full, n, tile), s.row_size, KVT_VW, s.D, dst + n_full * row, ld);
    }
    kvt_set_scales(s, src, n, tile);
}

static void kvt_scores_few(const kvt_side & k, const char * src, int n, int n_rows, const float * Q, float * S, kvt_tile & tile, kvt_ahead & ahead) {
    const int     n_full = n / KVT_VW * KVT_VW;
    const int64_t ldq    = kvt_q_size(k);
    kvt_set_scales(k, src, n, tile);
    ahead.spread((n + 2 * KVT_VW - 1) / (2 * KVT_VW) * k.n_blocks);
    const auto rows = [&](const char * src, size_t nb, int first, int n) {
        const kvt_few_k g = { src, nb, k.n_blocks, (const kvt_step_int::value *) Q, ldq * (int64_t) sizeof(float) / (int64_t) sizeof(kvt_step_int::value),
            (const int32_t *) Q + k.D / 2, Q + k.D / 2 + k.n_blocks, ldq, tile.d + first, tile.m + first, S + first, tile.n };
        k.type->few_k(g, n_rows, n, ahead);
    };
    rows(src, k.t->nb[1], 0, n_full);
    if (n_full < n) {
        rows(kvt_rest(k, src, n_full, n, tile), k.row_size, n_full, KVT_VW);
    }
}

static void kvt_scores_int(const kvt_side & k, const char * src, int n, int n_rows, const float * Q, float * S, kvt_tile & tile, kvt_ahead & ahead) {
    int32_t * kt = (int32_t *) tile.kt;
    kvt_codes(k, k.type->codes_k, src, n, kt, 1, KVT_TILE, tile);
    const int64_t ldq = kvt_q_size(k), n_steps = k.type->n / KVT_SIDE_BY_SIDE;
    ahead.spread<kvt_step_int>(n_rows, n, n, k.D / KVT_SIDE_BY_SIDE);
    for (int64_t b = 0; b < k.n_blocks; b++) {
        const kvt_gemm_args<kvt_step_int, kvt_scale_cols> g = { n_rows, kvt_pad(n), n_steps, (const kvt_step_int::value *) Q + b * n_steps,
            ldq * (int64_t) sizeof(float) / (int64_t) sizeof(kvt_step_int::value), kt + b * n_steps * KVT_TILE, KVT_TILE, S, tile.n, b > 0,
            { tile.d + b * KVT_TILE }, (const int32_t *) Q + k.D / 2 + b, ldq };
        kvt_gemm(g, ahead);
        if (k.type->has_min) {
            for (int r = 0; r < n_rows; r++) {
                const vf sum = vf_set1(Q[r * ldq + k.D / 2 + k.n_blocks + b]);
                for (int j = 0; j < n; j += KVT_VW) {
                    float * s = S + r * tile.n + j;
                    vf_store(s, vf_fma(vf_load_f16(tile.m + b * KVT_TILE + j), sum, vf_load(s)));
                }
            }
        }
    }
}

#endif

static void kvt_scores(const kvt_side & k, const char * src, const kvt_seen & seen, const float * Q, kvt_tile & tile, kvt_ahead ahead) {
    float * S = tile.S + seen.first * tile.n;
#ifdef KVT_DOT
    if (k.integer) {
        const auto scores = seen.n_rows <= KVT_FEW_ROWS ? kvt_scores_few : kvt_scores_int;
        scores(k, src, seen.n, seen.n_rows, Q, S, tile, ahead);
        return;
    }
#endif
    kvt_scores_float(k, src, seen.n, seen.n_rows, Q, S, tile, ahead);
}

//
// out += weights V
//

static void kvt_product_float(const kvt_side & v, const float * S, int n, int row, int n_rows, float * out, kvt_tile & tile, kvt_ahead & ahead) {
    kvt_gemm<kvt_step_float, kvt_scale_none>({ n_rows, v.Dp, n, S + row * tile.n, tile.n, tile.vt, v.Dp, out + row * v.Dp, v.Dp, true, {}, nullptr, 0 }, ahead);
}

// some cells hold what is no number: 0 times it is none, so that rows that see other cells go apart
static void kvt_values_apart(const kvt_side & v, const char * src, const kvt_seen & seen, float * out, kvt_tile & tile, kvt_ahead & ahead) {
    kvt_cells bad;
    for (int i = 0; i < seen.n; i++) {
        bad[i] = !kvt_finite(tile.vt + i * v.Dp, v.Dp);
    }
    for (int r = 0, end; r < seen.n_rows; r = end) {
        for (end = r + 1; end < seen.n_rows && seen.as_before(end); end++) {}
        for (int i = 0; i < seen.n; i++) {
            if (bad[i]) {
                if (seen.sees(r, kvt_cells().set(i))) {
                    v.floats(src + i * v.t->nb[1], 1, tile.vt + i * v.Dp);
                } else {
                    memset(tile.vt + i * v.Dp, 0, v.Dp * sizeof(float));
                }
            }
        }
        kvt_product_float(v, tile.S + seen.first * tile.n, seen.n, r, end - r, out, tile, ahead);
    }
}

static void kvt_values_float(const kvt_side & v, const char * src, const kvt_seen & seen, float * out, kvt_tile & tile, kvt_ahead & ahead) {
    const float * S = tile.S + seen.first * tile.n;
    ahead.spread<kvt_step_float>(seen.n_rows, v.Dp, v.Dp, seen.n);
    if (seen.all && seen.n_rows <= kvt_step_float::MR && v.type && v.type->product) {
        v.type->product(seen.n_rows, S, tile.n, src, v.t->nb[1], seen.n, v.D, out, ahead);
        return;
    }
    v.floats(src, seen.n, tile.vt);
    if (seen.all || kvt_finite(tile.vt, seen.n * v.Dp)) {
        kvt_product_float(v, S, seen.n, 0, seen.n_rows, out, tile, ahead);
    } else {
        kvt_values_apart(v, src, seen, out, tile, ahead);
    }
}

#ifdef KVT_DOT

// whether all of n values of f16, whole vectors, are finite
static bool kvt_finite_f16(const uint16_t * x, int n) {
    vf zero = vf_set1(0);
    for (int j = 0; j < n; j += KVT_VW) {
        zero = vf_fma(vf_load_f16(x + j), vf_set1(0), zero);
    }
    return !vf_any_nan(zero);
}

// Scales of n rows of V that are no numbers become 0. -> which are
static kvt_cells kvt_take_out(const kvt_side & v, int n, uint16_t * d, uint16_t * m) {
    kvt_cells bad;
    if (kvt_finite_f16(d, (int) kvt_pad(n)) && (!v.type->has_min || kvt_finite_f16(m, (int) kvt_pad(n)))) {
        return bad;
    }
    const auto no_number = [](uint16_t x) { return (x & 0x7c00) == 0x7c00; };
    for (int i = 0; i < n; i++) {
        if (no_number(d[i]) || (v.type->has_min && no_number(m[i]))) {
            d[i] = m[i] = 0;
            bad.set(i);
        }
    }
    return bad;
}

// the largest of n scales of those that are seen (mask; null: all are)
static float kvt_top(const uint16_t * d, const uint16_t * mask, int n) {
    vf top = vf_set1(0);
    for (int j = 0; j < n; j += KVT_VW) {
        const vf x = vf_abs(vf_load_f16(d + j));
        top        = vf_max(top, mask ? vf_where_gt(x, vf_load_f16(mask + j), vf_set1(-INFINITY)) : x);
    }
    return vf_hmax(top);
}

// weights of a row, of a part, times the scales of the KV rows, rounded. -> their sum
static KVT_INLINE int32_t kvt_round(const float * __restrict s, const vf * norm, int16_t * __restrict w) {
    vi sum = vi_set1(0);
    for (int j = 0; j < KVT_PART; j += KVT_VW) {
        const vi x = vi_round_product(vf_load(s + j), norm[j / KVT_VW]);
        sum        = vi_add(sum, x);
        kvt_step_int::put_v(x, w, j);
    }
    return (int32_t) ((uint32_t) vi_hsum(sum) - (uint32_t) KVT_PART * (uint32_t) KVT_ROUND_BIAS);
}

// the weights of block b, rounded, and what their products are to be scaled by. bad: rows whose scales are no numbers
static void kvt_round_all(const kvt_side & v, int64_t b, const kvt_seen & seen, const kvt_cells & bad, kvt_tile & tile) {
    const float *    S      = tile.S + seen.first * tile.n;
    const float *    factor = tile.factor + seen.first * KVT_PARTS;
    const uint16_t * d      = tile.d + b * KVT_TILE;
    // the scale of a KV row goes into its weight, as a part of the largest one that the row of Q sees in the tile
    for (int r = 0, end; r < seen.n_rows; r = end) {
        for (end = r + 1; end < seen.n_rows && (seen.all || seen.as_before(end)); end++) {}
        const float d_max = kvt_top(d, seen.all && seen.n == tile.n ? nullptr : seen.mask(r), tile.n);
        const vf    inv   = vf_set1(d_max > 0.0f ? KVT_MAX_INT / d_max : 0.0f);
        for (int p = 0; p < tile.n; p += KVT_PART) {
            vf norm[KVT_PART / KVT_VW];
            for (int j = 0; j < KVT_PART; j += KVT_VW) {
                norm[j / KVT_VW] = vf_mul(vf_load_f16(d + p + j), inv);
            }
            for (int i = r; i < end; i++) {
                const int at     = i * KVT_PARTS + p / KVT_PART;
                tile.start[at]   = -v.type->zero * kvt_round(S + i * tile.n + p, norm, tile.W + i * tile.n + p);
                tile.w_scale[at] = factor[at] * (bad.any() && seen.sees(i, bad) ? NAN : d_max / KVT_MAX_INT);
            }
        }
    }
}

// out += the sum of weights times m, of block b
static void kvt_add_min(const kvt_side & v, int64_t b, const kvt_seen & seen, float * out, const kvt_tile & tile) {
    for (int r = 0; r < seen.n_rows; r++) {
        float all = 0.0f;
        for (int p = 0; p < seen.n; p += KVT_PART) {
            vf sum = vf_set1(0);
            for (int j = p; j < std::min(p + KVT_PART, seen.n); j += KVT_VW) { // what is behind may be anything
                sum = vf_fma(vf_load(tile.S + (seen.first + r) * tile.n + j), vf_load_f16(tile.m + b * KVT_TILE + j), sum);
            }
            all += vf_hsum(sum) * tile.factor[(seen.first + r) * KVT_PARTS + p / KVT_PART];
        }
        float * y = out + r * v.Dp + b * v.type->n;
        for (int64_t c = 0; c < v.type->n; c += KVT_VW) {
            vf_store(y + c, vf_add(vf_load(y + c), vf_set1(all)));
        }
    }
}

// what part p of the weights, rounded, adds to out, both of block b; rest: where the last of n cells are if they fill no four
static void kvt_values_few(const kvt_side & v, int64_t b, const char * src, const char * rest, int p, int n, int n_rows, float * out, kvt_tile & tile, kvt_ahead & ahead) {
    const size_t    nb = v.t->nb[1], at = b * v.row_size / v.n_blocks;
    const kvt_few_v g = { src + p * nb + at, rest + at, nb, v.row_size, (const kvt_step_int::value *) (tile.W + p), tile.n / KVT_SIDE_BY_SIDE,
        tile.start + p / KVT_PART, tile.w_scale + p / KVT_PART, out, v.Dp };
    v.type->few_v(g, n_rows, n, ahead);
}

static void kvt_values_int(const kvt_side & v, const char * src, const kvt_seen & seen, float * out, kvt_tile & tile, kvt_ahead & ahead) {
    int32_t *    vt   = (int32_t *) tile.vt;
    const bool   few  = seen.n_rows <= v.type->few_v_max;
    const char * rest = src;
    if (few) {
        ahead.spread((seen.n + 15) / 16 * v.n_blocks);
        kvt_set_scales(v, src, seen.n, tile);
        if (seen.n % 4 != 0) {
            rest = kvt_rest(v, src, seen.n / 4 * 4, seen.n, tile);
        }
    } else {
        ahead.spread<kvt_step_int>(seen.n_rows, v.D, v.type->n, (seen.n + 3) / 4 * KVT_STEPS);
        kvt_codes(v, v.type->codes_v, src, seen.n, vt, v.D / KVT_SIDE_BY_SIDE, v.D, tile);
    }
    for (int64_t b = 0; b < v.n_blocks; b++) {
        // a scale that is no number makes the rows that see it none, and is not multiplied
        const kvt_cells bad = kvt_take_out(v, seen.n, tile.d + b * KVT_TILE, tile.m + b * KVT_TILE);
        kvt_round_all(v, b, seen, bad, tile);
        for (int p = 0; p < seen.n; p += KVT_PART) {
            const int     n_kv = std::min(KVT_PART, seen.n - p);
            const int64_t i = b * v.type->n, n_steps = (n_kv + 3) / 4 * KVT_STEPS;
            if (few) {
                kvt_values_few(v, b, src, rest, p, n_kv, seen.n_rows, out + i, tile, ahead);
                continue;
            }
            const kvt_gemm_args<kvt_step_int, kvt_scale_rows> g = { seen.n_rows, v.type->n, n_steps, (const kvt_step_int::value *) (tile.W + p),
                tile.n / KVT_SIDE_BY_SIDE, vt + p / KVT_SIDE_BY_SIDE * v.D + i, v.D, out + i, v.Dp, true, { tile.w_scale + p / KVT_PART, KVT_PARTS },
                tile.start + p / KVT_PART, KVT_PARTS };
            kvt_gemm(g, ahead);
        }
        if (v.type->has_min) {
            kvt_add_min(v, b, seen, out, tile);
        }
    }
}

#endif

static void kvt_values(const kvt_side & v, const char * src, const kvt_seen & seen, float * out, kvt_tile & tile, kvt_ahead ahead) {
#ifdef KVT_DOT
    if (v.integer) {
        kvt_values_int(v, src, seen, out, tile, ahead);
        return;
    }
#endif
    kvt_values_float(v, src, seen, out, tile, ahead);
}
