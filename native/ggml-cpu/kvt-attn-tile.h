// kvt-attn-tile.h - a tile of KV rows: scores of K, one pass of exponentials, product with V. In floats, or, of blocks of codes, in integers.
#pragma once

#include "kvt-attn-gemm.h"
#include "kvt-attn-seen.h"
#include "kvt-attn-unpack.h"

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

    kvt_side() = default;
    kvt_side(const ggml_tensor * t) : t(t), type(nullptr), D(t->ne[0]), Dp(kvt_pad(t->ne[0])) {
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

    size_t row_size() const { return ggml_row_size(t->type, D); }

    const char * head(int64_t ik2, int64_t i3, int64_t n_stream) const {
        return (const char *) t->data + ik2 * t->nb[2] + i3 / (n_stream / t->ne[3]) * t->nb[3];
    }

    // 4 bytes each
    int64_t n_tile() const { return integer ? KVT_TILE * D / 2 : KVT_TILE * Dp; }

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
    float *    kt;      // [DKp][KVT_TILE], or pairs of int16 [DK/2][KVT_TILE]
    float *    vt;      // [KVT_TILE][DVp], or pairs of int16 [KVT_TILE/2][DV]
    float *    S;       // [rows][KVT_TILE]
    float *    tmp;     // [KVT_VW][D]: rows on their way
    float *    norm;    // [KVT_TILE]: scales of V over their largest
    int16_t *  W;      // [rows][KVT_TILE]: weights of a block of V's columns
    float *    w_scale; // [rows]
    float *    factor;  // [rows]: of the weights
    uint16_t * d; // [blocks][KVT_TILE], f16
    uint16_t * m;
    uint16_t * end;   // [KVT_TILE]: a mask of a tile that fills no vector

    static int64_t size(const kvt_side & k, const kvt_side & v, int64_t n_rows) {
        const int64_t D = std::max(k.Dp, v.Dp), n_blocks = std::max(k.n_blocks, v.n_blocks);
        return k.n_tile() + v.n_tile() + n_rows * (KVT_TILE + KVT_TILE / 2 + 2) + KVT_VW * D + n_blocks * KVT_TILE + 2 * KVT_TILE + 16 * 10;
    }

    kvt_tile(float * base, const kvt_side & k, const kvt_side & v, int64_t n_rows) {
        const int64_t D = std::max(k.Dp, v.Dp), n_blocks = std::max(k.n_blocks, v.n_blocks);
        const auto    take = [&](int64_t n) { float * p = base; base += GGML_PAD(n, 16); return p; };
        kt = take(k.n_tile()), vt = take(v.n_tile()), S = take(n_rows * KVT_TILE), tmp = take(KVT_VW * D), norm = take(KVT_TILE);
        W = (int16_t *) take(n_rows * KVT_TILE / 2), w_scale = take(n_rows), factor = take(n_rows);
        d = (uint16_t *) take(n_blocks * KVT_TILE / 2), m = (uint16_t *) take(n_blocks * KVT_TILE / 2), end = (uint16_t *) take(KVT_TILE / 2);
    }
};

//
// Q: [rows][DKp] floats, or pairs of int16 [rows][DK/2] in the order of vi_even and vi_odd; then the sums of blocks [rows][blocks]
//

static int64_t kvt_q_size(const kvt_side & k) {
    return k.integer ? GGML_PAD(k.D / 2 + k.n_blocks, 16) : k.Dp;
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
            const vf x = vf_load(q + i);
            top        = vf_max(top, vf_max(x, vf_sub(vf_set1(0), x)));
        }
        const float q_max = kvt_finite(q, k.D) ? vf_hmax(top) : NAN;
        const vf    inv   = vf_set1(q_max > 0.0f ? 32767.0f / q_max : 0.0f);
        int16_t *   x     = (int16_t *) tile.tmp;
        int16_t *   y     = (int16_t *) Q;
        for (int64_t i = 0; i < k.D; i += KVT_VW) {
            vf_store_i16(x + i, vf_mul(vf_load(q + i), inv));
        }
        for (int64_t i = 0; i < k.D; i += 4) {
            y[i] = x[i], y[i + 1] = x[i + 2], y[i + 2] = x[i + 1], y[i + 3] = x[i + 3];
        }
        for (int64_t b = 0; b < k.n_blocks; b++) {
            Q[k.D / 2 + b] = (float) std::accumulate(x + b * k.type->n, x + (b + 1) * k.type->n, 0);
        }
        return q_max / 32767.0f;
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

// as [DKp][KVT_TILE]: a step of the product takes one value of many KV rows
static void kvt_scores_float(const kvt_side & k, const char * src, int n, int n_rows, const float * Q, kvt_tile & tile, kvt_ahead & ahead) {
    for (int r = 0; r < n; r += KVT_VW) {
        k.floats(src + r * k.t->nb[1], std::min(KVT_VW, n - r), tile.tmp);
        for (int64_t i = 0; i < k.Dp; i += KVT_VW) {
            vf_transpose(tile.tmp + i, k.Dp, tile.kt + i * KVT_TILE + r, KVT_TILE);
        }
    }
    kvt_gemm<kvt_step_float, kvt_scale_none>({ n_rows, kvt_pad(n), k.Dp, Q, kvt_q_size(k), tile.kt, KVT_TILE, tile.S, KVT_TILE, false, {} }, ahead);
}

#ifdef KVT_DOT

// rows that fill no vector go by way of tmp: behind them may be the end of the cache
static void kvt_codes(const kvt_side & s, kvt_codes_t codes, const char * src, int n, int32_t * dst, int64_t row, int64_t ld, kvt_tile & tile) {
    const int    n_full = n / KVT_VW * KVT_VW, n_rest = n - n_full;
    const size_t nb = s.t->nb[1], size = s.row_size();
    codes(src, nb, n_full, s.D, dst, ld);
    if (n_rest) {
        char * tmp = (char *) tile.tmp;
        memset(tmp, 0, KVT_VW * size);
        for (int r = 0; r < n_rest; r++) {
            memcpy(tmp + r * size, src + (n_full + r) * nb, size);
        }
        codes(tmp, size, KVT_VW, s.D, dst + n_full * row, ld);
        for (int64_t b = 0; b < s.n_blocks; b++) {
            std::fill(tile.d + b * KVT_TILE + n, tile.d + (b + 1) * KVT_TILE, (uint16_t) 0);
            std::fill(tile.m + b * KVT_TILE + n, tile.m + (b + 1) * KVT_TILE, (uint16_t) 0);
        }
    }
    s.type->scales(src, nb, n, s.D, tile.d, tile.m, KVT_TILE);
}

static void kvt_scores_int(const kvt_side & k, const char * src, int n, int n_rows, const float * Q, kvt_tile & tile, kvt_ahead & ahead) {
    int32_t * kt = (int32_t *) tile.kt;
    kvt_codes(k, k.type->codes_k, src, n, kt, 1, KVT_TILE, tile);
    const int64_t ldq = kvt_q_size(k), np = k.type->n / 2;
    for (int64_t b = 0; b < k.n_blocks; b++) {
        const kvt_gemm_args<kvt_step_int, kvt_scale_cols> g = { n_rows, kvt_pad(n), np, (const int32_t *) Q + b * np, ldq,
            kt + b * np * KVT_TILE, KVT_TILE, tile.S, KVT_TILE, b > 0, { tile.d + b * KVT_TILE } };
        kvt_gemm(g, ahead);
        if (k.type->has_min) {
            for (int r = 0; r < n_rows; r++) {
                const vf sum = vf_set1(Q[r * ldq + k.D / 2 + b]);
                for (int j = 0; j < n; j += KVT_VW) {
                    float * s = tile.S + r * KVT_TILE + j;
                    vf_store(s, vf_fma(vf_load_f16(tile.m + b * KVT_TILE + j), sum, vf_load(s)));
                }
            }
        }
    }
}

#endif

static void kvt_scores(const kvt_side & k, const char * src, int n, int n_rows, const float * Q, kvt_tile & tile, kvt_ahead ahead) {
#ifdef KVT_DOT
    if (k.integer) {
        kvt_scores_int(k, src, n, n_rows, Q, tile, ahead);
        return;
    }
#endif
    kvt_scores_float(k, src, n, n_rows, Q, tile, ahead);
}

//
// weights: exponentials of the scores
//

struct kvt_soft_max {
    float            scale, softcap, slope;
    const uint16_t * mask; // null, or KVT_TILE entries from here on
    bool             own; // weights against the tile's own max, whatever came before it: V's are rounded
};

// Turns a row of scores into exp(score - max) and scales out to a new max. -> what the weights are to be multiplied by, 0 if all
// cells are masked. A score that is seen and is no number makes the row none.
static float kvt_weights(const kvt_soft_max & a, float * s, int nv, float * out, int64_t n_out, float * max, float * sum) {
    vf top = vf_set1(-INFINITY), zero = vf_set1(0);
    for (int j = 0; j < nv; j++) {
        vf x = vf_mul(vf_load(s + j * KVT_VW), vf_set1(a.scale)), seen = x;
        if (a.softcap != 0.0f) {
            x = vf_mul(vf_set1(a.softcap), vf_tanh(x));
        }
        if (a.mask) {
            const vf mask = vf_load_f16(a.mask + j * KVT_VW);
            x             = vf_fma(mask, vf_set1(a.slope), x);
            seen          = vf_where_gt(seen, mask, vf_set1(-INFINITY));
        }
        vf_store(s + j * KVT_VW, x);
        zero = vf_fma(seen, vf_set1(0), zero);
        top  = vf_max(x, top); // of NaN, as a masked cell may hold: top
    }
    if (vf_any_nan(zero)) {
        *sum = NAN;
    }
    const float tile_max = vf_hmax(top);
    if (tile_max == -INFINITY) {
        memset(s, 0, nv * sizeof(vf));
        return 0.0f;
    }
    if (tile_max > *max) {
        const float ms = expf(*max - tile_max);
        for (int64_t i = 0; i < n_out; i += KVT_VW) {
            vf_store(out + i, vf_mul(vf_load(out + i), vf_set1(ms)));
        }
        *sum *= ms;
        *max = tile_max;
    }
    const float base = a.own ? tile_max : *max, factor = a.own && tile_max < *max ? expf(tile_max - *max) : 1.0f;
    vf          total = vf_set1(0);
    for (int j = 0; j < nv; j++) {
        const vf p = vf_exp(vf_sub(vf_load(s + j * KVT_VW), vf_set1(base)));
        vf_store(s + j * KVT_VW, p);
        total = vf_add(total, p);
    }
    *sum += vf_hsum(total) * factor;
    return factor;
}

//
// out += weights V
//

static void kvt_product_float(const kvt_side & v, int n, int row, int n_rows, float * out, kvt_tile & tile, kvt_ahead & ahead) {
    kvt_gemm<kvt_step_float, kvt_scale_none>({ n_rows, v.Dp, n, tile.S + row * KVT_TILE, KVT_TILE, tile.vt, v.Dp, out + row * v.Dp, v.Dp, true, {} }, ahead);
}

// some cells hold what is no number: 0 times it is none, so that rows that see other cells go apart
static void kvt_values_apart(const kvt_side & v, const char * src, const kvt_seen & seen, float * out, kvt_tile & tile, kvt_ahead & ahead) {
    uint64_t bad = 0;
    for (int i = 0; i < seen.n; i++) {
        bad |= (uint64_t) !kvt_finite(tile.vt + i * v.Dp, v.Dp) << i;
    }
    for (int r = 0, end; r < seen.n_rows; r = end) {
        for (end = r + 1; end < seen.n_rows && seen.as_before(end); end++) {}
        for (int i = 0; i < seen.n; i++) {
            if (bad >> i & 1) {
                if (seen.sees(r, (uint64_t) 1 << i)) {
                    v.floats(src + i * v.t->nb[1], 1, tile.vt + i * v.Dp);
                } else {
                    memset(tile.vt + i * v.Dp, 0, v.Dp * sizeof(float));
                }
            }
        }
        kvt_product_float(v, seen.n, r, end - r, out, tile, ahead);
    }
}

static void kvt_values_float(const kvt_side & v, const char * src, const kvt_seen & seen, float * out, kvt_tile & tile, kvt_ahead & ahead) {
    if (seen.all && seen.n_rows <= KVT_MR && v.type && v.type->product) {
        v.type->product(seen.n_rows, tile.S, KVT_TILE, src, v.t->nb[1], seen.n, v.D, out, ahead);
        return;
    }
    v.floats(src, seen.n, tile.vt);
    if (seen.all || kvt_finite(tile.vt, seen.n * v.Dp)) {
        kvt_product_float(v, seen.n, 0, seen.n_rows, out, tile, ahead);
    } else {
        kvt_values_apart(v, src, seen, out, tile, ahead);
    }
}

#ifdef KVT_DOT

// a bit for each of n values of f16 that is inf or NaN
static uint64_t kvt_not_finite(const uint16_t * x, int n) {
    unsigned any = 0;
    for (int i = 0; i < n; i++) {
        any |= (x[i] & 0x7c00) == 0x7c00;
    }
    uint64_t bits = 0;
    for (int i = 0; any && i < n; i++) {
        bits |= (uint64_t) ((x[i] & 0x7c00) == 0x7c00) << i;
    }
    return bits;
}

// scales over the largest of those that are seen (mask; null: all are), 0 for the others. -> the largest
static float kvt_norm(const uint16_t * d, const uint16_t * mask, int nv, float * norm) {
    vf top = vf_set1(0);
    for (int j = 0; j < nv; j++) {
        vf x = vf_load_f16(d + j * KVT_VW);
        if (mask) {
            x = vf_where_gt(x, vf_load_f16(mask + j * KVT_VW), vf_set1(-INFINITY));
        }
        vf_store(norm + j * KVT_VW, x);
        top = vf_max(top, vf_max(x, vf_sub(vf_set1(0), x)));
    }
    const float d_max = vf_hmax(top);
    const vf    inv   = vf_set1(d_max > 0.0f ? 32767.0f / d_max : 0.0f);
    for (int j = 0; j < nv; j++) {
        vf_store(norm + j * KVT_VW, vf_mul(vf_load(norm + j * KVT_VW), inv));
    }
    return d_max;
}

// weights of a row times the scales of the KV rows, of n cells, rounded
static KVT_INLINE void kvt_round(const float * __restrict s, const float * __restrict norm, int64_t n, int16_t * __restrict w) {
    for (int64_t j = 0; j < n; j += KVT_VW) {
        vf_store_i16(w + j, vf_mul(vf_load(s + j), vf_load(norm + j)));
    }
}

static void kvt_values_int(const kvt_side & v, const char * src, const kvt_seen & seen, float * out, kvt_tile & tile, kvt_ahead & ahead) {
    int32_t * vt = (int32_t *) tile.vt;
    const int n = seen.n, nv = (int) kvt_pad(n) / KVT_VW;
    kvt_codes(v, v.type->codes_v, src, n, vt, v.D / 2, v.D, tile);
    for (int64_t b = 0; b < v.n_blocks; b++) {
        uint16_t * d = tile.d + b * KVT_TILE;
        uint16_t * m = tile.m + b * KVT_TILE;
        // a scale that is no number makes the rows that see it none, and is not multiplied
        const uint64_t bad = kvt_not_finite(d, n) | (v.type->has_min ? kvt_not_finite(m, n) : 0);
        for (int i = 0; bad && i < n; i++) {
            if (bad >> i & 1) {
                d[i] = m[i] = 0;
            }
        }
        // the scale of a KV row goes into its weight, as a part of the largest one that the row of Q sees in the tile
        for (int r = 0, end; r < seen.n_rows; r = end) {
            for (end = r + 1; end < seen.n_rows && (seen.all || seen.as_before(end)); end++) {}
            const float d_max = kvt_norm(d, seen.all ? nullptr : seen.mask(r), nv, tile.norm);
            for (int i = r; i < end; i++) {
                kvt_round(tile.S + i * KVT_TILE, tile.norm, nv * KVT_VW, tile.W + i * KVT_TILE);
                tile.w_scale[i] = bad && seen.sees(i, bad) ? NAN : tile.factor[i] * d_max / 32767.0f;
            }
        }
        const int64_t                                     i = b * v.type->n;
        const kvt_gemm_args<kvt_step_int, kvt_scale_rows> g = { seen.n_rows, v.type->n, (n + 1) / 2, (const int32_t *) tile.W, KVT_TILE / 2,
            vt + i, v.D, out + i, v.Dp, true, { tile.w_scale, 1 } };
        kvt_gemm(g, ahead);
        if (v.type->has_min) {
            for (int r = 0; r < seen.n_rows; r++) {
                vf sum = vf_set1(0);
                for (int j = 0; j < nv; j++) {
                    sum = vf_fma(vf_load(tile.S + r * KVT_TILE + j * KVT_VW), vf_load_f16(m + j * KVT_VW), sum);
                }
                const vf all = vf_set1(vf_hsum(sum) * tile.factor[r]);
                for (int64_t c = i; c < i + v.type->n; c += KVT_VW) {
                    vf_store(out + r * v.Dp + c, vf_add(vf_load(out + r * v.Dp + c), all));
                }
            }
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
