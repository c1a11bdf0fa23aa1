// kvt-attn.cuh - attention of few queries over a cache of any K and any V type, as a GPU decodes
//
// A warp takes 32 tokens of the cache at once, for up to eight queries of one KV head: those of the query heads that share it, and of
// the new tokens. Levels become the rows of matrices in the registers where they are unpacked, each once for all queries, and tensor
// cores multiply them: K times Q gives scores by tokens and queries, V transposed times P adds to the outputs by channels and queries.
// In which order the channels stand in a matrix is free, and so each thread has four neighbours of them. The types are read at run
// time: one piece of code for each K type and for each V type, not for each pair.
//
// Registers of a matrix, as mma.m16n8k16 has them, thread 4*g + t of a warp:
// A, 16 rows: { row g, columns 2t 2t+1 }, { row g+8, the same }, { row g, columns 2t+8 2t+9 }, { row g+8, the same }
// B, 8 columns: { column g, rows 2t 2t+1 }, { column g, rows 2t+8 2t+9 };  C: { row g, columns 2t, 2t+1 }, { row g+8, the same }
//
// Host code, too, with the instructions spelled out, so that tests run it without a GPU.
#pragma once

#include "kvt-attn-params.h"
#include "kvt-blocks.cuh"

static const int KVT_ATTN_WARPS  = 4;
static const int KVT_ATTN_COLS   = 8;              // queries
static const int KVT_ATTN_TILES  = 2;              // of 16 tokens, which a warp takes at once
static const int KVT_ATTN_TOKENS = KVT_ATTN_TILES * 16;
static_assert(KVT_ATTN_TILES == 2, "loops over tiles name both");
static const int KVT_ATTN_BLOCK = 32 * KVT_ATTN_WARPS;

// less than any score, and finite: a difference of two is 0
static const float KVT_ATTN_LEAST = -1.7e38f;

struct kvt_attn_args {
    const char *  q;
    const char *  k;
    const char *  v;
    const char *  mask;  // f16, or null
    const float * sinks; // one for each head, or null
    float *       out;   // D values for each split of each query; of one split: the result
    float2 *      meta;  // the largest score and the sum of a split

    int32_t type_k, type_v;
    int32_t gqa, n_q, n_kv, n_seq_mask; // query heads of a KV head, new tokens, tokens in the cache
    int32_t n_split, split;                     // parts of the cache, and the tokens of one
    int64_t nb_q[3], nb_k[3], nb_v[3];          // bytes from token to token, head to head, sequence to sequence
    int64_t nb_mask[2];                         // new token, sequence

    kvt_attn_params params;
};

//
// instructions
//

#ifdef __CUDACC__
#define KVT_LANE_OF_WARP (threadIdx.x % 32)
#define KVT_SHUFFLE_WARP(v, lane) __shfl_sync(0xFFFFFFFF, v, lane)
#endif

KVT_FN uint32_t kvt_twice(kvt_half v) {
    return v * 0x00010001u;
}

#ifdef __CUDACC__
KVT_FN half2 kvt_half2(uint32_t v) {
    return *(half2 *) &v;
}

KVT_FN uint32_t kvt_bits(half2 v) {
    return *(uint32_t *) &v;
}

KVT_FN uint32_t kvt_sub2(uint32_t a, uint32_t b) { return kvt_bits(__hsub2(kvt_half2(a), kvt_half2(b))); }
KVT_FN uint32_t kvt_mul2(uint32_t a, uint32_t b) { return kvt_bits(__hmul2(kvt_half2(a), kvt_half2(b))); }
KVT_FN uint32_t kvt_fma2(uint32_t a, uint32_t b, uint32_t c) { return kvt_bits(__hfma2(kvt_half2(a), kvt_half2(b), kvt_half2(c))); }
KVT_FN uint32_t kvt_pack2(float lo, float hi) { return kvt_bits(__floats2half2_rn(lo, hi)); }
KVT_FN float    kvt_exp(float x) { return __expf(x); }
KVT_FN bool     kvt_any(bool x) { return __any_sync(0xFFFFFFFF, x); }
#else
KVT_FN uint32_t kvt_pack2(float lo, float hi) { return kvt_to_half(lo) | (uint32_t) kvt_to_half(hi) << 16; }
KVT_FN float    kvt_half_at(uint32_t v, int i) { return kvt_from_half(v >> 16 * i & 0xFFFF); }
KVT_FN uint32_t kvt_fma2(uint32_t a, uint32_t b, uint32_t c) {
    return kvt_pack2(kvt_half_at(a, 0) * kvt_half_at(b, 0) + kvt_half_at(c, 0), kvt_half_at(a, 1) * kvt_half_at(b, 1) + kvt_half_at(c, 1));
}
KVT_FN uint32_t kvt_sub2(uint32_t a, uint32_t b) { return kvt_fma2(a, 0x3C003C00, b ^ 0x80008000); }
KVT_FN uint32_t kvt_mul2(uint32_t a, uint32_t b) { return kvt_fma2(a, b, 0x80008000); }
KVT_FN float    kvt_exp(float x) { return expf(x); }
KVT_FN bool     kvt_any(bool x) {
    int any = x;
    for (int bit = 1; bit < 32; bit *= 2) {
        any |= KVT_SHUFFLE(any, bit);
    }
    return any;
}
#endif

// c += a*b
KVT_FN void kvt_mma(float * c, const uint32_t * a, const uint32_t * b) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 750
    for (int i = 0; i < 2; i++) {
        asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
                : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                : "r"(a[2 * i]), "r"(a[2 * i + 1]), "r"(b[i]));
    }
#elif defined(__CUDA_ARCH__) || !defined(__CUDACC__) // no such instruction: registers of the threads that have the rows and the columns
    const unsigned lane = KVT_LANE_OF_WARP, g = lane / 4, t = lane % 4;
    for (unsigned from = 0; from < 4; from++) {
        uint32_t row[4], col[2][2];
        for (int i = 0; i < 4; i++) {
            row[i] = KVT_SHUFFLE_WARP(a[i], 4 * g + from);
        }
        for (int j = 0; j < 2; j++) {
            for (int i = 0; i < 2; i++) {
                col[j][i] = KVT_SHUFFLE_WARP(b[i], 4 * (2 * t + j) + from);
            }
        }
        for (int i = 0; i < 4; i++) { // row g or g+8, column 2t or 2t+1
            for (int k = 0; k < 2; k++) {
                const uint32_t x = row[i / 2 + 2 * k], y = col[i % 2][k];
                c[i] += kvt_from_half(x & 0xFFFF) * kvt_from_half(y & 0xFFFF) + kvt_from_half(x >> 16) * kvt_from_half(y >> 16);
            }
        }
    }
#endif
}

//
// four values of a row, as two pairs of f16; i in fours of a block
//

// levels as f16, which are exact: a byte b above 0x64 is 1024 + b
KVT_FN void kvt_level_halves(uint32_t levels, uint32_t * h) {
    const uint32_t bytes = levels ^ 0x80808080;
    h[0]                 = kvt_sub2(kvt_prmt(bytes, 0x64646464, 0x4140), 0x64806480);
    h[1]                 = kvt_sub2(kvt_prmt(bytes, 0x64646464, 0x4342), 0x64806480);
}

template <ggml_type type>
constexpr bool kvt_has_min = type == GGML_TYPE_Q4_1 || type == GGML_TYPE_Q5_1;

template <ggml_type type> struct kvt_reader {
    typedef kvt_codec<type> codec;
    static constexpr int    n       = codec::n;
    static constexpr bool   has_min = kvt_has_min<type>;

    KVT_FN const typename codec::block_t & block(const char * row, unsigned ib) { return ((const typename codec::block_t *) row)[ib]; }

    // values
    KVT_FN void values(const char * row, unsigned ib, unsigned i, uint32_t * h) {
        const auto &   x = block(row, ib);
        const uint32_t d = kvt_twice(KVT_HALF_OF(x.d));
        kvt_level_halves(codec::levels(x, i), h);
        for (int l = 0; l < 2; l++) {
            if constexpr (has_min) {
                h[l] = kvt_fma2(h[l], d, kvt_twice(x.m));
            } else {
                h[l] = kvt_mul2(h[l], d);
            }
        }
    }

    // values divided by scale
    KVT_FN void halves(const char * row, unsigned ib, unsigned i, uint32_t * h) {
        if constexpr (has_min) {
            values(row, ib, i, h);
        } else {
            kvt_level_halves(codec::levels(block(row, ib), i), h);
        }
    }

    KVT_FN float scale(const char * row, unsigned ib) {
        return has_min ? 1.0f : kvt_from_half(KVT_HALF_OF(block(row, ib).d));
    }
};

template <> struct kvt_reader<GGML_TYPE_F16> {
    static constexpr int n = 64;

    KVT_FN void values(const char * row, unsigned ib, unsigned i, uint32_t * h) {
        const uint32_t * x = (const uint32_t *) row + (ib * n + 4 * i) / 2;
        h[0]               = x[0];
        h[1]               = x[1];
    }

    KVT_FN void  halves(const char * row, unsigned ib, unsigned i, uint32_t * h) { values(row, ib, i, h); }
    KVT_FN float scale(const char *, unsigned) { return 1.0f; }
};

constexpr __host__ __device__ bool kvt_attn_reads_k(ggml_type type) {
#define KVT_ATTN_IS(NAME, ...) || (type == GGML_TYPE_##NAME && kvt_reader<GGML_TYPE_##NAME>::n > 0)
    return false KVT_CACHE_TYPES(KVT_ATTN_IS, KVT_ATTN_IS);
}

constexpr __host__ __device__ bool kvt_attn_reads_v(ggml_type type) {
#define KVT_ATTN_IS_GROUP(NAME) && type != GGML_TYPE_##NAME
    return kvt_attn_reads_k(type) KVT_GROUP_TYPES(KVT_ATTN_IS_GROUP);
}

//
// the two products, of a warp's tokens
//

// s: tokens by queries; k: the row of token g, nb bytes before the next. Tiles are a loop: both at once would spill registers
template <int D, ggml_type type>
KVT_FN void kvt_attn_scores(const char * k, int64_t nb, const uint32_t (*q)[2], float (*s)[4]) {
    typedef kvt_reader<type> R;
    const unsigned           t = KVT_LANE_OF_WARP % 4;
#pragma unroll 1
    for (int tile = 0; tile < KVT_ATTN_TILES; tile++) {
        const char * row[2] = { k, k + 8 * nb };
        float        sum[4] = { 0.0f, 0.0f, 0.0f, 0.0f };
#pragma unroll
        for (int b = 0; b < D / R::n; b++) {
            float c[4] = { 0.0f, 0.0f, 0.0f, 0.0f };
#pragma unroll
            for (int j = 0; j < R::n / 16; j++) {
                uint32_t h[2][2];
                R::halves(row[0], b, 4 * j + t, h[0]);
                R::halves(row[1], b, 4 * j + t, h[1]);
                const uint32_t a[4] = { h[0][0], h[1][0], h[0][1], h[1][1] };
                kvt_mma(c, a, q[b * (R::n / 16) + j]);
            }
            for (int j = 0; j < 4; j++) {
                sum[j] += c[j] * R::scale(row[j / 2], b);
            }
        }
        for (int j = 0; j < 4; j++) { // by constant places of s, which stay in registers
            s[0][j] = tile == 0 ? sum[j] : s[0][j];
            s[1][j] = sum[j];
        }
        k += 16 * nb;
    }
}

// o[i][j]: channels 32*i + 4*g + 2*j and the next, by queries; v: the row of token 2t, nb bytes before the next
template <int D, ggml_type type>
KVT_FN void kvt_attn_values(const char * v, int64_t nb, const uint32_t (*p)[2], float (*o)[2][4]) {
    typedef kvt_reader<type> R;
    const unsigned           g = KVT_LANE_OF_WARP / 4;
#pragma unroll 1
    for (int tile = 0; tile < KVT_ATTN_TILES; tile++) {
        const uint32_t b[2]   = { tile == 0 ? p[0][0] : p[1][0], tile == 0 ? p[0][1] : p[1][1] };
        const char *   row[4] = { v, v + nb, v + 8 * nb, v + 9 * nb };
#pragma unroll
        for (int i = 0; i < D / 32; i++) {
            uint32_t h[4][2];
#pragma unroll
            for (int j = 0; j < 4; j++) {
                R::values(row[j], 32 * i / R::n, 32 * i % R::n / 4 + g, h[j]);
            }
#pragma unroll
            for (int j = 0; j < 2; j++) {
                const uint32_t a[4] = {
                    kvt_prmt(h[0][j], h[1][j], 0x5410),
                    kvt_prmt(h[0][j], h[1][j], 0x7632),
                    kvt_prmt(h[2][j], h[3][j], 0x5410),
                    kvt_prmt(h[2][j], h[3][j], 0x7632),
                };
                kvt_mma(o[i][j], a, b);
            }
        }
        v += 16 * nb;
    }
}

// the type is known at run time
template <int D>
KVT_FN void kvt_attn_scores_of(int type, const char * k, int64_t nb, const uint32_t (*q)[2], float (*s)[4]) {
    switch (type) {
#define KVT_ATTN_SCORES(NAME, ...) \
        case GGML_TYPE_##NAME: \
            if constexpr (kvt_attn_reads_k(GGML_TYPE_##NAME)) { \
                kvt_attn_scores<D, GGML_TYPE_##NAME>(k, nb, q, s); \
            } \
            break;
        KVT_CACHE_TYPES(KVT_ATTN_SCORES, KVT_ATTN_SCORES)
        default: break;
    }
}

template <int D>
KVT_FN void kvt_attn_values_of(int type, const char * v, int64_t nb, const uint32_t (*p)[2], float (*o)[2][4]) {
    switch (type) {
#define KVT_ATTN_VALUES(NAME, ...) \
        case GGML_TYPE_##NAME: \
            if constexpr (kvt_attn_reads_v(GGML_TYPE_##NAME)) { \
                kvt_attn_values<D, GGML_TYPE_##NAME>(v, nb, p, o); \
            } \
            break;
        KVT_CACHE_TYPES(KVT_ATTN_VALUES, KVT_ATTN_VALUES)
        default: break;
    }
}

//
// the kernel. Grid: splits; KV heads, times eights of queries; sequences
//

// a query: new tokens after one another, each with the heads of a KV head
struct kvt_attn_query {
    int  head, token;
    bool is; // else it is one too many

    KVT_FN kvt_attn_query of(const kvt_attn_args & a, int kv_head, int i) {
        return { kv_head * a.gqa + i % a.gqa, i / a.gqa, i < a.gqa * a.n_q };
    }
};

template <int D>
static __global__ void __launch_bounds__(KVT_ATTN_BLOCK, D > 128 ? 2 : 3) k_kvt_attn(const kvt_attn_args a) {
    constexpr int n_col = KVT_ATTN_COLS, n_tile = KVT_ATTN_TILES;
    const int     lane = KVT_LANE_OF_WARP, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const int     n_part  = (a.gqa * a.n_q + n_col - 1) / n_col;
    const int     kv_head = blockIdx.y / n_part;
    const int     query0  = blockIdx.y % n_part * n_col;
    const int     seq     = blockIdx.z;
    const int     first   = blockIdx.x * a.split;
    const int     end     = first + a.split < a.n_kv ? first + a.split : a.n_kv;
    const char *  k       = a.k + kv_head * a.nb_k[1] + seq * a.nb_k[2];
    const char *  v       = a.v + kv_head * a.nb_v[1] + seq * a.nb_v[2];

    // column g
    uint32_t q[D / 16][2];
    {
        const kvt_attn_query query = kvt_attn_query::of(a, kv_head, query0 + g);
        const float *        x     = (const float *) (a.q + (query.is ? query.token * a.nb_q[0] + query.head * a.nb_q[1] : 0) + seq * a.nb_q[2]);
        const float          scale = query.is ? a.params.scale : 0.0f;
#pragma unroll
        for (int i = 0; i < D / 16; i++) {
            const float * y = x + 16 * i + 4 * t;
            q[i][0]         = kvt_pack2(scale * y[0], scale * y[1]);
            q[i][1]         = kvt_pack2(scale * y[2], scale * y[3]);
        }
    }

    // columns 2t and 2t+1
    const char * mask[2];
    float        slope[2], max[2], sum[2] = { 0.0f, 0.0f };
#pragma unroll
    for (int j = 0; j < 2; j++) {
        const kvt_attn_query query = kvt_attn_query::of(a, kv_head, query0 + 2 * t + j);
        mask[j]                    = a.mask + (query.is ? query.token : 0) * a.nb_mask[0] + seq % a.n_seq_mask * a.nb_mask[1];
        slope[j]                   = kvt_attn_slope(a.params, query.head);
        max[j]                     = KVT_ATTN_LEAST;
    }

    float o[D / 32][2][4] = {};

    for (int token0 = first + warp * KVT_ATTN_TOKENS; token0 < end; token0 += KVT_ATTN_WARPS * KVT_ATTN_TOKENS) {
        const int start = token0 < a.n_kv - KVT_ATTN_TOKENS ? token0 : a.n_kv - KVT_ATTN_TOKENS; // all of a tile is there
        float     bias[n_tile][4];
        bool      seen = false;
#pragma unroll
        for (int i = 0; i < n_tile; i++) {
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const int token = start + 16 * i + 8 * (j / 2) + g;
                bias[i][j]      = a.mask ? slope[j % 2] * kvt_from_half(((const kvt_half *) mask[j % 2])[token]) : 0.0f;
                bias[i][j]      = token >= token0 && token < end ? bias[i][j] : -INFINITY;
                seen            = seen || bias[i][j] > -INFINITY;
            }
        }
        if (!kvt_any(seen)) {
            continue;
        }

        float s[n_tile][4];
        kvt_attn_scores_of<D>(a.type_k, k + (start + g) * a.nb_k[0], a.nb_k[0], q, s);

        float most[2] = { max[0], max[1] };
#pragma unroll
        for (int i = 0; i < n_tile; i++) {
#pragma unroll
            for (int j = 0; j < 4; j++) {
                if (a.params.softcap != 0.0f) {
                    s[i][j] = a.params.softcap * tanhf(s[i][j]);
                }
                s[i][j] += bias[i][j];
                most[j % 2] = fmaxf(most[j % 2], s[i][j]);
            }
        }
#pragma unroll
        for (int j = 0; j < 2; j++) {
#pragma unroll
            for (int bit = 4; bit < 32; bit *= 2) {
                const float other = KVT_SHUFFLE(most[j], bit);
                most[j]           = fmaxf(most[j], other);
            }
        }
        if (kvt_any(most[0] > max[0] || most[1] > max[1])) {
            const float keep[2] = { kvt_exp(max[0] - most[0]), kvt_exp(max[1] - most[1]) };
#pragma unroll
            for (int i = 0; i < D / 32; i++) {
#pragma unroll
                for (int j = 0; j < 8; j++) {
                    o[i][j / 4][j % 4] *= keep[j % 2];
                }
            }
            for (int j = 0; j < 2; j++) {
                sum[j] *= keep[j];
                max[j] = most[j];
            }
        }

        // from tokens by queries to queries by tokens: those of column g, which two threads of a row have
        uint32_t p[n_tile][2];
#pragma unroll
        for (int i = 0; i < n_tile; i++) {
#pragma unroll
            for (int j = 0; j < 4; j++) {
                s[i][j] = kvt_exp(s[i][j] - max[j % 2]);
                sum[j % 2] += s[i][j];
            }
#pragma unroll
            for (int j = 0; j < 2; j++) {
                const uint32_t own  = kvt_pack2(s[i][2 * j], s[i][2 * j + 1]);
                const uint32_t even = KVT_SHUFFLE_WARP(own, 4 * (2 * t) + g / 2);
                const uint32_t odd  = KVT_SHUFFLE_WARP(own, 4 * (2 * t + 1) + g / 2);
                p[i][j]             = kvt_prmt(even, odd, g % 2 ? 0x7632 : 0x5410);
            }
        }

        kvt_attn_values_of<D>(a.type_v, v + (start + 2 * t) * a.nb_v[0], a.nb_v[0], p, o);
    }

    // all warps' together
    __shared__ float all_o[KVT_ATTN_WARPS][n_col][D];
    __shared__ float all_max[KVT_ATTN_WARPS][n_col], all_sum[KVT_ATTN_WARPS][n_col];
#pragma unroll
    for (int j = 0; j < 2; j++) {
#pragma unroll
        for (int bit = 4; bit < 32; bit *= 2) {
            const float other = KVT_SHUFFLE(sum[j], bit);
            sum[j] += other;
        }
        if (g == 0) {
            all_max[warp][2 * t + j] = max[j];
            all_sum[warp][2 * t + j] = sum[j];
        }
    }
#pragma unroll
    for (int i = 0; i < D / 32; i++) {
#pragma unroll
        for (int j = 0; j < 8; j++) {
            all_o[warp][2 * t + j % 2][32 * i + 4 * g + 2 * (j / 4) + j % 4 / 2] = o[i][j / 4][j % 4];
        }
    }
    __syncthreads();

    for (int i = threadIdx.x; i < n_col * D; i += KVT_ATTN_BLOCK) {
        const int            col = i / D, channel = i % D;
        const kvt_attn_query query = kvt_attn_query::of(a, kv_head, query0 + col);
        if (!query.is) {
            continue;
        }
        const bool  sinks = a.sinks && blockIdx.x == 0;
        const float sink  = sinks ? a.sinks[query.head] : KVT_ATTN_LEAST;
        float       most  = sink;
        for (int w = 0; w < KVT_ATTN_WARPS; w++) {
            most = fmaxf(most, all_max[w][col]);
        }
        float total = sinks ? kvt_exp(sink - most) : 0.0f, value = 0.0f;
        for (int w = 0; w < KVT_ATTN_WARPS; w++) {
            const float share = kvt_exp(all_max[w][col] - most);
            total += share * all_sum[w][col];
            value += share * all_o[w][col][channel];
        }
        const int64_t row = ((int64_t) seq * a.n_q + query.token) * a.params.n_head + query.head;
        if (a.n_split == 1) {
            a.out[row * D + channel] = value / total;
            continue;
        }
        a.out[(row * a.n_split + blockIdx.x) * D + channel] = value;
        if (channel == 0) {
            a.meta[row * a.n_split + blockIdx.x] = make_float2(most, total);
        }
    }
}
