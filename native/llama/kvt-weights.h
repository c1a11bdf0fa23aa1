// kvt-weights.h - names of a model's weights: by their shapes, which a plan keeps, and by their values, which a saved state keeps
// (C++, inside libllama only)
#pragma once

#include <cstdint>
#include <string>

struct llama_model;
struct llama_model_loader;

// names the tensors of a model by their names, types and shapes
std::string kvt_weights_hash(const llama_model_loader & ml);

// and by their values, of which it reads a few of each tensor; hash: the above
uint64_t kvt_weights_fingerprint(const llama_model & model, const std::string & hash);
