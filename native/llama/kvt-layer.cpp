// kvt-layer.cpp - one layer of a cache: its context shift, and its type in a state file
#include "kvt-layer.h"
#include "kvt-cond.h"

#include "llama-impl.h"

#include "ggml.h"

//
// context shift
//

bool kvt_shift_whole(const ggml_tensor * k, const kvt_layer & kvt) {
    return ggml_is_quantized(k->type) || kvt.cond;
}

bool kvt_shift_f32(const ggml_tensor * k, const kvt_layer & kvt) {
    return kvt_shift_whole(k, kvt) || k->type == GGML_TYPE_BF16;
}

ggml_tensor * kvt_shift_read(ggml_context * ctx, const kvt_layer & kvt, ggml_tensor * rot, ggml_tensor * k) {
    k = rot && kvt.rot_k ? llama_mul_mat_hadamard(ctx, k, rot) : k;
    return kvt_cond_k_undo(ctx, kvt.cond, k);
}

ggml_tensor * kvt_shift_write(ggml_context * ctx, const kvt_layer & kvt, ggml_tensor * rot, ggml_tensor * k) {
    k = kvt_cond_k(ctx, kvt.cond, k);
    return rot && kvt.rot_k ? llama_mul_mat_hadamard(ctx, k, rot) : k;
}

//
// state
//

// tags in a state file's type id, far above any ggml_type
static const int32_t KVT_STATE_UNROTATED   = 1 << 16;
static const int32_t KVT_STATE_CONDITIONED = 1 << 17; // the hash of the vectors follows

static int32_t kvt_state_type(const ggml_tensor * tensor, bool rot, int32_t n_embd_head) {
    const bool rot_default = ggml_is_quantized(tensor->type) && n_embd_head > 0 && n_embd_head % 64 == 0;
    return (int32_t) tensor->type | (rot_default && !rot ? KVT_STATE_UNROTATED : 0);
}

int32_t kvt_state_type_k(const ggml_tensor * k, const kvt_layer & kvt, int32_t n_embd_head) {
    return kvt_state_type(k, kvt.rot_k, n_embd_head) | (kvt.cond ? KVT_STATE_CONDITIONED : 0);
}

int32_t kvt_state_type_v(const ggml_tensor * v, const kvt_layer & kvt, int32_t n_embd_head) {
    return kvt_state_type(v, kvt.rot_v, n_embd_head);
}

void kvt_state_refused(const char * side, uint32_t il, int32_t have, int32_t want) {
    const auto name = [](int32_t id) {
        const int32_t type = id & ~(KVT_STATE_UNROTATED | KVT_STATE_CONDITIONED);
        if (type < 0 || type >= GGML_TYPE_COUNT || !ggml_type_name((ggml_type) type)) {
            return format("unknown type %d", type);
        }
        return format("%s%s%s", ggml_type_name((ggml_type) type), id & KVT_STATE_UNROTATED ? " (not rotated)" : "", id & KVT_STATE_CONDITIONED ? " (conditioned)" : "");
    };
    LLAMA_LOG_ERROR("%s: layer %u: the state has %s %s, this context has %s: it was saved under another plan, cache type, rotation or conditioning. Load it where it was saved, or process the prompt again\n",
            __func__, il, side, name(want).c_str(), name(have).c_str());
}
