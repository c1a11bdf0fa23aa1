// kvt-cuda.cuh - kernels that write a cache type, or copy it back to f32
#pragma once

#include "kvt-blocks.cuh"

#include <type_traits>

#define KVT_CUDA_BLOCK 128

// threads that write a type, in one block of the grid. A token has few blocks of codes on a ring, and each takes a long search: a warp for
// each two of them, so that they are spread over the processors
template <typename codec, typename = void>
constexpr int kvt_write_block = KVT_CUDA_BLOCK;
template <typename codec>
constexpr int kvt_write_block<codec, std::void_t<typename codec::R>> = 32;

struct kvt_dims {
    int64_t ne[4];
    int64_t nb[4];
};

// where a value lies: its row, and how far along
struct kvt_place {
    int64_t row; // bytes
    int64_t i0;  // values
};

KVT_FN kvt_place kvt_find(const kvt_dims & d, int64_t i) {
    const int64_t i1 = i / d.ne[0];
    const int64_t i2 = i1 / d.ne[1];
    const int64_t i3 = i2 / d.ne[2];
    return { (i1 % d.ne[1]) * d.nb[1] + (i2 % d.ne[2]) * d.nb[2] + i3 * d.nb[3], i % d.ne[0] };
}

// KVT_THREADS threads for a block; grid: rows, then parts of a row. Threads past its end write the last block again
template <ggml_type type, typename idx_t>
static __global__ void k_kvt_set_rows(const char * x, const char * rows, char * y, const kvt_dims src, const kvt_dims idx, const kvt_dims dst) {
    constexpr int n      = kvt_codec<type>::n;
    const int     j      = threadIdx.x % KVT_THREADS;
    const int64_t last   = src.ne[0] / n - 1;
    const int64_t ib_all = int64_t(blockIdx.y) * (kvt_write_block<kvt_codec<type>> / KVT_THREADS) + threadIdx.x / KVT_THREADS;
    const int64_t ib     = ib_all < last ? ib_all : last;

    const int64_t i1 = blockIdx.x % src.ne[1];
    const int64_t i2 = blockIdx.x / src.ne[1] % src.ne[2];
    const int64_t i3 = blockIdx.x / src.ne[1] / src.ne[2];

    const int64_t row = *(const idx_t *) (rows + i1 * idx.nb[0] + (i2 % idx.ne[1]) * idx.nb[1] + (i3 % idx.ne[2]) * idx.nb[2]);

    const float * from = (const float *) (x + i1 * src.nb[1] + i2 * src.nb[2] + i3 * src.nb[3]) + ib * n;
    char *        to   = y + row * dst.nb[1] + i2 * dst.nb[2] + i3 * dst.nb[3] + ib * sizeof(typename kvt_codec<type>::block_t);
    kvt_encode<type>(from, to, j);
}

// KVT_THREADS threads for a block; those past the end write the last block again
template <ggml_type type>
static __global__ void k_kvt_cpy_from_f32(const char * x, char * y, const kvt_dims src, const kvt_dims dst, const int64_t n_block) {
    constexpr int n      = kvt_codec<type>::n;
    const int     j      = threadIdx.x % KVT_THREADS;
    const int64_t ib_all = int64_t(blockIdx.x) * (kvt_write_block<kvt_codec<type>> / KVT_THREADS) + threadIdx.x / KVT_THREADS;
    const int64_t ib     = ib_all < n_block ? ib_all : n_block - 1;

    const kvt_place from = kvt_find(src, ib * n);
    const kvt_place to   = kvt_find(dst, ib * n);
    kvt_encode<type>((const float *) (x + from.row) + from.i0, y + to.row + to.i0 / n * sizeof(typename kvt_codec<type>::block_t), j);
}

// a thread for four values
template <ggml_type type>
static __global__ void k_kvt_cpy_to_f32(const char * x, char * y, const kvt_dims src, const kvt_dims dst, const int64_t n_four) {
    const int64_t i = int64_t(blockIdx.x) * KVT_CUDA_BLOCK + threadIdx.x;
    if (i >= n_four) {
        return;
    }
    const kvt_place from = kvt_find(src, 4 * i);
    const kvt_place to   = kvt_find(dst, 4 * i);
    kvt_dequantize4<type>(x + from.row, from.i0 / 4, (float *) (y + to.row) + to.i0);
}
