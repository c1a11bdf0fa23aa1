// kvt-hidden.cpp - hidden states between layers, kept in one run and taken in others, which start at a later layer
#include "kvt-hidden.h"
#include "kvt-error.h"
#include "kvt-names.h"

#include "ggml-backend.h"

#include "llama-impl.h"

#include <algorithm>
#include <cstdio>
#include <memory>
#include <unordered_set>
#include <vector>

struct kvt_hidden {
    float * rows; // [n_slot][n_rows][n_embd], the caller's; slot i: after layer (i + 1)*stride - 1
    int32_t n_slot, stride, n_embd;
    int64_t n_rows;

    std::vector<int64_t> kept; // rows of each slot, from the first on

    bool    keeping = false;
    int32_t slot    = -1; // that runs start with
    int64_t from    = 0;  // the first of its rows that they take
    int64_t at      = 0;  // the next

    float * row(int32_t i, int64_t at) const { return rows + (i * n_rows + at) * n_embd; }

    // n rows of t, as they are kept: dense floats
    bool fits(const ggml_tensor * t) const {
        return t->type == GGML_TYPE_F32 && t->ne[0] == n_embd && t->ne[2] == 1 && t->ne[3] == 1 && ggml_is_contiguous(t) && !t->view_src;
    }
};

// the layer whose result t is, -1 if it is none
static int32_t kvt_layer_out(const ggml_tensor * t) {
    int32_t il = -1;
    return sscanf(t->name, "l_out-%d", &il) == 1 ? il : -1;
}

//
// kept
//

bool kvt_hidden_eval(ggml_tensor * t, bool ask, void * user) {
    kvt_hidden * hidden = (kvt_hidden *) user;
    if (!hidden || !hidden->keeping) {
        return !ask;
    }
    const int32_t il = kvt_layer_out(t), i = (il + 1) / hidden->stride - 1;
    if (il < 0 || (il + 1) % hidden->stride || i >= hidden->n_slot || !hidden->fits(t)) {
        return !ask;
    }
    if (!ask && hidden->kept[i] + t->ne[1] <= hidden->n_rows) {
        ggml_backend_tensor_get(t, hidden->row(i, hidden->kept[i]), 0, ggml_nbytes(t));
        hidden->kept[i] += t->ne[1];
    }
    return true;
}

//
// taken
//

// the next rows, at each run of the graph
struct kvt_hidden_input : llm_graph_input_i {
    kvt_hidden &  hidden;
    ggml_tensor * t;

    kvt_hidden_input(kvt_hidden & hidden, ggml_tensor * t) : hidden(hidden), t(t) {}

    void set_input(const llama_ubatch *) override {
        if (hidden.at + t->ne[1] <= hidden.n_rows) {
            ggml_backend_tensor_set(t, hidden.row(hidden.slot, hidden.at), 0, ggml_nbytes(t));
        }
        hidden.at += t->ne[1];
    }

    bool can_reuse(const llm_graph_params & params) override { return params.ubatch.n_tokens == t->ne[1]; }
};

using kvt_tensors = std::unordered_set<const ggml_tensor *>;

// what t is computed from, but for what `done` holds
static void kvt_collect(const ggml_tensor * t, kvt_tensors & done) {
    std::vector<const ggml_tensor *> open = { t };
    while (!open.empty()) {
        t = open.back();
        open.pop_back();
        if (!t || !done.insert(t).second) {
            continue;
        }
        open.push_back(t->view_src);
        open.insert(open.end(), t->src, t->src + GGML_MAX_SRC);
    }
}

// whether one of them is the cache or state of a layer below: the part that is cut off would have written it
static bool kvt_reads_below(const kvt_tensors & tensors, int32_t first) {
    for (const ggml_tensor * t : tensors) {
        const int32_t il = kvt_cache_layer(t);
        if (il >= 0 && il < first) {
            return true;
        }
    }
    return false;
}

static bool kvt_cut(llm_graph_result & res, kvt_hidden & hidden) {
    ggml_cgraph *              gf    = res.get_gf();
    const int32_t              first = (hidden.slot + 1) * hidden.stride;
    std::vector<ggml_tensor *> nodes(ggml_graph_nodes(gf), ggml_graph_nodes(gf) + ggml_graph_n_nodes(gf));

    size_t at = 0;
    while (at < nodes.size() && kvt_layer_out(nodes[at]) != first - 1) {
        at++;
    }
    if (at == nodes.size() || !hidden.fits(nodes[at]) || hidden.at + nodes[at]->ne[1] > hidden.n_rows) {
        return false;
    }
    ggml_tensor * enters = nodes[at];
    kvt_tensors   needed = { enters };
    for (size_t i = at + 1; i < nodes.size(); i++) {
        kvt_collect(nodes[i], needed);
    }
    if (kvt_reads_below(needed, first)) {
        return false;
    }

    std::vector<ggml_tensor *> inputs; // all are set, whether the rest needs them or not
    for (ggml_tensor * t : nodes) {
        for (ggml_tensor * src : t->src) {
            if (src && src->op == GGML_OP_NONE && (src->flags & GGML_TENSOR_FLAG_INPUT)) {
                inputs.push_back(src);
            }
        }
    }
    enters->op = GGML_OP_NONE;
    std::fill(enters->src, enters->src + GGML_MAX_SRC, nullptr);
    ggml_set_input(enters);

    ggml_graph_clear(gf);
    for (ggml_tensor * t : inputs) {
        ggml_build_forward_expand(gf, t);
    }
    for (size_t i = at + 1; i < nodes.size(); i++) {
        if (nodes[i]->flags & GGML_TENSOR_FLAG_COMPUTE) {
            ggml_build_forward_expand(gf, nodes[i]);
        } else {
            ggml_build_forward_order(gf, nodes[i]);
        }
    }
    res.add_input(std::make_unique<kvt_hidden_input>(hidden, enters));
    return true;
}

void kvt_hidden_cut(llm_graph_result & res, const llama_cparams & cparams) {
    if (cparams.cb_eval != kvt_hidden_eval) {
        return;
    }
    kvt_hidden & hidden = *(kvt_hidden *) cparams.cb_eval_user_data;
    if (hidden.slot < 0 || kvt_cut(res, hidden)) {
        return;
    }
    if (hidden.at > hidden.from) { // the layers below have not seen the tokens so far
        hidden.at = hidden.from + hidden.n_rows + 1;
    }
    hidden.slot = -1;
}

//
// of kvt.h
//

kvt_hidden * kvt_hidden_new(float * rows, int32_t n_slot, int32_t stride, int64_t n_rows, int32_t n_embd) {
    if (!rows || n_slot < 1 || stride < 1 || n_rows < 1 || n_embd < 1) {
        kvt_error(KVT_E_ARG, format("kvt_hidden_new: rows is null, or one of %d slots, a stride of %d, %lld rows and %d values is below 1", n_slot, stride,
                                     (long long) n_rows, n_embd));
        return nullptr;
    }
    auto * hidden  = new kvt_hidden();
    hidden->rows   = rows;
    hidden->n_slot = n_slot;
    hidden->stride = stride;
    hidden->n_rows = n_rows;
    hidden->n_embd = n_embd;
    hidden->kept.resize(n_slot);
    return hidden;
}

void kvt_hidden_free(kvt_hidden * hidden) {
    delete hidden;
}

void kvt_hidden_keep(kvt_hidden * hidden) {
    if (!hidden) {
        return;
    }
    std::fill(hidden->kept.begin(), hidden->kept.end(), 0);
    hidden->keeping = true;
    hidden->slot    = -1;
}

int32_t kvt_hidden_start(kvt_hidden * hidden, int32_t il, int64_t row) {
    if (!hidden || il < 0 || row < 0) {
        return kvt_error(KVT_E_ARG, format("kvt_hidden_start: hidden is null, or layer %d or row %lld is negative", il, (long long) row));
    }
    hidden->keeping = false;
    hidden->from    = row;
    hidden->at      = row;
    hidden->slot    = std::min(il / hidden->stride, hidden->n_slot) - 1;
    while (hidden->slot >= 0 && hidden->kept[hidden->slot] != hidden->n_rows) {
        hidden->slot--;
    }
    return (hidden->slot + 1) * hidden->stride;
}

int64_t kvt_hidden_taken(const kvt_hidden * hidden) {
    return hidden ? hidden->at - hidden->from : 0;
}
