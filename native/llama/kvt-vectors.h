// kvt-vectors.h - the mean and the scale of each layer's K, as a plan holds them (C++, inside libllama only)
#pragma once

#include <cstdint>
#include <string>
#include <vector>

struct llama_hparams;
struct llama_model_kv_override;
struct llama_model_loader;

// the vectors of one layer, n_embd_k_gqa values each; empty = none
struct kvt_k_vectors {
    std::vector<float> mean;
    std::vector<float> scale;

    bool empty() const { return mean.empty() && scale.empty(); }
};

// what is wrong with a layer's vectors ("" = nothing)
std::string kvt_k_vectors_fault(const kvt_k_vectors & vectors, const llama_hparams & hparams, uint32_t il);

// kvtuner.k_mean and kvtuner.k_scale of the file, as [n_layer]; any fault is a note, and vectors stay as they are
void kvt_k_vectors_read(const llama_model_loader & ml, const llama_hparams & hparams, std::vector<kvt_k_vectors> & vectors, std::vector<std::string> & notes);

// true if the override is one of ours (kvtuner.k_mean, kvtuner.k_scale: false switches it off)
bool kvt_k_vectors_override(const std::string & key, const llama_model_kv_override & o, std::vector<kvt_k_vectors> & vectors, std::vector<std::string> & notes);
