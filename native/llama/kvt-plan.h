// kvt-plan.h - the plan of a model: K and V types of each layer, and how its K is conditioned (C++, inside libllama only)
#pragma once

#include "kvt-names.h"
#include "kvt-vectors.h"

#include "llama.h"

#include <memory>
#include <string>
#include <vector>

struct llama_model;
struct llama_model_loader;

// read-only once it hangs on a model, so that contexts and the model may share it
struct kvt_plan {
    const char * source = "none"; // "file", "environment", "override", "api", "none"

    std::vector<ggml_type>     type_k; // [n_layer], empty if no plan is in force
    std::vector<ggml_type>     type_v;
    std::vector<kvt_k_vectors> k_vectors; // [n_layer], empty if no layer's K is conditioned
    std::vector<std::string>   notes; // what was wrong with the metadata

    std::string weights; // names the model's tensors, whatever the plan

    bool in_force() const { return !type_k.empty(); }
};

// no types, and what does not depend on them
std::shared_ptr<kvt_plan> kvt_plan_empty(std::string weights);

// read the plan of a model from its metadata and the overrides; never fails: a fault is a note, a warning, and f16
void kvt_plan_load(llama_model & model, const llama_model_loader & ml);

// a note where the plan was made on other weights
void kvt_plan_compare_weights(kvt_plan & plan, const char * hash);

// flash attention "auto" becomes "on" where the plan needs it, as stock does for a quantized V
void kvt_plan_flash_attn(const llama_model & model, llama_context_params & params);
