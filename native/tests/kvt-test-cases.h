// Cases for upstream's test-backend-ops: every pair of a plan, in decode and in a prompt.
#pragma once

#include "kvt-quants.h"

template <typename test, typename cases>
static void kvt_flash_attn_cases(cases & list) {
    static const ggml_type types[] = { KVT_CACHE_TYPES(KVT_CACHE_TYPE_ITEM) };
    for (int hs : { 64, 80, 96, 128, 256 }) {
        for (ggml_type type_k : types) {
            for (ggml_type type_v : types) {
                for (int n_q : { 1, 19 }) {
                    list.emplace_back(new test(hs, hs, 2, {4, 1}, 113, n_q, true, false, 0, 0, GGML_PREC_F32, type_k, type_v));
                }
            }
        }
    }
}
