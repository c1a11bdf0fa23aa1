// kvt-set-rows.h - rows written into a cache of our types on the CPU, by blocks. Contract: GGML_OP_SET_ROWS.
#pragma once

#include "ggml.h"

#ifdef __cplusplus
extern "C" {
#endif

struct ggml_compute_params;

// Called by all threads of the op. False: nothing was done, stock's code is to run, which gives each thread whole rows: a token's K is one,
// and our codes take a search
bool kvt_set_rows_forward(const struct ggml_compute_params * params, struct ggml_tensor * dst);

#ifdef __cplusplus
}
#endif
