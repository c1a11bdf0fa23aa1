// kvt-refuses.cpp - whether a device can cache a pair of K/V types and attend over it
#include "kvt-refuses.h"
#include "kvt-reads-pair.h"

#include "ggml-cpp.h"

#include <initializer_list>

static ggml_type kvt_type_read(int32_t type) {
    return type == GGML_TYPE_F32 ? GGML_TYPE_F16 : (ggml_type) type; // the graph casts an f32 cache
}

static bool kvt_can_write(ggml_context * ctx, ggml_backend_dev_t dev, int32_t type, int64_t n_row, int64_t n_kv) {
    ggml_tensor * dst = ggml_new_tensor_2d(ctx, (ggml_type) type, n_row, n_kv);
    ggml_tensor * src = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, n_row, 1);
    ggml_tensor * idx = ggml_new_tensor_1d(ctx, GGML_TYPE_I64, 1);
    return ggml_backend_dev_supports_op(dev, ggml_set_rows(ctx, dst, src, idx));
}

static bool kvt_can_attend(ggml_context * ctx, ggml_backend_dev_t dev, const kvt_pair_of_layer & p, int64_t n_q, int64_t n_kv) {
    ggml_tensor * q = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, p.head_dim_k, n_q, p.n_head);
    if (!p.flash_attn) {
        ggml_tensor * k = ggml_new_tensor_3d(ctx, (ggml_type) p.type_k, p.head_dim_k, n_kv, p.n_head_kv);
        return ggml_backend_dev_supports_op(dev, ggml_mul_mat(ctx, k, q));
    }
    ggml_tensor * k    = ggml_new_tensor_3d(ctx, kvt_type_read(p.type_k), p.head_dim_k, n_kv, p.n_head_kv);
    ggml_tensor * v    = ggml_new_tensor_3d(ctx, kvt_type_read(p.type_v), p.head_dim_v, n_kv, p.n_head_kv);
    ggml_tensor * mask = ggml_new_tensor_2d(ctx, GGML_TYPE_F16, n_kv, n_q);
    return ggml_backend_dev_supports_op(dev, ggml_flash_attn_ext(ctx, q, k, v, mask, 1.0f, p.max_bias, p.logit_softcap));
}

int32_t kvt_device_refuses(ggml_backend_dev_t dev, const kvt_pair_of_layer * pair) {
    const kvt_pair_of_layer & p   = *pair;
    ggml_backend_reg_t        reg = ggml_backend_dev_backend_reg(dev);

    if (const auto elsewhere = (kvt_device_refuses_t) ggml_backend_reg_get_proc_address(reg, KVT_DEVICE_REFUSES)) {
        return elsewhere(dev, pair);
    }
    ggml_init_params params = { 32 * ggml_tensor_overhead(), nullptr, true }; // mem_size, mem_buffer, no_alloc
    ggml_context_ptr ctx { ggml_init(params) };
    const int64_t    n_kv = 256;

    if (!kvt_can_write(ctx.get(), dev, p.type_k, (int64_t) p.head_dim_k * p.n_head_kv, n_kv) ||
            !kvt_can_write(ctx.get(), dev, p.type_v, (int64_t) p.head_dim_v * p.n_head_kv, n_kv)) {
        return KVT_REFUSES_PAIR;
    }
    for (const int64_t n_q : { 1, 64 }) { // decode and prefill may take different kernels
        if (!kvt_can_attend(ctx.get(), dev, p, n_q, n_kv)) {
            return KVT_REFUSES_PAIR;
        }
    }
    // a GPU supports some pairs by converting all of the cache to f16 at every step
    const auto reads_pair = (kvt_cuda_reads_pair_t) ggml_backend_reg_get_proc_address(reg, KVT_CUDA_READS_PAIR);
    if (p.flash_attn && reads_pair && !reads_pair(p.head_dim_k, p.head_dim_v, kvt_type_read(p.type_k), kvt_type_read(p.type_v))) {
        return KVT_REFUSES_AS_IT_IS;
    }
    return KVT_REFUSES_NOTHING;
}
