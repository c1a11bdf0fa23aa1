// kvt-attn.cpp - attention over tiles of KV rows
//
// The query rows that share a KV head (its query heads, for a span of tokens) are the rows of two small matrix products:
// scores = Q K^T and out += P V, with one pass of exponentials in between. K and V are unpacked a tile at a time.
// What a row gets depends on the cells that it sees alone, bit for bit: not on the rows beside it, nor on what other cells hold.
#include "kvt-attn.h"
#include "kvt-attn-params.h"
#include "kvt-attn-simd.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#if defined(KVT_VW) && !defined(KVT_STOCK_ATTN)

#include "kvt-attn-tile.h"

static const int KVT_ROWS  = 96; // query rows of an item, at most
static const int KVT_GROUP = 64; // query rows of a group, at most

//
// plan: who computes what
//
// An item is the query rows of a span of tokens that share a KV head, a group is the items of several KV heads: they go
// through the KV rows together, as the heads of a row lie beside each other in memory, and one's exponentials take the time of another's.
//

struct kvt_attn {
    const ggml_tensor * q;
    const ggml_tensor * mask;
    const ggml_tensor * sinks;
    ggml_tensor *       dst;
    kvt_side            k, v;
    kvt_attn_params     params;

    int64_t n_kv, n_gqa;      // query heads that share a KV head
    int64_t n_rows;           // query rows that share a KV head: token * n_gqa + head
    int64_t n_rows_item, n_items_head, n_items_group, n_groups, n_split;
    int64_t n_row, n_scratch; // floats per query row, and per thread
    int64_t n_tile;           // KV rows

    int64_t n_partial() const { return v.Dp + 2; } // sum of P V, max, sum
    int64_t n_partials() const { return n_split > 1 ? n_groups * n_split * n_items_group * n_rows_item * n_partial() : 0; }
};

static bool kvt_attn_supports(const ggml_tensor * dst) {
    const ggml_tensor * q     = dst->src[0];
    const ggml_tensor * k     = dst->src[1];
    const ggml_tensor * v     = dst->src[2];
    const ggml_tensor * mask  = dst->src[3];
    const ggml_tensor * sinks = dst->src[4];
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

static kvt_attn kvt_attn_plan(const ggml_tensor * dst) {
    kvt_attn a = {};
    a.q = dst->src[0], a.k = kvt_side(dst->src[1]), a.v = kvt_side(dst->src[2]), a.mask = dst->src[3], a.sinks = dst->src[4];

    const int64_t n_head_kv = a.k.t->ne[2], n_stream = a.q->ne[3];
    a.n_kv   = a.k.t->ne[1];
    a.n_gqa  = a.q->ne[2] / n_head_kv;
    a.n_rows = a.q->ne[1] * a.n_gqa;

    a.n_rows_item   = std::min<int64_t>(a.n_rows, KVT_ROWS);
    a.n_items_head  = (a.n_rows + a.n_rows_item - 1) / a.n_rows_item;
    a.n_items_group = 1;
    if (a.n_items_head == 1) {
        for (int64_t n = 1; n <= n_head_kv && n * a.n_rows <= KVT_GROUP; n++) {
            a.n_items_group = n_head_kv % n == 0 ? n : a.n_items_group;
        }
    }
    a.n_groups = a.n_items_head * n_head_kv * n_stream / a.n_items_group;

    a.n_row     = GGML_PAD(kvt_q_size(a.k) + a.v.Dp + (int64_t) (sizeof(kvt_row) / sizeof(float)), 16);
    a.n_scratch = a.n_items_group * a.n_rows_item * a.n_row + kvt_tile::size(a.k, a.v, a.n_items_group * a.n_rows_item);
    a.n_tile    = kvt_tile::rows_of(a.k, a.v);
    a.n_split   = 1;
    return a;
}

static int64_t kvt_n_tiles(const kvt_attn & a) {
    return (a.n_kv + a.n_tile - 1) / a.n_tile;
}

static const uint16_t * kvt_mask_row(const kvt_attn & a, int64_t token, int64_t head, int64_t i3) {
    const ggml_tensor * m = a.mask;
    return m ? (const uint16_t *) ((const char *) m->data + token * m->nb[1] + (head % m->ne[2]) * m->nb[2] + (i3 % m->ne[3]) * m->nb[3]) : nullptr;
}

// KV rows up to the last that any query row sees: the room behind them is nobody's work
static int64_t kvt_n_seen(const kvt_attn & a) {
    if (!a.mask) {
        return a.n_kv;
    }
    int64_t n = 1;
    for (int64_t i3 = 0; i3 < a.mask->ne[3]; i3++) {
        for (int64_t head = 0; head < a.mask->ne[2]; head++) {
            for (int64_t token = 0; token < a.q->ne[1]; token++) {
                const uint16_t * row  = kvt_mask_row(a, token, head, i3);
                int64_t          last = a.n_kv;
                while (last > n && row[last - 1] == KVT_F16_NEG_INF) {
                    last--;
                }
                n = last;
            }
        }
    }
    return n;
}

// Few groups, as in decode: every thread gets as many units, by parts of the KV range, or, where the range is too short for that, by
// groups of fewer heads.
static void kvt_attn_share(kvt_attn & a, int64_t n_threads) {
    if (a.n_groups >= 4 * n_threads) {
        return;
    }
    a.n_kv                = std::min(a.n_kv, GGML_PAD(kvt_n_seen(a), a.n_tile));
    const int64_t n_tiles = kvt_n_tiles(a), n_items = a.n_groups * a.n_items_group, n_max = a.n_items_group;
    int64_t       least = INT64_MAX;
    for (int64_t n = n_max; n >= 1; n--) {
        if (n_max % n == 0) {
            const int64_t n_groups = n_items / n, n_split = std::min(n_threads / std::gcd(n_groups, n_threads), n_tiles);
            // heads times tiles of the busiest thread
            const int64_t most = (n_groups * n_split + n_threads - 1) / n_threads * n * ((n_tiles + n_split - 1) / n_split);
            if (most < least - least / 4) {
                least = most, a.n_items_group = n, a.n_groups = n_groups, a.n_split = n_split;
            }
        }
    }
}

size_t kvt_attn_work_size(const ggml_tensor * dst, int n_threads) {
    if (!kvt_attn_supports(dst)) {
        return 0;
    }
    kvt_attn a = kvt_attn_plan(dst);
    a.n_split  = n_threads; // at most
    return sizeof(float) * (n_threads * a.n_scratch + (a.n_groups < 4 * n_threads ? a.n_partials() : 0)) + 64;
}

//
// items
//

struct kvt_item {
    int64_t i3, ik2, row; // stream, KV head, first row
    int     n;                // rows

    kvt_item(const kvt_attn & a, int64_t i) :
        i3(i / a.n_items_head / a.k.t->ne[2]), ik2(i / a.n_items_head % a.k.t->ne[2]), row(i % a.n_items_head * a.n_rows_item),
        n((int) std::min(a.n_rows_item, a.n_rows - row)) {}

    int64_t token(const kvt_attn & a, int r) const { return (row + r) / a.n_gqa; }
    int64_t head(const kvt_attn & a, int r) const { return ik2 * a.n_gqa + (row + r) % a.n_gqa; }
};

// the rows of a group, item by item
struct kvt_state {
    float *   Q; // [rows][kvt_q_size]
    float *   out; // [rows][DVp]
    kvt_row * rows;

    kvt_state(const kvt_attn & a, float * base) {
        Q    = base;
        out  = Q + a.n_items_group * a.n_rows_item * kvt_q_size(a.k);
        rows = (kvt_row *) (out + a.n_items_group * a.n_rows_item * a.v.Dp);
    }
};

// r0: the item's first row of the group
static void kvt_item_begin(const kvt_attn & a, const kvt_item & it, const kvt_state & s, int r0, kvt_tile & tile) {
    memset(s.out + r0 * a.v.Dp, 0, it.n * a.v.Dp * sizeof(float));
    for (int r = 0; r < it.n; r++) {
        const char *  q     = (const char *) a.q->data + it.token(a, r) * a.q->nb[1] + it.head(a, r) * a.q->nb[2] + it.i3 * a.q->nb[3];
        const int64_t head  = it.head(a, r);
        const float   scale = a.params.scale * kvt_set_q(a.k, (const float *) q, s.Q + (r0 + r) * kvt_q_size(a.k), tile);
        s.rows[r0 + r]      = { kvt_mask_row(a, it.token(a, r), head, it.i3), scale, kvt_attn_slope(a.params, head), -INFINITY, 0.0f };
    }
}

// Item i's share of the n rows at p that are needed next, where its head starts: or, if the heads of the group lie beside each other, a part of all
// their rows.
static kvt_ahead kvt_next(const kvt_attn & a, const kvt_side & s, int64_t i, const char * p, int64_t n) {
    const size_t nb = s.t->nb[1];
    if (a.n_items_group > 1 && nb == a.n_items_group * s.row_size && s.t->nb[2] == s.row_size) {
        return { p - i * s.row_size + i * n * s.row_size, s.row_size, s.row_size, n, 1 };
    }
    return { p, nb, s.row_size, n, 1 };
}

// n cells from ic on, of a group of items of n_rows rows; k0 and v0: where its first head starts; n_next: cells of the tile after it
static void kvt_group_tile(const kvt_attn & a, int n_rows, const char * k0, const char * v0, const kvt_state & s, kvt_tile & tile, int64_t ic, int n, int64_t n_next) {
    const kvt_seen seen(s.rows, (int) a.n_items_group * n_rows, tile.n, ic, n, tile.end);
    if (!seen.any) {
        return;
    }
    for (int64_t i = 0; i < a.n_items_group; i++) {
        const char * k = k0 + i * a.k.t->nb[2] + ic * a.k.t->nb[1];
        kvt_scores(a.k, k, seen.part((int) i * n_rows, n_rows), s.Q + i * n_rows * kvt_q_size(a.k), tile, kvt_next(a, a.v, i, v0 + i * a.v.t->nb[2] + ic * a.v.t->nb[1], n));
    }
    kvt_weights({ a.params.softcap, a.v.integer }, seen, s.rows, s.out, a.v.Dp, tile);
    for (int64_t i = 0; i < a.n_items_group; i++) {
        const char * v = v0 + i * a.v.t->nb[2] + ic * a.v.t->nb[1];
        kvt_values(a.v, v, seen.part((int) i * n_rows, n_rows), s.out + i * n_rows * a.v.Dp, tile, kvt_next(a, a.k, i, k0 + i * a.k.t->nb[2] + (ic + tile.n) * a.k.t->nb[1], n_next));
    }
}

static void kvt_sink(const kvt_attn & a, float sink, kvt_row & row, float * out) {
    const float top = std::max(row.max, sink);
    const float ms  = expf(row.max - top);
    for (int64_t i = 0; i < a.v.Dp; i++) {
        out[i] *= ms;
    }
    row.sum = row.sum * ms + expf(sink - top);
    row.max = top;
}

static void kvt_write(const kvt_attn & a, const kvt_item & it, int r, const float * out, float sum) {
    const ggml_tensor * d   = a.dst;
    float *             y   = (float *) ((char *) d->data + (it.i3 * d->ne[2] * d->ne[1] + it.head(a, r) + it.token(a, r) * d->ne[1]) * d->nb[1]);
    const float         inv = sum == 0.0f ? 0.0f : 1.0f / sum;
    for (int64_t i = 0; i < a.v.D; i++) {
        y[i] = out[i] * inv;
    }
}

//
// one unit of work: a group over a range of KV rows; to dst, or, if partial is given, to partial[items][rows][n_partial]
//

static void kvt_attn_unit(const kvt_attn & a, int64_t i_group, int64_t ic0, int64_t ic1, float * scratch, float * partial) {
    const kvt_item  first(a, i_group * a.n_items_group);
    const kvt_state s(a, scratch);
    kvt_tile        tile(scratch + a.n_items_group * a.n_rows_item * a.n_row, a.k, a.v, a.n_items_group * a.n_rows_item);
    if (a.k.Dp != a.k.D) { // what the rows leave out is multiplied, too
        memset(tile.tmp, 0, KVT_VW * a.k.Dp * sizeof(float));
    }
    if (a.v.Dp != a.v.D) {
        memset(tile.vt, 0, KVT_TILE * a.v.Dp * sizeof(float));
    }

    for (int64_t i = 0; i < a.n_items_group; i++) {
        kvt_item_begin(a, kvt_item(a, i_group * a.n_items_group + i), s, (int) i * first.n, tile);
    }
    const auto   cells = [&](int64_t ic) { return std::max<int64_t>(0, std::min<int64_t>(a.n_tile, ic1 - ic)); };
    const char * k0    = a.k.head(first.ik2, first.i3, a.q->ne[3]);
    const char * v0    = a.v.head(first.ik2, first.i3, a.q->ne[3]);
    for (int64_t ic = ic0; ic < ic1; ic += a.n_tile) {
        kvt_group_tile(a, first.n, k0, v0, s, tile, ic, (int) cells(ic), cells(ic + a.n_tile));
    }
    for (int64_t i = 0; i < a.n_items_group; i++) {
        const kvt_item it(a, i_group * a.n_items_group + i);
        for (int r = 0; r < it.n; r++) {
            kvt_row & row = s.rows[i * it.n + r];
            float *   out = s.out + (i * it.n + r) * a.v.Dp;
            if (a.sinks && ic0 == 0) {
                kvt_sink(a, ((const float *) a.sinks->data)[it.head(a, r)], row, out);
            }
            if (partial) {
                float * p = partial + (i * a.n_rows_item + r) * a.n_partial();
                memcpy(p, out, a.v.Dp * sizeof(float));
                p[a.v.Dp]     = row.max;
                p[a.v.Dp + 1] = row.sum;
            } else {
                kvt_write(a, it, r, out, row.sum);
            }
        }
    }
}

// row r of an item out of the parts of its KV range, in their order
static void kvt_reduce(const kvt_attn & a, int64_t i_item, int r, const float * partials, float * out) {
    const int64_t i_group = i_item / a.n_items_group, i = i_item % a.n_items_group;
    const int64_t stride = a.n_items_group * a.n_rows_item * a.n_partial();
    const float * p0     = partials + i_group * a.n_split * stride + (i * a.n_rows_item + r) * a.n_partial();

    float max = -INFINITY, sum = 0.0f;
    for (int64_t s = 0; s < a.n_split; s++) {
        max = std::max(max, p0[s * stride + a.v.Dp]);
    }
    memset(out, 0, a.v.Dp * sizeof(float));
    for (int64_t s = 0; s < a.n_split; s++) {
        const float * p = p0 + s * stride;
        if (p[a.v.Dp] == -INFINITY && p[a.v.Dp + 1] == 0.0f) {
            continue;
        }
        const float ms = expf(p[a.v.Dp] - max);
        for (int64_t c = 0; c < a.v.Dp; c++) {
            out[c] += p[c] * ms;
        }
        sum += p[a.v.Dp + 1] * ms;
    }
    kvt_write(a, kvt_item(a, i_item), r, out, sum);
}

bool kvt_attn_forward(const ggml_compute_params * params, ggml_tensor * dst) {
    if (params->use_ref || !kvt_attn_supports(dst)) {
        return false;
    }
    const int ith = params->ith, nth = params->nth;

    kvt_attn a = kvt_attn_plan(dst);
    kvt_attn_share(a, nth);
    a.dst    = dst;
    a.params = kvt_attn_params_of(dst);

    float * base     = (float *) GGML_PAD((uintptr_t) params->wdata, 64);
    float * scratch  = base + ith * a.n_scratch;
    float * partials = base + nth * a.n_scratch;
    GGML_ASSERT((char *) (partials + a.n_partials()) <= (char *) params->wdata + params->wsize);

    const int64_t n_tiles = kvt_n_tiles(a), n_units = a.n_groups * a.n_split;
    const auto    compute = [&](int64_t u) {
        const int64_t i = u / a.n_split, s = u % a.n_split;
        const int64_t ic0 = n_tiles * s / a.n_split * a.n_tile, ic1 = std::min(a.n_kv, n_tiles * (s + 1) / a.n_split * a.n_tile);
        kvt_attn_unit(a, i, ic0, ic1, scratch, a.n_split > 1 ? partials + u * a.n_items_group * a.n_rows_item * a.n_partial() : nullptr);
    };
    if (n_units < 4 * nth) {
        for (int64_t u = n_units * ith / nth; u < n_units * (ith + 1) / nth; u++) {
            compute(u);
        }
    } else { // units are not alike under a mask
        if (ith == 0) {
            ggml_threadpool_chunk_set(params->threadpool, nth);
        }
        ggml_barrier(params->threadpool);
        for (int64_t u = ith; u < n_units; u = ggml_threadpool_chunk_add(params->threadpool, 1)) {
            compute(u);
        }
    }
    if (a.n_split == 1) {
        return true;
    }
    ggml_barrier(params->threadpool);
    const int64_t n_items = a.n_groups * a.n_items_group;
    for (int64_t r = ith; r < n_items * a.n_rows_item; r += nth) {
        const int64_t i = r / a.n_rows_item;
        if (r % a.n_rows_item < kvt_item(a, i).n) {
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
