// kvt-attn.h - attention on the CPU: one loop for every pair of K and V types.
// Contract: GGML_OP_FLASH_ATTN_EXT.
#pragma once

#include "ggml.h"
#include "ggml-backend.h"

#ifdef __cplusplus
extern "C" {
#endif

struct ggml_compute_params;

// Called by all threads of the op. False: nothing was done, stock's code is to run
// (the reference was asked for, no vector unit that we know, or shapes and types we do not serve).
bool kvt_attn_forward(const struct ggml_compute_params * params, struct ggml_tensor * dst);

// bytes of params->wdata that kvt_attn_forward needs with n_threads or fewer threads
size_t kvt_attn_work_size(const struct ggml_tensor * dst, int n_threads);

// The same contract in plain C++ and double precision, one thread; dst as ggml_flash_attn_ext made it. For tests.
GGML_BACKEND_API void kvt_attn_ref(struct ggml_tensor * dst);

#ifdef __cplusplus
}
#endif
