// kvt-vectors.h - mean, scale and basis of each layer's K, as a plan holds them (C++, inside libllama only)
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

struct gguf_context;
struct llama_hparams;
struct llama_model_kv_override;
struct llama_model_loader;

// a matrix for each KV head, rows by rows: row i is row_scale[i]*rows[i]/scale. K is cached as this times (K - mean), and Q is multiplied by
// the inverse transpose
struct kvt_k_basis {
    std::vector<int8_t> rows;      // [n_head_kv][head_dim][head_dim]
    std::vector<float>  row_scale; // [n_head_kv][head_dim]

    std::vector<float> of_k; // [n_head_kv][head_dim][head_dim], the layer's scale in them
    std::vector<float> of_q;
};

// the vectors of one layer, n_embd_k_gqa values each; empty = none
struct kvt_k_vectors {
    std::vector<float> mean;
    std::vector<float> scale;

    std::shared_ptr<const kvt_k_basis> basis; // null = none

    bool empty() const { return mean.empty() && scale.empty() && !basis; }
};

// what is wrong with a layer's mean and scale ("" = nothing)
std::string kvt_k_vectors_fault(const kvt_k_vectors & vectors, const llama_hparams & hparams, uint32_t il);

// gives a layer's vectors a basis, once mean and scale are there. -> what is wrong with it ("" = nothing)
std::string kvt_k_basis_set(kvt_k_vectors & vectors, std::vector<int8_t> rows, std::vector<float> row_scale, const llama_hparams & hparams, uint32_t il);

// kvtuner.k_mean, k_scale, k_basis and k_basis_scale of the file, as [n_layer]; any fault is a note, and vectors stay as they are
void kvt_k_vectors_read(const gguf_context * gguf, const llama_hparams & hparams, std::vector<kvt_k_vectors> & vectors, std::vector<std::string> & notes);

// true if the override is one of ours (kvtuner.k_mean, kvtuner.k_scale, kvtuner.k_basis: false switches it off)
bool kvt_k_vectors_override(const std::string & key, const llama_model_kv_override & o, std::vector<kvt_k_vectors> & vectors, std::vector<std::string> & notes);
