// kvt-cond-op.h - conditioning of K and Q in one op, for a few tokens, whose steps would each be a barrier of all threads: in ggml-cpu, for libllama.
// Contract: kvt_cond_qk of native/llama/kvt-cond.h.
#pragma once

#include "ggml.h"

// by which libllama asks the CPU's backend for it
#define KVT_COND_PROC "kvt_cond_forward"

#define KVT_COND_MAX_HEAD_DIM 1024

#ifdef __cplusplus
extern "C" {
#endif

// A ggml_custom_op_t. dst f32: Q, then K, as they are to be cached and multiplied, without gaps. Sources, f32 but for the matrices:
//   q, k     [head_dim, n_head or n_head_kv, n_tokens], values of a head beside each other
//   of_q     [head_dim, head_dim, n_head_kv], f32 or f16: multiplied by Q; or [head_dim, n_head_kv]: Q times it
//   of_k     as of_q, for K
//   mean     [head_dim, n_head_kv]: taken off K before; may be missing
void kvt_cond_forward(struct ggml_tensor * dst, int ith, int nth, void * userdata);

#ifdef __cplusplus
}
#endif
