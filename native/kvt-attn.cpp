// kvt-attn.cpp - attention over tiles of KV rows
//
// The query rows that share a KV head (its query heads, for a span of tokens) are the rows of two small matrix products:
// scores = Q K^T and out += P V, with one pass of exponentials in between. K and V are unpacked to floats a tile at a time.
#include "kvt-attn.h"
#include "kvt-attn-simd.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

#if defined(KVT_VW) && !defined(KVT_STOCK_ATTN)

#include "kvt-attn-gemm.h"
#include "kvt-attn-unpack.h"

static const int KVT_TILE = 64; // KV rows
static const int KVT_ROWS = 96; // query rows, at most
static const int KVT_PART = 16;  // tiles in a part of a split KV range
static const int64_t KVT_PARTIALS = 1 << 22; // floats of all parts, unless the threads ask for more

static int64_t kvt_pad(int64_t n) {
    return GGML_PAD(n, KVT_VW);
}

//
// plan: who computes what
//

struct kvt_attn {
    const ggml_tensor * q, * k, * v, * mask, * sinks;
    ggml_tensor * dst;

    kvt_unpack_t unpack_k, unpack_v; // null: to_float
    float scale, max_bias, softcap;

    int64_t DK, DV, DKp, DVp; // head sizes, and padded to the vector
    int64_t n_kv, n_gqa;      // query heads that share a KV head
    int64_t n_rows;           // query rows that share a KV head: token * n_gqa + head
    int64_t n_rows_item, n_items_head, n_items, n_split;
    int64_t n_scratch;        // floats per thread

    int64_t n_partial() const { return DVp + 2; } // sum of P V, max, sum
    int64_t n_partials() const { return n_split > 1 ? n_items*n_split*n_rows_item*n_partial() : 0; }
};

static kvt_unpack_t kvt_unpack_of(ggml_type type, int64_t n) {
    for (const kvt_attn_type & t : kvt_attn_types) {
        if (t.type == type && n % t.n == 0) {
            return t.unpack;
        }
    }
    return nullptr;
}

static bool kvt_attn_supports(const ggml_tensor * dst) {
    const ggml_tensor * q = dst->src[0], * k = dst->src[1], * v = dst->src[2], * mask = dst->src[3], * sinks = dst->src[4];
    for (const ggml_tensor * t : { k, v }) {
        if (t->type != GGML_TYPE_F32 && !ggml_get_type_traits(t->type)->to_float) {
            return false;
        }
        if (t->nb[0] != ggml_type_size(t->type) || q->ne[2] % t->ne[2] != 0 || q->ne[3] % t->ne[3] != 0) {
            return false;
        }
    }
    return q->type == GGML_TYPE_F32 && q->nb[0] == sizeof(float) && dst->type == GGML_TYPE_F32 && k->ne[2] == v->ne[2] &&
        (!mask || (mask->type == GGML_TYPE_F16 && mask->nb[0] == sizeof(ggml_fp16_t))) && (!sinks || sinks->type == GGML_TYPE_F32);
}

static kvt_attn kvt_attn_plan(const ggml_tensor * dst, int n_threads) {
    kvt_attn a = {};
    a.q = dst->src[0], a.k = dst->src[1], a.v = dst->src[2], a.mask = dst->src[3], a.sinks = dst->src[4];
    a.DK = a.k->ne[0], a.DKp = kvt_pad(a.DK);
    a.DV = a.v->ne[0], a.DVp = kvt_pad(a.DV);

    a.n_kv   = a.k->ne[1];
    a.n_gqa  = a.q->ne[2]/a.k->ne[2];
    a.n_rows = a.q->ne[1]*a.n_gqa;

    a.n_rows_item  = std::min<int64_t>(a.n_rows, KVT_ROWS);
    a.n_items_head = (a.n_rows + a.n_rows_item - 1)/a.n_rows_item;
    a.n_items      = a.n_items_head*a.k->ne[2]*a.q->ne[3];

    // few items, as in decode: split the KV range as well, into as many parts as give each thread the same number of units
    a.n_split = 1;
    if (a.n_items < 4*n_threads) {
        const int64_t even  = n_threads/std::gcd<int64_t>(a.n_items, n_threads);
        const int64_t tiles = (a.n_kv + KVT_TILE - 1)/KVT_TILE;
        a.n_split = std::max<int64_t>(1, std::min({ even, (4*n_threads + a.n_items - 1)/a.n_items, tiles }));
        // smaller parts, all heads of one after the other: the heads lie beside each other in memory, so pages are walked once
        const int64_t parts = std::min({ tiles/KVT_PART, (int64_t) 64, KVT_PARTIALS/(a.n_items*a.n_rows_item*a.n_partial()) });
        a.n_split *= std::max<int64_t>(1, parts/a.n_split);
    }

    a.n_scratch = GGML_PAD(a.n_rows_item*(a.DKp + KVT_TILE + a.DVp + 2) + KVT_TILE*(a.DKp + a.DVp) + KVT_VW*a.DKp, 16);
    return a;
}

size_t kvt_attn_work_size(const ggml_tensor * dst, int n_threads) {
    if (!kvt_attn_supports(dst)) {
        return 0;
    }
    size_t size = 0;
    for (int n = 1; n <= n_threads; n++) {
        const kvt_attn a = kvt_attn_plan(dst, n);
        size = std::max(size, sizeof(float)*(n*a.n_scratch + a.n_partials()) + 64);
    }
    return size;
}

//
// one tile
//

static const uint16_t KVT_F16_NEG_INF = 0xfc00;

// of the tile that starts at ic, as far as there is one
static kvt_ahead kvt_next(const ggml_tensor * t, const char * src, int64_t ic, int64_t ic1) {
    return { src + ic*t->nb[1], t->nb[1], ggml_row_size(t->type, t->ne[0]), std::max<int64_t>(0, std::min<int64_t>(KVT_TILE, ic1 - ic)) };
}

static void kvt_unpack_rows(const ggml_tensor * t, kvt_unpack_t unpack, const char * src, int n_rows, float * dst, int64_t ld) {
    if (unpack) {
        unpack(src, t->nb[1], n_rows, t->ne[0], dst, ld);
        return;
    }
    for (int r = 0; r < n_rows; r++) {
        if (t->type == GGML_TYPE_F32) {
            memcpy(dst + r*ld, src + r*t->nb[1], t->ne[0]*sizeof(float));
        } else {
            ggml_get_type_traits(t->type)->to_float(src + r*t->nb[1], dst + r*ld, t->ne[0]);
        }
    }
}

// K tile as [DKp][KVT_TILE]: a step of the product takes one value of many KV rows
static void kvt_unpack_k(const kvt_attn & a, const char * src, int n, float * kt, float * tmp) {
    for (int r = 0; r < n; r += KVT_VW) {
        kvt_unpack_rows(a.k, a.unpack_k, src + r*a.k->nb[1], std::min(KVT_VW, n - r), tmp, a.DKp);
        for (int64_t i = 0; i < a.DKp; i += KVT_VW) {
            vf_transpose(tmp + i, a.DKp, kt + i*KVT_TILE + r, KVT_TILE);
        }
    }
}

static const uint16_t * kvt_mask_row(const kvt_attn & a, int64_t token, int64_t head, int64_t i3) {
    const ggml_tensor * m = a.mask;
    return (const uint16_t *) ((const char *) m->data + token*m->nb[1] + (head % m->ne[2])*m->nb[2] + (i3 % m->ne[3])*m->nb[3]);
}

static bool kvt_all_masked(const uint16_t * mask, int n) {
    unsigned any = 0;
    for (int i = 0; i < n; i++) {
        any |= mask[i] ^ KVT_F16_NEG_INF;
    }
    return any == 0;
}

static float kvt_slope(const kvt_attn & a, int64_t head) {
    if (a.max_bias <= 0.0f) {
        return 1.0f;
    }
    const uint32_t n_log2 = 1u << (uint32_t) floor(log2((double) a.q->ne[2]));
    return head < n_log2 ? powf(powf(2.0f, -a.max_bias/n_log2), head + 1) : powf(powf(2.0f, -a.max_bias/2.0f/n_log2), 2*(head - n_log2) + 1);
}

// Turns a row of scores into exp(score - max); mask is null or has KVT_TILE entries from here on. False if all are masked.
static bool kvt_soft_max(const kvt_attn & a, float * s, int nv, const uint16_t * mask, float slope, float * out, float * max, float * sum) {
    vf top = vf_set1(-INFINITY);
    for (int j = 0; j < nv; j++) {
        vf x = vf_load(s + j*KVT_VW);
        if (a.softcap != 0.0f) {
            x = vf_mul(vf_set1(a.softcap), vf_tanh(x));
        }
        if (mask) {
            x = vf_fma(vf_load_f16(mask + j*KVT_VW), vf_set1(slope), x);
        }
        vf_store(s + j*KVT_VW, x);
        top = vf_max(top, x);
    }
    const float tile_max = vf_hmax(top);
    if (tile_max == -INFINITY) {
        memset(s, 0, nv*sizeof(vf));
        return false;
    }
    if (tile_max > *max) {
        const vf ms = vf_set1(expf(*max - tile_max));
        for (int64_t i = 0; i < a.DVp; i += KVT_VW) {
            vf_store(out + i, vf_mul(vf_load(out + i), ms));
        }
        *sum *= expf(*max - tile_max);
        *max  = tile_max;
    }
    vf total = vf_set1(0);
    for (int j = 0; j < nv; j++) {
        const vf p = vf_exp(vf_sub(vf_load(s + j*KVT_VW), vf_set1(*max)));
        vf_store(s + j*KVT_VW, p);
        total = vf_add(total, p);
    }
    *sum += vf_hsum(total);
    return true;
}

//
// one unit of work: the rows of an item over a range of KV rows
//

struct kvt_attn_item {
    int64_t i3, ik2, row; // stream, KV head, first row
    int n;                // rows

    kvt_attn_item(const kvt_attn & a, int64_t i) :
        i3(i/a.n_items_head/a.k->ne[2]), ik2(i/a.n_items_head % a.k->ne[2]), row(i % a.n_items_head*a.n_rows_item),
        n((int) std::min(a.n_rows_item, a.n_rows - row)) {}

    int64_t token(const kvt_attn & a, int r) const { return (row + r)/a.n_gqa; }
    int64_t head (const kvt_attn & a, int r) const { return ik2*a.n_gqa + (row + r) % a.n_gqa; }
};

static void kvt_write(const kvt_attn & a, const kvt_attn_item & it, int r, const float * out, float sum) {
    const ggml_tensor * d = a.dst;
    float * y = (float *) ((char *) d->data + (it.i3*d->ne[2]*d->ne[1] + it.head(a, r) + it.token(a, r)*d->ne[1])*d->nb[1]);
    const float inv = sum == 0.0f ? 0.0f : 1.0f/sum;
    for (int64_t i = 0; i < a.DV; i++) {
        y[i] = out[i]*inv;
    }
}

static bool kvt_tile_masked(const kvt_attn & a, const kvt_attn_item & it, int64_t ic, int n) {
    const int step = a.mask->ne[2] == 1 ? (int) a.n_gqa : 1; // all heads of a token have one mask row
    for (int r = 0; r < it.n; r += r == 0 && step > 1 ? step - (int) (it.row % a.n_gqa) : step) {
        if (!kvt_all_masked(kvt_mask_row(a, it.token(a, r), it.head(a, r), it.i3) + ic, n)) {
            return false;
        }
    }
    return true;
}

// to dst, or, if partial is given, to partial[rows][n_partial]
static void kvt_attn_unit(const kvt_attn & a, int64_t i_item, int64_t ic0, int64_t ic1, float * scratch, float * partial) {
    const kvt_attn_item it(a, i_item);

    float * Q   = scratch;                   // [rows][DKp], scaled
    float * S   = Q   + a.n_rows_item*a.DKp; // [rows][KVT_TILE]
    float * out = S   + a.n_rows_item*KVT_TILE;
    float * kt  = out + a.n_rows_item*a.DVp;
    float * vt  = kt  + KVT_TILE*a.DKp;
    float * tmp = vt  + KVT_TILE*a.DVp;      // [KVT_VW][DKp]
    float * max = tmp + KVT_VW*a.DKp;
    float * sum = max + a.n_rows_item;

    memset(out, 0, a.n_rows_item*a.DVp*sizeof(float));
    memset(tmp, 0, KVT_VW*a.DKp*sizeof(float)); // what a row or the last rows leave out must be finite
    if (a.DVp != a.DV) {
        memset(vt, 0, KVT_TILE*a.DVp*sizeof(float));
    }
    memset(Q,   0, a.n_rows_item*a.DKp*sizeof(float));
    for (int r = 0; r < it.n; r++) {
        const float * q = (const float *) ((const char *) a.q->data + it.token(a, r)*a.q->nb[1] + it.head(a, r)*a.q->nb[2] + it.i3*a.q->nb[3]);
        for (int64_t i = 0; i < a.DK; i++) {
            Q[r*a.DKp + i] = q[i]*a.scale;
        }
        max[r] = -INFINITY;
        sum[r] = 0.0f;
    }

    const char * k = (const char *) a.k->data + it.ik2*a.k->nb[2] + it.i3/(a.q->ne[3]/a.k->ne[3])*a.k->nb[3];
    const char * v = (const char *) a.v->data + it.ik2*a.v->nb[2] + it.i3/(a.q->ne[3]/a.v->ne[3])*a.v->nb[3];

    for (int64_t ic = ic0; ic < ic1; ic += KVT_TILE) {
        const int n  = (int) std::min<int64_t>(KVT_TILE, ic1 - ic);
        const int nv = (int) kvt_pad(n)/KVT_VW;
        if (a.mask && kvt_tile_masked(a, it, ic, n)) {
            continue;
        }

        kvt_unpack_k(a, k + ic*a.k->nb[1], n, kt, tmp);
        kvt_gemm(it.n, nv*KVT_VW, a.DKp, Q, a.DKp, kt, KVT_TILE, S, KVT_TILE, false, kvt_next(a.k, k, ic + KVT_TILE, ic1));

        bool any = false;
        for (int r = 0; r < it.n; r++) {
            const int64_t head = it.head(a, r);
            const uint16_t * mask = a.mask ? kvt_mask_row(a, it.token(a, r), head, it.i3) + ic : nullptr;
            uint16_t end[KVT_TILE];
            if (n % KVT_VW) { // the padding is masked
                std::fill(end, end + KVT_TILE, KVT_F16_NEG_INF);
                std::fill(end, end + n, (uint16_t) 0);
                if (mask) {
                    std::copy(mask, mask + n, end);
                }
                mask = end;
            }
            any |= kvt_soft_max(a, S + r*KVT_TILE, nv, mask, kvt_slope(a, head), out + r*a.DVp, max + r, sum + r);
        }
        if (!any) {
            continue;
        }

        kvt_unpack_rows(a.v, a.unpack_v, v + ic*a.v->nb[1], n, vt, a.DVp);
        kvt_gemm(it.n, a.DVp, n, S, KVT_TILE, vt, a.DVp, out, a.DVp, true, kvt_next(a.v, v, ic + KVT_TILE, ic1));
    }

    for (int r = 0; r < it.n; r++) {
        float * o = out + r*a.DVp;
        if (a.sinks && ic0 == 0) {
            const float sink = ((const float *) a.sinks->data)[it.head(a, r)];
            const float top  = std::max(max[r], sink);
            const float ms   = expf(max[r] - top);
            for (int64_t i = 0; i < a.DVp; i++) {
                o[i] *= ms;
            }
            sum[r] = sum[r]*ms + expf(sink - top);
            max[r] = top;
        }
        if (partial) {
            float * p = partial + r*a.n_partial();
            memcpy(p, o, a.DVp*sizeof(float));
            p[a.DVp]     = max[r];
            p[a.DVp + 1] = sum[r];
        } else {
            kvt_write(a, it, r, o, sum[r]);
        }
    }
}

// row r of an item out of the parts of its KV range, in their order
static void kvt_reduce(const kvt_attn & a, int64_t i_item, int r, const float * partials, float * out) {
    const float * p0 = partials + (i_item*a.n_split*a.n_rows_item + r)*a.n_partial();
    const int64_t stride = a.n_rows_item*a.n_partial();

    float max = -INFINITY, sum = 0.0f;
    for (int64_t s = 0; s < a.n_split; s++) {
        max = std::max(max, p0[s*stride + a.DVp]);
    }
    memset(out, 0, a.DVp*sizeof(float));
    for (int64_t s = 0; s < a.n_split; s++) {
        const float * p = p0 + s*stride;
        if (p[a.DVp] == -INFINITY) {
            continue;
        }
        const float ms = expf(p[a.DVp] - max);
        for (int64_t i = 0; i < a.DVp; i++) {
            out[i] += p[i]*ms;
        }
        sum += p[a.DVp + 1]*ms;
    }
    kvt_write(a, kvt_attn_item(a, i_item), r, out, sum);
}

bool kvt_attn_forward(const ggml_compute_params * params, ggml_tensor * dst) {
    if (params->use_ref || !kvt_attn_supports(dst)) {
        return false;
    }
    const int ith = params->ith, nth = params->nth;

    kvt_attn a = kvt_attn_plan(dst, nth);
    a.dst      = dst;
    a.unpack_k = kvt_unpack_of(a.k->type, a.DK);
    a.unpack_v = kvt_unpack_of(a.v->type, a.DV);
    memcpy(&a.scale,    (const float *) dst->op_params + 0, sizeof(float));
    memcpy(&a.max_bias, (const float *) dst->op_params + 1, sizeof(float));
    memcpy(&a.softcap,  (const float *) dst->op_params + 2, sizeof(float));
    if (a.softcap != 0.0f) {
        a.scale /= a.softcap;
    }

    float * base     = (float *) GGML_PAD((uintptr_t) params->wdata, 64);
    float * scratch  = base + ith*a.n_scratch;
    float * partials = base + nth*a.n_scratch;
    GGML_ASSERT((char *) (partials + a.n_partials()) <= (char *) params->wdata + params->wsize);

    if (a.n_split == 1) {
        // items are not alike under a causal mask
        if (ith == 0) {
            ggml_threadpool_chunk_set(params->threadpool, nth);
        }
        ggml_barrier(params->threadpool);
        for (int64_t i = ith; i < a.n_items; i = ggml_threadpool_chunk_add(params->threadpool, 1)) {
            kvt_attn_unit(a, i, 0, a.n_kv, scratch, nullptr);
        }
        return true;
    }

    const int64_t n_tiles = (a.n_kv + KVT_TILE - 1)/KVT_TILE;
    const int64_t n_units = a.n_items*a.n_split;
    for (int64_t u = n_units*ith/nth; u < n_units*(ith + 1)/nth; u++) {
        const int64_t i = u % a.n_items, s = u/a.n_items;
        const int64_t ic0 = n_tiles*s/a.n_split*KVT_TILE, ic1 = std::min(a.n_kv, n_tiles*(s + 1)/a.n_split*KVT_TILE);
        kvt_attn_unit(a, i, ic0, ic1, scratch, partials + (i*a.n_split + s)*a.n_rows_item*a.n_partial());
    }
    ggml_barrier(params->threadpool);
    for (int64_t r = ith; r < a.n_items*a.n_rows_item; r += nth) {
        const int64_t i = r/a.n_rows_item;
        if (r % a.n_rows_item < kvt_attn_item(a, i).n) {
            kvt_reduce(a, i, (int) (r % a.n_rows_item), partials, scratch);
        }
    }
    return true;
}

#else

bool kvt_attn_forward(const ggml_compute_params *, ggml_tensor *) {
    return false;
}

size_t kvt_attn_work_size(const ggml_tensor *, int) {
    return 0;
}

#endif
