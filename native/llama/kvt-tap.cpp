// kvt-tap.cpp - hands the inputs and the output of every attention node to a callback
//
// The node is GGML_OP_FLASH_ATTN_EXT: it has everything that its layer's attention uses, for any architecture. Its sources
// are still intact when the scheduler reports the node as computed.
#include "kvt.h"
#include "kvt-error.h"
#include "kvt-names.h"

#include "ggml.h"
#include "ggml-backend.h"

#include "llama-impl.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <string>
#include <vector>

struct kvt_tap {
    kvt_tap_fn fn;
    void *     user;
    int32_t    n_q_max;
    bool       on = false;

    std::string error;

    int32_t il   = -1;   // layer of the last attention node
    bool    open = false; // its branch has not met the residual stream yet

    std::vector<double>       branch_sq; // |branch|^2 of each token
    std::map<int32_t, double> share;     // layer -> |branch|^2 / |stream|^2, mean over tokens

    std::vector<uint8_t>     raw;
    std::vector<float>       q, mask, sinks, out;
    std::vector<ggml_fp16_t> k, v;
};

// the bytes that a strided tensor spans, on the host
static const uint8_t * kvt_fetch(kvt_tap & tap, const ggml_tensor * t) {
    if (ggml_backend_buffer_is_host(t->view_src ? t->view_src->buffer : t->buffer)) {
        return (const uint8_t *) t->data;
    }
    tap.raw.resize(ggml_nbytes(t));
    ggml_backend_tensor_get(t, tap.raw.data(), 0, tap.raw.size());
    return tap.raw.data();
}

// rows i1 of t [ne0, ne1, ne2] as dense rows dst [ne2][i1.size()][ne0], f32 or f16 to T
template <typename T, typename F>
static void kvt_copy_rows(kvt_tap & tap, const ggml_tensor * t, const std::vector<int64_t> & i1, std::vector<T> & dst, F convert) {
    const uint8_t * data = kvt_fetch(tap, t);
    dst.resize(t->ne[0] * i1.size() * t->ne[2]);
    T * out = dst.data();
    for (int64_t i2 = 0; i2 < t->ne[2]; i2++) {
        for (const int64_t i : i1) {
            const uint8_t * row = data + i * t->nb[1] + i2 * t->nb[2];
            for (int64_t i0 = 0; i0 < t->ne[0]; i0++) {
                *out++ = convert(row + i0 * t->nb[0]);
            }
        }
    }
}

static float kvt_load_f32(const uint8_t * p) {
    float x;
    memcpy(&x, p, sizeof(x));
    return x;
}
static float kvt_load_f16_f32(const uint8_t * p) {
    ggml_fp16_t x;
    memcpy(&x, p, sizeof(x));
    return ggml_fp16_to_fp32(x);
}
static ggml_fp16_t kvt_load_f16(const uint8_t * p) {
    ggml_fp16_t x;
    memcpy(&x, p, sizeof(x));
    return x;
}

static std::vector<int64_t> kvt_all(int64_t n) {
    std::vector<int64_t> res(n);
    for (int64_t i = 0; i < n; i++) {
        res[i] = i;
    }
    return res;
}

static void kvt_tap_node_done(kvt_tap & tap, const ggml_tensor * t, int32_t il) {
    const ggml_tensor * q     = t->src[0]; // [head_dim_k, n_q,  n_head]
    const ggml_tensor * k     = t->src[1]; // [head_dim_k, n_kv, n_head_kv]
    const ggml_tensor * v     = t->src[2];
    const ggml_tensor * mask  = t->src[3]; // [n_kv, n_q]
    const ggml_tensor * sinks = t->src[4];

    if (q->ne[3] != 1 || q->type != GGML_TYPE_F32 || k->type != GGML_TYPE_F16 || v->type != GGML_TYPE_F16) {
        tap.error = format("layer %d: need one sequence and an f16 cache, have q %s x %d, k %s, v %s", il,
                ggml_type_name(q->type), (int) q->ne[3], ggml_type_name(k->type), ggml_type_name(v->type));
        return;
    }

    const int64_t        n_q = std::min<int64_t>(q->ne[1], tap.n_q_max);
    std::vector<int64_t> i_q(n_q); // spread evenly, the last one included
    for (int64_t i = 0; i < n_q; i++) {
        i_q[i] = (i + 1) * q->ne[1] / n_q - 1;
    }

    kvt_copy_rows(tap, q, i_q, tap.q, kvt_load_f32);
    kvt_copy_rows(tap, k, kvt_all(k->ne[1]), tap.k, kvt_load_f16);
    kvt_copy_rows(tap, v, kvt_all(v->ne[1]), tap.v, kvt_load_f16);
    if (mask) {
        kvt_copy_rows(tap, mask, i_q, tap.mask, mask->type == GGML_TYPE_F16 ? kvt_load_f16_f32 : kvt_load_f32);
    }
    if (sinks) {
        kvt_copy_rows(tap, sinks, kvt_all(1), tap.sinks, kvt_load_f32);
    }

    // the output is [head_dim_v, n_head, n_q]: per head, the rows of i_q
    const uint8_t * data = kvt_fetch(tap, t);
    tap.out.resize(t->ne[0] * t->ne[1] * n_q);
    float * out = tap.out.data();
    for (int64_t ih = 0; ih < t->ne[1]; ih++) {
        for (const int64_t i : i_q) {
            memcpy(out, data + ih * t->nb[1] + i * t->nb[2], t->ne[0] * sizeof(float));
            out += t->ne[0];
        }
    }

    float params[3]; // scale, max_bias, logit_softcap
    memcpy(params, t->op_params, sizeof(params));

    const kvt_tap_node node = {
        il, (int32_t) n_q, (int32_t) k->ne[1], (int32_t) q->ne[2], (int32_t) k->ne[2], (int32_t) k->ne[0], (int32_t) v->ne[0],
        params[0], params[1], params[2],
        tap.q.data(), tap.k.data(), tap.v.data(), mask ? tap.mask.data() : nullptr, sinks ? tap.sinks.data() : nullptr, tap.out.data()
    };
    tap.fn(&node, tap.user);
}

// does t come from the attention node of layer il, a few steps back?
static bool kvt_from_attention(const ggml_tensor * t, int32_t il, int depth) {
    if (!t || depth == 0) {
        return false;
    }
    if (t->op == GGML_OP_FLASH_ATTN_EXT) {
        return kvt_cache_layer(t->src[1]) == il;
    }
    return kvt_from_attention(t->src[0], il, depth - 1) || kvt_from_attention(t->src[1], il, depth - 1);
}

enum kvt_stream_role {
    KVT_STREAM_NONE,
    KVT_STREAM_BRANCH,
    KVT_STREAM_SUM,
};

// what a node is to the attention branch that is open: a step of it, or its sum with the residual stream
static kvt_stream_role kvt_stream(const kvt_tap & tap, const ggml_tensor * t) {
    if (!tap.open || t->type != GGML_TYPE_F32 || !ggml_is_contiguous(t)) {
        return KVT_STREAM_NONE;
    }
    const bool step = t->op == GGML_OP_MUL_MAT || t->op == GGML_OP_MUL || t->op == GGML_OP_SCALE || t->op == GGML_OP_RMS_NORM || t->op == GGML_OP_ADD;
    if (!step || !kvt_from_attention(t, tap.il, 10)) {
        return KVT_STREAM_NONE;
    }
    if (t->op == GGML_OP_ADD && ggml_are_same_shape(t->src[0], t->src[1]) && // not a bias
            kvt_from_attention(t->src[0], tap.il, 9) != kvt_from_attention(t->src[1], tap.il, 9)) {
        return KVT_STREAM_SUM;
    }
    return KVT_STREAM_BRANCH;
}

// |row|^2 of each token
static std::vector<double> kvt_rows_sq(kvt_tap & tap, const ggml_tensor * t) {
    const uint8_t *     data = kvt_fetch(tap, t);
    std::vector<double> res(ggml_nrows(t), 0.0);
    for (size_t i = 0; i < res.size(); i++) {
        for (int64_t i0 = 0; i0 < t->ne[0]; i0++) {
            const double x = kvt_load_f32(data + i * t->nb[1] + i0 * sizeof(float));
            res[i] += x * x;
        }
    }
    return res;
}

static void kvt_stream_done(kvt_tap & tap, const ggml_tensor * t) {
    std::vector<double> sq = kvt_rows_sq(tap, t);
    if (kvt_stream(tap, t) == KVT_STREAM_BRANCH) {
        tap.branch_sq = std::move(sq); // the last step before the sum counts
        return;
    }
    tap.open = false;
    if (sq.size() != tap.branch_sq.size()) {
        return;
    }
    double sum = 0; // a mean over tokens: a few have activations that dwarf all others
    for (size_t i = 0; i < sq.size(); i++) {
        sum += sq[i] > 0 ? tap.branch_sq[i] / sq[i] : 0;
    }
    tap.share.emplace(tap.il, sum / sq.size()); // of layers that read one cache, the first
}

bool kvt_tap_eval(ggml_tensor * t, bool ask, void * user) {
    kvt_tap * tap = (kvt_tap *) user;
    if (!tap || !tap->on) {
        return !ask; // not asked for; and never stop the graph
    }
    const int32_t il = t->op == GGML_OP_FLASH_ATTN_EXT ? kvt_cache_layer(t->src[1]) : -1;
    if (ask) {
        if (il >= 0) {
            tap->il   = il; // the nodes after this one are asked for before it is done
            tap->open = true;
        }
        return il >= 0 || kvt_stream(*tap, t) != KVT_STREAM_NONE;
    }
    if (il >= 0) {
        kvt_tap_node_done(*tap, t, il);
    } else if (kvt_stream(*tap, t) != KVT_STREAM_NONE) {
        kvt_stream_done(*tap, t);
    }
    return true;
}

int32_t kvt_tap_share(const kvt_tap * tap, int32_t il, float * share) {
    if (!tap || !share) {
        return kvt_error(KVT_E_ARG, "kvt_tap_share: tap and share must not be null");
    }
    const auto it = tap->share.find(il);
    if (it == tap->share.end()) {
        return kvt_error(KVT_E_NONE, format("layer %d: its attention was not seen to join the residual stream", il));
    }
    *share = (float) it->second;
    return 0;
}

kvt_tap * kvt_tap_new(kvt_tap_fn fn, void * user, int32_t n_q_max) {
    if (!fn || n_q_max < 1) {
        kvt_error(KVT_E_ARG, format("kvt_tap_new: need a callback and n_q_max > 0, have %d", n_q_max));
        return nullptr;
    }
    auto * tap   = new kvt_tap();
    tap->fn      = fn;
    tap->user    = user;
    tap->n_q_max = n_q_max;
    return tap;
}

void kvt_tap_free(kvt_tap * tap) {
    delete tap;
}

void kvt_tap_enable(kvt_tap * tap, bool on) {
    if (!tap) {
        return;
    }
    if (on) {
        tap->error.clear();
        tap->share.clear();
        tap->open = false;
    }
    tap->on = on;
}

const char * kvt_tap_error(const kvt_tap * tap) {
    return tap ? tap->error.c_str() : "";
}
