// kvt-vectors.cpp - mean, scale and basis of each layer's K: read from metadata, and what may be in them
#include "kvt-vectors.h"

#include "llama-impl.h"
#include "llama-hparams.h"
#include "llama-model-loader.h"

#include "gguf.h"

#include <algorithm>
#include <cinttypes>
#include <cmath>
#include <cstring>
#include <type_traits>

// what is beyond is no calibration's. kvectors.py has the same bounds
static const float  KVT_MEAN_MAX        = 65504.0f; // K is measured in f16
static const float  KVT_SCALE_MIN       = 1e-4f;
static const float  KVT_SCALE_MAX       = 1e4f;
static const float  KVT_BASIS_SCALE_MIN = 1e-6f;
static const float  KVT_BASIS_SCALE_MAX = 1e6f;
static const double KVT_BASIS_PIVOT_MIN = 1e-3; // of whole numbers up to 127
static const float  KVT_SCALE_SPREAD    = 1.001e6f; // largest over smallest in a head; a calibration stays 1e3 to either side, but for rounding

std::string kvt_k_vectors_fault(const kvt_k_vectors & vectors, const llama_hparams & hparams, uint32_t il) {
    const size_t n_have = hparams.has_kv(il) ? hparams.n_embd_k_gqa(il) : 0;

    for (const auto * v : { &vectors.mean, &vectors.scale }) {
        const char * side = v == &vectors.mean ? "mean" : "scale";
        if (!v->empty() && v->size() != n_have) {
            return format("layer %u: %s of K has %zu values, the layer's K has %zu", il, side, v->size(), n_have);
        }
        for (size_t i = 0; i < v->size(); i++) {
            const float x = (*v)[i];
            if (!std::isfinite(x)) {
                return format("layer %u: %s of K in channel %zu is %f, need a finite number", il, side, i, x);
            }
            if (v == &vectors.mean && std::fabs(x) > KVT_MEAN_MAX) {
                return format("layer %u: mean of K in channel %zu is %g, need %g to %g", il, i, x, -KVT_MEAN_MAX, KVT_MEAN_MAX);
            }
            if (v == &vectors.scale && !(x >= KVT_SCALE_MIN && x <= KVT_SCALE_MAX)) {
                return format("layer %u: scale of K in channel %zu is %g, need %g to %g", il, i, x, KVT_SCALE_MIN, KVT_SCALE_MAX);
            }
        }
    }
    const auto & scale      = vectors.scale;
    const size_t n_head_dim = hparams.n_embd_head_k(il); // 0 in a file without head counts
    for (size_t i = 0; n_head_dim > 0 && i + n_head_dim <= scale.size(); i += n_head_dim) {
        const auto [low, high] = std::minmax_element(scale.begin() + i, scale.begin() + i + n_head_dim);
        if (*high > *low * KVT_SCALE_SPREAD) {
            return format("layer %u: scale of K in head %zu is %g to %g, need a factor of 1e6 at most", il, i / n_head_dim, *low, *high);
        }
    }
    return "";
}

// the inverse of a[n][n] by Gauss and Jordan with partial pivoting, to inv; false if it is next to singular
static bool kvt_invert(std::vector<double> a, size_t n, double * inv) {
    for (size_t i = 0; i < n * n; i++) {
        inv[i] = i % (n + 1) == 0;
    }
    for (size_t c = 0; c < n; c++) {
        size_t p = c;
        for (size_t r = c + 1; r < n; r++) {
            p = std::fabs(a[r * n + c]) > std::fabs(a[p * n + c]) ? r : p;
        }
        if (!(std::fabs(a[p * n + c]) > KVT_BASIS_PIVOT_MIN)) {
            return false;
        }
        for (size_t j = 0; j < n; j++) {
            std::swap(a[c * n + j], a[p * n + j]);
            std::swap(inv[c * n + j], inv[p * n + j]);
        }
        const double f = 1.0 / a[c * n + c];
        for (size_t j = 0; j < n; j++) {
            a[c * n + j] *= f;
            inv[c * n + j] *= f;
        }
        for (size_t r = 0; r < n; r++) {
            const double g = a[r * n + c];
            for (size_t j = 0; r != c && j < n; j++) {
                a[r * n + j] -= g * a[c * n + j];
                inv[r * n + j] -= g * inv[c * n + j];
            }
        }
    }
    return true;
}

std::string kvt_k_basis_set(kvt_k_vectors & vectors, std::vector<int8_t> rows, std::vector<float> row_scale, const llama_hparams & hparams, uint32_t il) {
    const size_t n_have = hparams.has_kv(il) ? hparams.n_embd_k_gqa(il) : 0;
    const size_t n      = hparams.n_embd_head_k(il);
    if (row_scale.size() != n_have || rows.size() != n_have * n || n_have == 0) {
        return format("layer %u: basis of K has %zu values and %zu scales, need %zu and %zu", il, rows.size(), row_scale.size(), n_have * n, n_have);
    }
    for (size_t i = 0; i < n_have; i++) {
        if (!(row_scale[i] >= KVT_BASIS_SCALE_MIN && row_scale[i] <= KVT_BASIS_SCALE_MAX)) {
            return format("layer %u: scale of row %zu of K's basis is %g, need %g to %g", il, i, row_scale[i], KVT_BASIS_SCALE_MIN, KVT_BASIS_SCALE_MAX);
        }
    }
    auto basis = std::make_shared<kvt_k_basis>();
    basis->of_k.resize(rows.size());
    basis->of_q.resize(rows.size());
    std::vector<double> a(n * n), inv(n * n); // of the numbers as they are stored: the scales of rows and columns invert by themselves
    for (size_t h = 0; h < n_have / n; h++) {
        a.assign(rows.begin() + h * n * n, rows.begin() + (h + 1) * n * n);
        if (!kvt_invert(a, n, inv.data())) {
            return format("layer %u: basis of K in head %zu is singular", il, h);
        }
        for (size_t r = 0; r < n; r++) {
            for (size_t c = 0; c < n; c++) {
                const double f = row_scale[h * n + r] / (vectors.scale.empty() ? 1.0 : (double) vectors.scale[h * n + c]);

                basis->of_k[(h * n + r) * n + c] = (float) (a[r * n + c] * f);
                basis->of_q[(h * n + r) * n + c] = (float) (inv[c * n + r] / f);
            }
        }
    }
    basis->rows      = std::move(rows);
    basis->row_scale = std::move(row_scale);
    vectors.basis    = std::move(basis);
    return "";
}

// the array of one key, cut into layers by KEY.n_values. false, with a note, if it cannot be used; true if there is none
template <typename T>
static bool kvt_read_vectors(const gguf_context * gguf, const std::string & key, uint32_t n_layer, std::vector<std::vector<T>> & layers, std::vector<std::string> & notes) {
    const gguf_type type = std::is_same_v<T, float> ? GGUF_TYPE_FLOAT32 : GGUF_TYPE_INT8;

    layers.assign(n_layer, {});

    const std::string key_n = key + ".n_values";

    const int64_t kid   = gguf_find_key(gguf, key.c_str());
    const int64_t kid_n = gguf_find_key(gguf, key_n.c_str());
    if (kid < 0 && kid_n < 0) {
        return true;
    }
    if (kid < 0 || kid_n < 0) {
        notes.push_back(format("%s is missing", kid < 0 ? key.c_str() : key_n.c_str()));
        return false;
    }
    const auto arr_type = [&](int64_t id) {
        return gguf_get_kv_type(gguf, id) == GGUF_TYPE_ARRAY ? gguf_get_arr_type(gguf, id) : GGUF_TYPE_COUNT;
    };
    if (arr_type(kid) != type) {
        notes.push_back(format("%s is not an array of %s", key.c_str(), gguf_type_name(type)));
        return false;
    }
    if (arr_type(kid_n) != GGUF_TYPE_UINT32) {
        notes.push_back(format("%s is not an array of u32", key_n.c_str()));
        return false;
    }
    if (gguf_get_arr_n(gguf, kid_n) != n_layer) {
        notes.push_back(format("%s has %zu entries, the model has %u layers", key_n.c_str(), gguf_get_arr_n(gguf, kid_n), n_layer));
        return false;
    }

    std::vector<uint32_t> n_values(n_layer);
    memcpy(n_values.data(), gguf_get_arr_data(gguf, kid_n), n_layer * sizeof(uint32_t));

    uint64_t sum = 0;
    for (const uint32_t n : n_values) {
        sum += n;
    }
    if (sum != gguf_get_arr_n(gguf, kid)) {
        notes.push_back(format("%s has %zu values, %s adds up to %" PRIu64, key.c_str(), gguf_get_arr_n(gguf, kid), key_n.c_str(), sum));
        return false;
    }

    const char * data = (const char *) gguf_get_arr_data(gguf, kid);
    for (uint32_t il = 0; il < n_layer; il++) {
        layers[il].resize(n_values[il]);
        if (n_values[il] > 0) { // an empty vector's memory is null
            memcpy(layers[il].data(), data, n_values[il] * sizeof(T));
        }
        data += n_values[il] * sizeof(T);
    }
    return true;
}

void kvt_k_vectors_read(const gguf_context * gguf, const llama_hparams & hparams, std::vector<kvt_k_vectors> & vectors, std::vector<std::string> & notes) {
    const uint32_t n_layer = hparams.n_layer_all;

    std::vector<std::vector<float>>  mean;
    std::vector<std::vector<float>>  scale;
    std::vector<std::vector<int8_t>> basis;
    std::vector<std::vector<float>>  basis_scale;

    bool ok = kvt_read_vectors(gguf, "kvtuner.k_mean", n_layer, mean, notes) &&
              kvt_read_vectors(gguf, "kvtuner.k_scale", n_layer, scale, notes) &&
              kvt_read_vectors(gguf, "kvtuner.k_basis", n_layer, basis, notes) &&
              kvt_read_vectors(gguf, "kvtuner.k_basis_scale", n_layer, basis_scale, notes);

    std::vector<kvt_k_vectors> read(n_layer);
    for (uint32_t il = 0; ok && il < n_layer; il++) {
        read[il] = { std::move(mean[il]), std::move(scale[il]), nullptr };

        std::string fault = kvt_k_vectors_fault(read[il], hparams, il);
        if (fault.empty() && !(basis[il].empty() && basis_scale[il].empty())) {
            fault = kvt_k_basis_set(read[il], std::move(basis[il]), std::move(basis_scale[il]), hparams, il);
        }
        if (!fault.empty()) {
            notes.push_back(fault);
            ok = false;
        }
    }
    if (!ok) {
        notes.back() += ": K is not conditioned. Calibrate again";
        return;
    }
    vectors = std::move(read);
}

bool kvt_k_vectors_override(const std::string & key, const llama_model_kv_override & o, std::vector<kvt_k_vectors> & vectors, std::vector<std::string> & notes) {
    const bool is_mean = key == "kvtuner.k_mean", is_basis = key == "kvtuner.k_basis";
    if (!is_mean && !is_basis && key != "kvtuner.k_scale") {
        return false;
    }
    if (o.tag != LLAMA_KV_OVERRIDE_TYPE_BOOL) {
        notes.push_back(format("override %s is not a bool: it is ignored", key.c_str()));
        return true;
    }
    for (auto & layer : vectors) {
        if (!o.val_bool && is_basis) {
            layer.basis = nullptr;
        } else if (!o.val_bool) {
            (is_mean ? layer.mean : layer.scale).clear();
        }
    }
    return true;
}
