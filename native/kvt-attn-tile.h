// A tile of KV rows: scores of K, one pass of exponentials, product with V. In floats, or, of blocks of codes, in integers.
#pragma once

#include "kvt-attn-gemm.h"
#include "kvt-attn-unpack.h"

#include <algorithm>
#include <cmath>
#include <numeric>

static const int KVT_TILE = 64; // KV rows

static int64_t kvt_pad(int64_t n) {
    return GGML_PAD(n, KVT_VW);
}

// K or V of an op
struct kvt_side {
    const ggml_tensor * t;
    const kvt_attn_type * type; // null: to_float
    int64_t D, Dp;              // head size, and padded to the vector
    bool integer;
    int64_t n_blocks;

    kvt_side() = default;
    kvt_side(const ggml_tensor * t) : t(t), type(nullptr), D(t->ne[0]), Dp(kvt_pad(t->ne[0])) {
        for (const kvt_attn_type & row : kvt_attn_types) {
            if (row.type == t->type && D % row.n == 0) {
                type = &row;
            }
        }
#ifdef KVT_DOT
        integer  = type && type->codes_k;
        n_blocks = integer ? D/type->n : 0;
#else
        integer  = false;
        n_blocks = 0;
#endif
    }

    size_t row_size() const { return ggml_row_size(t->type, D); }

    const char * head(int64_t ik2, int64_t i3, int64_t n_stream) const {
        return (const char *) t->data + ik2*t->nb[2] + i3/(n_stream/t->ne[3])*t->nb[3];
    }

    // 4 bytes each
    int64_t n_tile() const { return integer ? KVT_TILE*D/2 : KVT_TILE*Dp; }

    void floats(const char * src, int n_rows, float * dst) const {
        if (type) {
            type->unpack(src, t->nb[1], n_rows, D, dst, Dp);
            return;
        }
        for (int r = 0; r < n_rows; r++) {
            if (t->type == GGML_TYPE_F32) {
                memcpy(dst + r*Dp, src + r*t->nb[1], D*sizeof(float));
            } else {
                ggml_get_type_traits(t->type)->to_float(src + r*t->nb[1], dst + r*Dp, D);
            }
        }
    }
};

// memory of a tile, of one thread
struct kvt_tile {
    float  * kt;      // [DKp][KVT_TILE], or pairs of int16 [DK/2][KVT_TILE]
    float  * vt;      // [KVT_TILE][DVp], or pairs of int16 [KVT_TILE/2][DV]
    float  * S;       // [rows][KVT_TILE]
    float  * tmp;     // [KVT_VW][D]: rows on their way
    float  * norm;    // [blocks][KVT_TILE]: scales of V over their largest
    int16_t * W;      // [rows][KVT_TILE]: weights of a block of V's columns
    float  * w_scale; // [rows]
    float  * p_max;   // [rows]: largest weight
    uint16_t * d, * m; // [blocks][KVT_TILE], f16

    static int64_t size(const kvt_side & k, const kvt_side & v, int64_t n_rows) {
        const int64_t D = std::max(k.Dp, v.Dp), n_blocks = std::max(k.n_blocks, v.n_blocks);
        return k.n_tile() + v.n_tile() + n_rows*(KVT_TILE + KVT_TILE/2 + 2) + KVT_VW*D + 2*n_blocks*KVT_TILE + 16*9;
    }

    kvt_tile(float * base, const kvt_side & k, const kvt_side & v, int64_t n_rows) {
        const int64_t D = std::max(k.Dp, v.Dp), n_blocks = std::max(k.n_blocks, v.n_blocks);
        const auto take = [&](int64_t n) { float * p = base; base += GGML_PAD(n, 16); return p; };
        kt = take(k.n_tile()), vt = take(v.n_tile()), S = take(n_rows*KVT_TILE), tmp = take(KVT_VW*D), norm = take(n_blocks*KVT_TILE);
        W = (int16_t *) take(n_rows*KVT_TILE/2), w_scale = take(n_rows), p_max = take(n_rows);
        d = (uint16_t *) take(n_blocks*KVT_TILE/2), m = (uint16_t *) take(n_blocks*KVT_TILE/2);
    }
};

//
// Q: [rows][DKp] floats, or pairs of int16 [rows][DK/2] in the order of vi_even and vi_odd; then the sums of blocks [rows][blocks]
//

static int64_t kvt_q_size(const kvt_side & k) {
    return k.integer ? GGML_PAD(k.D/2 + k.n_blocks, 16) : k.Dp;
}

// -> what scores are to be multiplied by
static float kvt_set_q(const kvt_side & k, const float * q, float * Q, kvt_tile & tile) {
#ifdef KVT_DOT
    if (k.integer) {
        vf top = vf_set1(0);
        for (int64_t i = 0; i < k.D; i += KVT_VW) {
            const vf x = vf_load(q + i);
            top = vf_max(top, vf_max(x, vf_sub(vf_set1(0), x)));
        }
        const float q_max = vf_hmax(top);
        const vf inv = vf_set1(q_max > 0.0f ? 32767.0f/q_max : 0.0f);
        int16_t * x = (int16_t *) tile.tmp, * y = (int16_t *) Q;
        for (int64_t i = 0; i < k.D; i += KVT_VW) {
            vf_store_i16(x + i, vf_mul(vf_load(q + i), inv));
        }
        for (int64_t i = 0; i < k.D; i += 4) {
            y[i] = x[i], y[i + 1] = x[i + 2], y[i + 2] = x[i + 1], y[i + 3] = x[i + 3];
        }
        for (int64_t b = 0; b < k.n_blocks; b++) {
            Q[k.D/2 + b] = (float) std::accumulate(x + b*k.type->n, x + (b + 1)*k.type->n, 0);
        }
        return q_max/32767.0f;
    }
#endif
    memset(Q + k.D, 0, (k.Dp - k.D)*sizeof(float));
    memcpy(Q, q, k.D*sizeof(float));
    GGML_UNUSED(tile);
    return 1.0f;
}

//
// scores
//

// as [DKp][KVT_TILE]: a step of the product takes one value of many KV rows
static void kvt_scores_float(const kvt_side & k, const char * src, int n, int n_rows, const float * Q, kvt_tile & tile, kvt_ahead & ahead) {
    for (int r = 0; r < n; r += KVT_VW) {
        k.floats(src + r*k.t->nb[1], std::min(KVT_VW, n - r), tile.tmp);
        for (int64_t i = 0; i < k.Dp; i += KVT_VW) {
            vf_transpose(tile.tmp + i, k.Dp, tile.kt + i*KVT_TILE + r, KVT_TILE);
        }
    }
    kvt_gemm<kvt_step_float, kvt_scale_none>({ n_rows, kvt_pad(n), k.Dp, Q, kvt_q_size(k), tile.kt, KVT_TILE, tile.S, KVT_TILE, false, {} }, ahead);
}

#ifdef KVT_DOT

// rows that fill no vector go by way of tmp: behind them may be the end of the cache
static void kvt_codes(const kvt_side & s, kvt_codes_t codes, const char * src, int n, int32_t * dst, int64_t row, int64_t ld, kvt_tile & tile) {
    const int    n_full = n/KVT_VW*KVT_VW, n_rest = n - n_full;
    const size_t nb = s.t->nb[1], size = s.row_size();
    codes(src, nb, n_full, s.D, dst, ld);
    if (n_rest) {
        char * tmp = (char *) tile.tmp;
        memset(tmp, 0, KVT_VW*size);
        for (int r = 0; r < n_rest; r++) {
            memcpy(tmp + r*size, src + (n_full + r)*nb, size);
        }
        codes(tmp, size, KVT_VW, s.D, dst + n_full*row, ld);
        for (int64_t b = 0; b < s.n_blocks; b++) {
            std::fill(tile.d + b*KVT_TILE + n, tile.d + (b + 1)*KVT_TILE, (uint16_t) 0);
            std::fill(tile.m + b*KVT_TILE + n, tile.m + (b + 1)*KVT_TILE, (uint16_t) 0);
        }
    }
    s.type->scales(src, nb, n, s.D, tile.d, tile.m, KVT_TILE);
}

static void kvt_scores_int(const kvt_side & k, const char * src, int n, int n_rows, const float * Q, kvt_tile & tile, kvt_ahead & ahead) {
    int32_t * kt = (int32_t *) tile.kt;
    kvt_codes(k, k.type->codes_k, src, n, kt, 1, KVT_TILE, tile);
    const int64_t ldq = kvt_q_size(k), np = k.type->n/2;
    for (int64_t b = 0; b < k.n_blocks; b++) {
        kvt_gemm<kvt_step_int, kvt_scale_cols>({ n_rows, kvt_pad(n), np, (const int32_t *) Q + b*np, ldq, kt + b*np*KVT_TILE, KVT_TILE,
            tile.S, KVT_TILE, b > 0, { tile.d + b*KVT_TILE } }, ahead);
        if (k.type->has_min) {
            for (int r = 0; r < n_rows; r++) {
                const vf sum = vf_set1(Q[r*ldq + k.D/2 + b]);
                for (int j = 0; j < n; j += KVT_VW) {
                    float * s = tile.S + r*KVT_TILE + j;
                    vf_store(s, vf_fma(vf_load_f16(tile.m + b*KVT_TILE + j), sum, vf_load(s)));
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
    float scale, softcap, slope;
    const uint16_t * mask; // null, or KVT_TILE entries from here on
};

// Turns a row of scores into exp(score - max) and scales out to a new max. -> the largest of them, 0 if all are masked, and the least.
static float kvt_weights(const kvt_soft_max & a, float * s, int nv, float * out, int64_t n_out, float * max, float * sum, float * least) {
    vf top = vf_set1(-INFINITY);
    for (int j = 0; j < nv; j++) {
        vf x = vf_mul(vf_load(s + j*KVT_VW), vf_set1(a.scale));
        if (a.softcap != 0.0f) {
            x = vf_mul(vf_set1(a.softcap), vf_tanh(x));
        }
        if (a.mask) {
            x = vf_fma(vf_load_f16(a.mask + j*KVT_VW), vf_set1(a.slope), x);
        }
        vf_store(s + j*KVT_VW, x);
        top = vf_max(x, top); // of NaN, as a masked cell may hold: top
    }
    const float tile_max = vf_hmax(top);
    if (tile_max == -INFINITY) {
        memset(s, 0, nv*sizeof(vf));
        *least = 0.0f;
        return 0.0f;
    }
    if (tile_max > *max) {
        const float ms = expf(*max - tile_max);
        for (int64_t i = 0; i < n_out; i += KVT_VW) {
            vf_store(out + i, vf_mul(vf_load(out + i), vf_set1(ms)));
        }
        *sum *= ms;
        *max  = tile_max;
    }
    vf total = vf_set1(0), low = vf_set1(1);
    for (int j = 0; j < nv; j++) {
        const vf p = vf_exp(vf_sub(vf_load(s + j*KVT_VW), vf_set1(*max)));
        vf_store(s + j*KVT_VW, p);
        total = vf_add(total, p);
        low   = vf_min(low, p);
    }
    *sum  += vf_hsum(total);
    *least = -vf_hmax(vf_sub(vf_set1(0), low));
    return tile_max == *max ? 1.0f : expf(tile_max - *max);
}

// What lies in a cell that no row sees may be NaN, and is not to be multiplied, not even by 0. f(i) for each such cell.
template <typename F>
static void kvt_each_dead(const kvt_tile & tile, int n, int n_rows, F f) {
    for (int i = 0; i < n; i++) {
        bool dead = true;
        for (int r = 0; r < n_rows && dead; r++) {
            dead = tile.S[r*KVT_TILE + i] == 0.0f;
        }
        if (dead) {
            f(i);
        }
    }
}

//
// out += weights V
//

static void kvt_values_float(const kvt_side & v, const char * src, int n, int n_rows, bool all, float * out, kvt_tile & tile, kvt_ahead & ahead) {
    if (all && n_rows <= KVT_MR && v.type && v.type->product) {
        v.type->product(n_rows, tile.S, KVT_TILE, src, v.t->nb[1], n, v.D, out, ahead);
        return;
    }
    v.floats(src, n, tile.vt);
    if (!all) {
        kvt_each_dead(tile, n, n_rows, [&](int i) { memset(tile.vt + i*v.Dp, 0, v.Dp*sizeof(float)); });
    }
    kvt_gemm<kvt_step_float, kvt_scale_none>({ n_rows, v.Dp, n, tile.S, KVT_TILE, tile.vt, v.Dp, out, v.Dp, true, {} }, ahead);
}

#ifdef KVT_DOT

static void kvt_values_int(const kvt_side & v, const char * src, int n, int n_rows, bool all, float * out, kvt_tile & tile, kvt_ahead & ahead) {
    int32_t * vt = (int32_t *) tile.vt;
    kvt_codes(v, v.type->codes_v, src, n, vt, v.D/2, v.D, tile);
    if (!all) {
        kvt_each_dead(tile, n, n_rows, [&](int i) {
            for (int64_t b = 0; b < v.n_blocks; b++) {
                tile.d[b*KVT_TILE + i] = tile.m[b*KVT_TILE + i] = 0;
            }
        });
    }
    const int nv = (int) kvt_pad(n)/KVT_VW;
    for (int64_t b = 0; b < v.n_blocks; b++) {
        // the scale of a KV row goes into its weight, as a part of the largest one of the tile
        const uint16_t * d = tile.d + b*KVT_TILE, * m = tile.m + b*KVT_TILE;
        vf top = vf_set1(0);
        for (int j = 0; j < nv; j++) {
            const vf x = vf_load_f16(d + j*KVT_VW);
            top = vf_max(top, vf_max(x, vf_sub(vf_set1(0), x)));
        }
        const float d_max = vf_hmax(top);
        const vf d_inv = vf_set1(d_max > 0.0f ? 32767.0f/d_max : 0.0f);
        for (int j = 0; j < nv; j++) {
            vf_store(tile.norm + j*KVT_VW, vf_mul(vf_load_f16(d + j*KVT_VW), d_inv));
        }
        for (int r = 0; r < n_rows; r++) {
            const float * s = tile.S + r*KVT_TILE;
            const vf p_inv = vf_set1(tile.p_max[r] > 0.0f ? 1.0f/tile.p_max[r] : 0.0f);
            for (int j = 0; j < nv; j++) {
                vf_store_i16(tile.W + r*KVT_TILE + j*KVT_VW, vf_mul(vf_mul(vf_load(s + j*KVT_VW), p_inv), vf_load(tile.norm + j*KVT_VW)));
            }
            tile.w_scale[r] = tile.p_max[r]*d_max/32767.0f;
        }
        const int64_t i = b*v.type->n;
        kvt_gemm<kvt_step_int, kvt_scale_rows>({ n_rows, v.type->n, (n + 1)/2, (const int32_t *) tile.W, KVT_TILE/2, vt + i, v.D,
            out + i, v.Dp, true, { tile.w_scale, 1 } }, ahead);
        if (v.type->has_min) {
            for (int r = 0; r < n_rows; r++) {
                vf sum = vf_set1(0);
                for (int j = 0; j < nv; j++) {
                    sum = vf_fma(vf_load(tile.S + r*KVT_TILE + j*KVT_VW), vf_load_f16(m + j*KVT_VW), sum);
                }
                const vf all = vf_set1(vf_hsum(sum));
                for (int64_t c = i; c < i + v.type->n; c += KVT_VW) {
                    vf_store(out + r*v.Dp + c, vf_add(vf_load(out + r*v.Dp + c), all));
                }
            }
        }
    }
}

#endif

// all: no weight is 0
static void kvt_values(const kvt_side & v, const char * src, int n, int n_rows, bool all, float * out, kvt_tile & tile, kvt_ahead ahead) {
#ifdef KVT_DOT
    if (v.integer) {
        kvt_values_int(v, src, n, n_rows, all, out, tile, ahead);
        return;
    }
#endif
    kvt_values_float(v, src, n, n_rows, all, out, tile, ahead);
}
