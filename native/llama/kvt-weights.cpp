// kvt-weights.cpp - names of a model's weights: by their shapes, which a plan keeps, and by their values, which a saved state keeps
#include "kvt-weights.h"
#include "kvt-hash.h"

#include "llama-impl.h"
#include "llama-model.h"
#include "llama-model-loader.h"

#include <algorithm>
#include <cinttypes>
#include <cstring>
#include <map>

static const int    KVT_N_SLICES    = 4; // of each tensor's bytes, evenly spread
static const size_t KVT_SLICE_BYTES = 64;

// same value as gguf_file.weights_hash: tells a plan that was copied onto other weights
std::string kvt_weights_hash(const llama_model_loader & ml) {
    std::map<std::string, const ggml_tensor *> sorted; // bytewise by name
    for (const auto & [name, w] : ml.weights_map) {
        sorted[name] = w.tensor;
    }
    uint64_t   h   = KVT_HASH_START;
    const auto add = [&](const std::string & s) { h = kvt_hash(h, s.data(), s.size()); };
    for (const auto & [name, t] : sorted) {
        add(name);
        add(std::string(1, '\0') + ggml_type_name(t->type) + std::string(1, '\0'));
        add(format("%" PRId64 ",%" PRId64 ",%" PRId64 ",%" PRId64 "\n", t->ne[0], t->ne[1], t->ne[2], t->ne[3]));
    }
    return format("%016" PRIx64, h);
}

// some bytes of a tensor; false where they cannot be read one by one
static bool kvt_read_slice(const ggml_tensor * t, size_t offset, size_t size, void * dst) {
    ggml_backend_buffer_type_t buft = ggml_backend_buffer_get_type(t->buffer);
    ggml_backend_dev_t         dev  = ggml_backend_buft_get_device(buft);
    if (ggml_backend_buft_is_host(buft) || (dev && ggml_backend_dev_type(dev) == GGML_BACKEND_DEVICE_TYPE_CPU)) {
        memcpy(dst, (const char *) t->data + offset, size); // repacked weights, too, which have no other way
        return true;
    }
    if (dev && buft == ggml_backend_dev_buffer_type(dev)) { // else split over devices
        ggml_backend_tensor_get(t, dst, offset, size);
        return true;
    }
    return false;
}

uint64_t kvt_weights_fingerprint(const llama_model & model, const std::string & hash) {
    uint64_t h = kvt_hash(KVT_HASH_START, hash.data(), hash.size());
    for (const auto & [name, t] : model.tensors_by_name) {
        const size_t n    = ggml_nbytes(t);
        const size_t size = std::min(n, KVT_SLICE_BYTES);
        char         slice[KVT_SLICE_BYTES];
        for (int i = 0; i < KVT_N_SLICES && t->buffer && t->data; i++) {
            if (kvt_read_slice(t, (n - size) / (KVT_N_SLICES - 1) * i, size, slice)) {
                h = kvt_hash(h, slice, size);
            }
        }
    }
    return h;
}
