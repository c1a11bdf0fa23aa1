// kvt-cuda.h - what ggml-cuda asks of us: our cache types, and what it lacks of iq4_nl. Host code
#pragma once

#include "kvt-quants.h"
#include "kvt-reads-pair.h"

struct ggml_backend_cuda_context;

#if !defined(GGML_USE_HIP) && !defined(GGML_USE_MUSA)

#define KVT_CUDA_TYPES(X)  KVT_TYPES(X)
#define KVT_CUDA_IQ4_NL(X) X(IQ4_NL, iq4_nl, 20, 32, 4)

bool kvt_cuda_is_type(ggml_type type);
bool kvt_cuda_can_cpy(ggml_type src, ggml_type dst);

// false: not ours, nothing done
bool kvt_cuda_set_rows(ggml_backend_cuda_context & ctx, const ggml_tensor * src, const ggml_tensor * rows, ggml_tensor * dst);
bool kvt_cuda_cpy(ggml_backend_cuda_context & ctx, const ggml_tensor * src, ggml_tensor * dst);

// attention of few queries over a quantized cache
bool kvt_cuda_attn(ggml_backend_cuda_context & ctx, ggml_tensor * dst);

bool kvt_cuda_reads_pair(int64_t head_dim_k, int64_t head_dim_v, ggml_type type_k, ggml_type type_v);

#else // ROCm and MUSA compile the same files, and have no kernels of ours: stock there

#define KVT_CUDA_TYPES(X)
#define KVT_CUDA_IQ4_NL(X)

static inline bool kvt_cuda_is_type(ggml_type) { return false; }
static inline bool kvt_cuda_can_cpy(ggml_type, ggml_type) { return false; }
static inline bool kvt_cuda_set_rows(ggml_backend_cuda_context &, const ggml_tensor *, const ggml_tensor *, ggml_tensor *) { return false; }
static inline bool kvt_cuda_cpy(ggml_backend_cuda_context &, const ggml_tensor *, ggml_tensor *) { return false; }
static inline bool kvt_cuda_attn(ggml_backend_cuda_context &, ggml_tensor *) { return false; }
static inline bool kvt_cuda_reads_pair(int64_t, int64_t, ggml_type, ggml_type) { return true; }

#endif

// what attention reads with kernels of ours
#define KVT_CUDA_FATTN_TYPES(X) KVT_CUDA_TYPES(X) KVT_CUDA_IQ4_NL(X)
