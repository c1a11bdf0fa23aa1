// kvt-attn-side.h - K or V of an op, the memory of a tile of their rows, and Q as its products take it: in floats, or, of blocks of codes, in integers of 16
// bits.
#pragma once

#include "kvt-attn-seen.h"
#include "kvt-attn-types.h"

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
