// kvt-attn-tile.h - a tile of KV rows: scores of K, one pass of exponentials, product with V. In floats, or, of blocks of codes, in integers.
// Q and the weights are rounded to 16 bits there.
#pragma once

#include "kvt-attn-gemm.h"
#include "kvt-attn-seen.h"
#include "kvt-attn-types.h"

#include <algorithm>
#include <cmath>
#include <numeric>

static int64_t kvt_pad(int64_t n) {
    return GGML_PAD(n, KVT_VW);
}

// K or V of an op
struct kvt_side {
    const ggml_tensor *   t;
    const kvt_attn_type * type; // null: to_float
    int64_t               D, Dp;              // head size, and padded to the vector
    bool                  integer;
    int64_t               n_blocks;
    size_t                row_size;

    kvt_side() = default;
    kvt_side(const ggml_tensor * t) : t(t), type(nullptr), D(t->ne[0]), Dp(kvt_pad(t->ne[0])), row_size(ggml_row_size(t->type, t->ne[0])) {
        for (const kvt_attn_type & row : kvt_attn_types) {
            if (row.type == t->type && D % row.n == 0) {
                type = &row;
            }
        }
#ifdef KVT_DOT
        integer  = type && type->codes_k;
        n_blocks = integer ? D / type->n : 0;
#else
        integer  = false;
        n_blocks = 0;
#endif
    }

    const char * head(int64_t ik2, int64_t i3, int64_t n_stream) const {
        return (const char *) t->data + ik2 * t->nb[2] + i3 / (n_stream / t->ne[3]) * t->nb[3];
    }

    // 4 bytes each
    int64_t n_tile() const { return KVT_TILE * (integer ? D / KVT_SIDE_BY_SIDE : Dp); }

    void floats(const char * src, int n_rows, float * dst) const {
        if (type) {
            type->unpack(src, t->nb[1], n_rows, D, dst, Dp);
            return;
        }
        for (int r = 0; r < n_rows; r++) {
            if (t->type == GGML_TYPE_F32) {
                memcpy(dst + r * Dp, src + r * t->nb[1], D * sizeof(float));
            } else {
                ggml_get_type_traits(t->type)->to_float(src + r * t->nb[1], dst + r * Dp, D);
            }
        }
    }
};

// memory of a tile, of one thread
struct kvt_tile {
    int        n;       // KV rows
    float *    kt;      // [DKp][n]; or int32, some values side by side, [DK/side by side][KVT_TILE]
    float *    vt;      // [n][DVp]; or [KVT_TILE/side by side][DV]
    float *    S;       // [rows][n]
    float *    tmp;     // [KVT_VW][D]: rows on their way
    int16_t *  W;       // [rows][n]: weights of a block of V's columns, as steps of the product take them
    int32_t *  start;   // [rows][parts]: where their sums start
    float *    w_scale; // [rows][parts]
    float *    factor;  // [rows][parts]: of the weights
    float *    times;   // [rows]: what the scores are still to be multiplied by
    float *    minus;   // [rows][parts]: what is taken off them then
    uint16_t * d; // [blocks][KVT_TILE], f16
    uint16_t * m;
    uint16_t * end;   // [KVT_TILE]: a mask of a tile that is not full

    static int64_t size(const kvt_side & k, const kvt_side & v, int64_t n_rows) {
        kvt_tile tile;
        return tile.lay(nullptr, k, v, n_rows);
    }

    // floats take four times as much of the processor's cache
    static int rows_of(const kvt_side & k, const kvt_side & v) { return k.integer && v.integer ? KVT_TILE : KVT_PART; }

    kvt_tile(float * base, const kvt_side & k, const kvt_side & v, int64_t n_rows) { lay(base, k, v, n_rows); }

private:
    kvt_tile() = default;

    // -> floats
    int64_t lay(float * base, const kvt_side & k, const kvt_side & v, int64_t n_rows) {
        const int64_t D = std::max(k.Dp, v.Dp), n_blocks = std::max(k.n_blocks, v.n_blocks);
        int64_t       size = 0;
        n                  = rows_of(k, v);
        const auto take    = [&](int64_t n) { float * p = base ? base + size : nullptr; size += GGML_PAD(n, 16); return p; };
        kt = take(k.n_tile()), vt = take(v.n_tile()), S = take(n_rows * n), tmp = take(KVT_VW * D), times = take(n_rows);
        W = (int16_t *) take(n_rows * n / 2), start = (int32_t *) take(n_rows * KVT_PARTS);
        w_scale = take(n_rows * KVT_PARTS), factor = take(n_rows * KVT_PARTS), minus = take(n_rows * KVT_PARTS);
        d = (uint16_t *) take(n_blocks * KVT_TILE / 2), m = (uint16_t *) take(n_blocks * KVT_TILE / 2), end = (uint16_t *) take(KVT_TILE / 2);
        return size;
    }
};

//
// Q: [rows][DKp] floats; or 16 bits each, [rows][DK], as steps of the product take them, then where the sums of blocks start, int32
// [rows][blocks], and what Q sums up to there, floats [rows][blocks]
//

static int64_t kvt_q_size(const kvt_side & k) {
    return k.integer ? GGML_PAD(k.D / 2 + 2 * k.n_blocks, 16) : k.Dp;
}

// whether all of n floats, whole vectors, are finite
static bool kvt_finite(const float * x, int64_t n) {
    vf zero = vf_set1(0);
    for (int64_t i = 0; i < n; i += KVT_VW) {
        zero = vf_fma(vf_load(x + i), vf_set1(0), zero); // 0 times inf or NaN is NaN
    }
    return !vf_any_nan(zero);
}

// -> what scores are to be multiplied by
static float kvt_set_q(const kvt_side & k, const float * q, float * Q, kvt_tile & tile) {
#ifdef KVT_DOT
    if (k.integer) {
        vf top = vf_set1(0);
        for (int64_t i = 0; i < k.D; i += KVT_VW) {
            top = vf_max(top, vf_abs(vf_load(q + i)));
        }
        const float q_max = kvt_finite(q, k.D) ? vf_hmax(top) : NAN;
        const vf    inv   = vf_set1(q_max > 0.0f ? KVT_MAX_INT / q_max : 0.0f);
        int16_t *   x     = (int16_t *) tile.tmp;
        for (int64_t i = 0; i < k.D; i += KVT_VW) {
            vi_store_i16(x + i, vi_round(vf_mul(vf_load(q + i), inv)));
        }
        for (int64_t i = 0; i < k.D; i += kvt_step_int::N_PUT) {
            kvt_step_int::put_k(x + i, (kvt_step_int::value *) Q + i / KVT_SIDE_BY_SIDE);
        }
        for (int64_t b = 0; b < k.n_blocks; b++) {
            const int32_t sum            = std::accumulate(x + b * k.type->n, x + (b + 1) * k.type->n, 0);
            Q[k.D / 2 + k.n_blocks + b]  = (float) sum;
            ((int32_t *) Q)[k.D / 2 + b] = -k.type->zero * sum;
        }
        return q_max / KVT_MAX_INT;
    }
#endif
    memset(Q + k.D, 0, (k.Dp - k.D) * sizeof(float));
    memcpy(Q, q, k.D * sizeof(float));
    GGML_UNUSED(tile);
    return 1.0f;
}

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
// weights: exponentials of the scores
//

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
            const vf x = vf_exp<true>(vf_fma(vf_load(s + j), vf_set1(times), top));
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
        vf_store(tile.factor + i, vf_exp<true>(vf_load(tile.factor + i)));
    }
    for (int r = 0; r < seen.n_rows; r++) {
        rows[r].sum += kvt_row_exp(tile.S + r * tile.n, n_parts, tile.times[r], tile.minus + r * KVT_PARTS, tile.factor + r * KVT_PARTS);
    }
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
    int32_t * vt = (int32_t *) tile.vt;
    const bool   few  = seen.n_rows <= KVT_FEW_ROWS;
    const char * rest = src;
    if (few) {
        ahead.spread((seen.n + 15) / 16 * v.n_blocks);
        kvt_set_scales(v, src, seen.n, tile);
        if (seen.n % 4 != 0) {
            rest = kvt_rest(v, src, seen.n / 4 * 4, seen.n, tile);
        }
    } else {
        ahead.spread<kvt_step_int>(seen.n_rows, v.D, v.type->n, (seen.n + KVT_SIDE_BY_SIDE - 1) / KVT_SIDE_BY_SIDE);
        kvt_codes(v, v.type->codes_v, src, seen.n, vt, v.D / KVT_SIDE_BY_SIDE, v.D, tile);
    }
    for (int64_t b = 0; b < v.n_blocks; b++) {
        // a scale that is no number makes the rows that see it none, and is not multiplied
        const kvt_cells bad = kvt_take_out(v, seen.n, tile.d + b * KVT_TILE, tile.m + b * KVT_TILE);
        kvt_round_all(v, b, seen, bad, tile);
        for (int p = 0; p < seen.n; p += KVT_PART) {
            const int     n_kv = std::min(KVT_PART, seen.n - p);
            const int64_t i = b * v.type->n, n_steps = (n_kv + KVT_SIDE_BY_SIDE - 1) / KVT_SIDE_BY_SIDE;
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
