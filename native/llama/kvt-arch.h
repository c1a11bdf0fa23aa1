// kvt-arch.h - the architectures that need a rule of their own: one table (C++, inside libllama only)
// All others are served by what their hparams and their graph say.
#pragma once

#include "llama-arch.h"

enum kvt_arch_rule {
    KVT_ARCH_OWN_ATTENTION, // its attention does not go through the common builders, which rotate and condition per layer: no plan
    KVT_ARCH_KQ_BIAS,       // a bias on KQ, so that its attention is not fused: V is not quantized
    KVT_ARCH_CAPPED,        // a soft cap that its hparams do not tell of: the mean of K is left in
};

static const struct {
    llm_arch      arch;
    kvt_arch_rule rule;
} kvt_archs[] = {
    { LLM_ARCH_QWEN4EXP, KVT_ARCH_OWN_ATTENTION },
    { LLM_ARCH_MINIMAX_M3, KVT_ARCH_OWN_ATTENTION },
    { LLM_ARCH_DEEPSEEK4, KVT_ARCH_OWN_ATTENTION },
    { LLM_ARCH_DFLASH, KVT_ARCH_OWN_ATTENTION },
    { LLM_ARCH_GLM5_NEXT, KVT_ARCH_OWN_ATTENTION },
    { LLM_ARCH_HY_V4, KVT_ARCH_OWN_ATTENTION },
    { LLM_ARCH_DOTS3NOTE, KVT_ARCH_OWN_ATTENTION },
    { LLM_ARCH_T5, KVT_ARCH_KQ_BIAS },
    { LLM_ARCH_T5ENCODER, KVT_ARCH_KQ_BIAS },
    { LLM_ARCH_GROK, KVT_ARCH_CAPPED },
};

static inline bool kvt_arch_has(llm_arch arch, kvt_arch_rule rule) {
    for (const auto & row : kvt_archs) {
        if (row.arch == arch && row.rule == rule) {
            return true;
        }
    }
    return false;
}
