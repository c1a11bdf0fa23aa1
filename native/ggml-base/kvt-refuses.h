// kvt-refuses.h - whether a device can cache a pair of K/V types and attend over it: in ggml-base, for libllama and for a host that is asked over RPC
#pragma once

#include "ggml.h"
#include "ggml-backend.h"

#include <stdint.h>

// of one layer. Sent as it is
struct kvt_pair_of_layer {
    int32_t type_k, type_v; // ggml_type
    int32_t n_head, n_head_kv, head_dim_k, head_dim_v;
    int32_t flash_attn;
    float   max_bias, logit_softcap;
};

enum kvt_refusal {
    KVT_REFUSES_NOTHING,
    KVT_REFUSES_PAIR,     // no kernel writes these types, or attends over them
    KVT_REFUSES_AS_IT_IS, // decoding would convert all of the cache at every step
    KVT_REFUSES_ALL,      // it could not be asked
};

// a backend whose devices are elsewhere has them asked there: kvt_device_refuses_t through ggml_backend_reg_get_proc_address
#define KVT_DEVICE_REFUSES "kvt_device_refuses"
typedef int32_t (*kvt_device_refuses_t)(ggml_backend_dev_t dev, const struct kvt_pair_of_layer * pair);

#ifdef __cplusplus
extern "C" {
#endif

// a kvt_refusal
GGML_API int32_t kvt_device_refuses(ggml_backend_dev_t dev, const struct kvt_pair_of_layer * pair);

#ifdef __cplusplus
}
#endif
