// kvt-attn.cu - where attention of few queries over a quantized cache runs on our kernel, and how the cache is split
#include "fattn-common.cuh"

#include "kvt-attn.cuh"
#include "kvt-cuda.h"

// eights of queries that each read a KV head's cache anew: for more, llama.cpp converts it to f16 once
static const int KVT_ATTN_PARTS = 4;

static bool kvt_attn_head_dim(int64_t head_dim) {
    return head_dim == 64 || head_dim == 128 || head_dim == 256;
}

static bool kvt_attn_takes(const ggml_tensor * dst) {
    const ggml_tensor *q = dst->src[0], *k = dst->src[1], *v = dst->src[2], *mask = dst->src[3];

    const bool quantized = ggml_is_quantized(k->type) || ggml_is_quantized(v->type);
    const bool stock     = k->type == v->type && (k->type == GGML_TYPE_Q8_0 || k->type == GGML_TYPE_Q4_0); // it has kernels of its own
    const int  sparse    = ggml_get_op_params_i32(dst, 4);
    return quantized && !stock && kvt_attn_reads_k(k->type) && kvt_attn_reads_v(v->type) && kvt_attn_head_dim(q->ne[0]) && v->ne[0] == q->ne[0] && sparse == 0 &&
           k->ne[1] >= KVT_ATTN_TOKENS && k->ne[3] == q->ne[3] && (!mask || (mask->type == GGML_TYPE_F16 && mask->ne[2] == 1)) &&
           q->ne[2] / k->ne[2] * q->ne[1] <= KVT_ATTN_PARTS * KVT_ATTN_COLS;
}

template <int D>
static void kvt_attn(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    const ggml_tensor *q = dst->src[0], *k = dst->src[1], *v = dst->src[2], *mask = dst->src[3], *sinks = dst->src[4];

    kvt_attn_args a = {};
    a.q             = (const char *) q->data;
    a.k             = (const char *) k->data;
    a.v             = (const char *) v->data;
    a.mask          = mask ? (const char *) mask->data : nullptr;
    a.sinks         = sinks ? (const float *) sinks->data : nullptr;
    a.type_k        = k->type;
    a.type_v        = v->type;
    a.gqa           = q->ne[2] / k->ne[2];
    a.n_q           = q->ne[1];
    a.n_kv          = k->ne[1];
    a.n_seq_mask    = mask ? mask->ne[3] : 1;
    for (int i = 0; i < 3; i++) {
        a.nb_q[i] = q->nb[i + 1];
        a.nb_k[i] = k->nb[i + 1];
        a.nb_v[i] = v->nb[i + 1];
    }
    for (int i = 0; mask && i < 2; i++) {
        a.nb_mask[i] = mask->nb[1 + 2 * i];
    }
    a.params = kvt_attn_params_of(dst);

    // as many splits as run at once, of no less than a step of all warps each
    const int n_part  = (a.gqa * a.n_q + KVT_ATTN_COLS - 1) / KVT_ATTN_COLS;
    const int n_other = k->ne[2] * n_part * q->ne[3];
    const int step    = KVT_ATTN_WARPS * KVT_ATTN_TOKENS;
    int       n_block = 1;
    CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&n_block, k_kvt_attn<D>, KVT_ATTN_BLOCK, 0));
    const int n_room = std::max(1, n_block * ggml_cuda_info().devices[ctx.device].nsm / n_other);
    const int n_step = (a.n_kv + step - 1) / step;
    a.split          = n_step <= 2 ? a.n_kv : (n_step + n_room - 1) / n_room * step;
    a.n_split        = (a.n_kv + a.split - 1) / a.split;

    ggml_cuda_pool_alloc<float>  parts(ctx.pool());
    ggml_cuda_pool_alloc<float2> meta(ctx.pool());
    a.out = (float *) dst->data;
    if (a.n_split > 1) {
        a.out  = parts.alloc(a.n_split * ggml_nelements(dst));
        a.meta = meta.alloc(a.n_split * ggml_nrows(dst));
    }
    k_kvt_attn<D><<<dim3(a.n_split, k->ne[2] * n_part, q->ne[3]), KVT_ATTN_BLOCK, 0, ctx.stream()>>>(a);
    CUDA_CHECK(cudaGetLastError());
    if (a.n_split > 1) {
        const ggml_cuda_kernel_launch_params params(dim3(a.n_q, q->ne[2], q->ne[3]), dim3(D), a.n_split * sizeof(float2), ctx.stream());
        ggml_cuda_kernel_launch(flash_attn_combine_results<D>, params, parts.ptr, meta.ptr, (float *) dst->data, a.n_split);
        CUDA_CHECK(cudaGetLastError());
    }
}

bool kvt_cuda_attn(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    if (!kvt_attn_takes(dst)) {
        return false;
    }
    switch (dst->src[0]->ne[0]) {
        case 64: kvt_attn<64>(ctx, dst); break;
        case 128: kvt_attn<128>(ctx, dst); break;
        case 256: kvt_attn<256>(ctx, dst); break;
    }
    return true;
}

bool kvt_cuda_reads_pair(int64_t head_dim_k, int64_t head_dim_v, ggml_type type_k, ggml_type type_v) {
    if (type_k == type_v && !ggml_is_quantized(type_k)) {
        return true;
    }
    return head_dim_k == head_dim_v && kvt_attn_head_dim(head_dim_k) && kvt_attn_reads_k(type_k) && kvt_attn_reads_v(type_v);
}
