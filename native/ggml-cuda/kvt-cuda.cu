// kvt-cuda.cu - writes our cache types and copies them back: a new K or V, and a context shift
// Compiled without contraction and with exact division: the bytes are the CPU's.
#include "common.cuh"

#include "kvt-cuda.h"
#include "kvt-cuda.cuh"
#include "kvt-quants.h"

static kvt_dims kvt_dims_of(const ggml_tensor * t) {
    kvt_dims res;
    for (int i = 0; i < 4; i++) {
        res.ne[i] = t->ne[i];
        res.nb[i] = t->nb[i];
    }
    return res;
}

bool kvt_cuda_is_type(ggml_type type) {
    return kvt_is_type(type);
}

bool kvt_cuda_can_cpy(ggml_type src, ggml_type dst) {
    return (src == GGML_TYPE_F32 && kvt_cuda_is_type(dst)) || (dst == GGML_TYPE_F32 && (kvt_cuda_is_type(src) || src == GGML_TYPE_IQ4_NL));
}

template <ggml_type type>
static void kvt_set_rows(ggml_backend_cuda_context & ctx, const ggml_tensor * src, const ggml_tensor * rows, ggml_tensor * dst) {
    constexpr int n_thread = kvt_write_block<kvt_codec<type>>;
    const int64_t n_part   = (src->ne[0] / kvt_codec<type>::n * KVT_THREADS + n_thread - 1) / n_thread;
    const dim3    grid(ggml_nrows(src), n_part);
    if (grid.x == 0 || grid.y == 0) {
        return;
    }
    const auto kernel = rows->type == GGML_TYPE_I64 ? k_kvt_set_rows<type, int64_t> : k_kvt_set_rows<type, int32_t>;
    kernel<<<grid, n_thread, 0, ctx.stream()>>>((const char *) src->data, (const char *) rows->data, (char *) dst->data,
            kvt_dims_of(src), kvt_dims_of(rows), kvt_dims_of(dst));
}

bool kvt_cuda_set_rows(ggml_backend_cuda_context & ctx, const ggml_tensor * src, const ggml_tensor * rows, ggml_tensor * dst) {
    switch (dst->type) {
#define KVT_SET_ROWS(NAME, name, number, n, bits) \
        case GGML_TYPE_##NAME: kvt_set_rows<GGML_TYPE_##NAME>(ctx, src, rows, dst); break;
        KVT_TYPES(KVT_SET_ROWS)
        default:
            return false;
    }
    CUDA_CHECK(cudaGetLastError());
    return true;
}

template <ggml_type type>
static void kvt_cpy_from_f32(ggml_backend_cuda_context & ctx, const ggml_tensor * src, ggml_tensor * dst) {
    GGML_ASSERT(src->ne[0] % kvt_codec<type>::n == 0);
    constexpr int n_thread = kvt_write_block<kvt_codec<type>>;
    const int64_t n_block  = ggml_nelements(src) / kvt_codec<type>::n;
    const int64_t grid     = (n_block * KVT_THREADS + n_thread - 1) / n_thread;
    k_kvt_cpy_from_f32<type><<<grid, n_thread, 0, ctx.stream()>>>((const char *) src->data, (char *) dst->data,
            kvt_dims_of(src), kvt_dims_of(dst), n_block);
}

template <ggml_type type>
static void kvt_cpy_to_f32(ggml_backend_cuda_context & ctx, const ggml_tensor * src, ggml_tensor * dst) {
    GGML_ASSERT(dst->ne[0] % 4 == 0);
    const int64_t n_four = ggml_nelements(src) / 4;
    const int64_t grid   = (n_four + KVT_CUDA_BLOCK - 1) / KVT_CUDA_BLOCK;
    k_kvt_cpy_to_f32<type><<<grid, KVT_CUDA_BLOCK, 0, ctx.stream()>>>((const char *) src->data, (char *) dst->data,
            kvt_dims_of(src), kvt_dims_of(dst), n_four);
}

bool kvt_cuda_cpy(ggml_backend_cuda_context & ctx, const ggml_tensor * src, ggml_tensor * dst) {
    if (!kvt_cuda_can_cpy(src->type, dst->type)) {
        return false;
    }
    if (ggml_nelements(src) == 0) {
        return true;
    }
    switch (src->type == GGML_TYPE_F32 ? dst->type : src->type) {
#define KVT_CPY(NAME, name, number, n, bits) \
        case GGML_TYPE_##NAME: (src->type == GGML_TYPE_F32 ? kvt_cpy_from_f32<GGML_TYPE_##NAME> : kvt_cpy_to_f32<GGML_TYPE_##NAME>)(ctx, src, dst); break;
        KVT_TYPES(KVT_CPY)
        case GGML_TYPE_IQ4_NL: kvt_cpy_to_f32<GGML_TYPE_IQ4_NL>(ctx, src, dst); break;
        default: break;
    }
    CUDA_CHECK(cudaGetLastError());
    return true;
}
