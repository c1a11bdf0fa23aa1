// kvt-reads-pair.h - a question to a backend, through ggml_backend_reg_get_proc_address: does decoding read a cache of this pair
// as it is? If not, all of it is converted to f16 at every step. A backend without an answer reads every pair it supports
#pragma once

#include "ggml.h"

#define KVT_CUDA_READS_PAIR "kvt_cuda_reads_pair"
typedef bool (*kvt_cuda_reads_pair_t)(int64_t head_dim_k, int64_t head_dim_v, enum ggml_type type_k, enum ggml_type type_v);
