// kvt-names.h - cache types, and caches, by their names (C++, inside libllama only)
#pragma once

#include "ggml.h"

#include <cstdint>
#include <string>
#include <vector>

// no type was planned for this layer and side; no such type
static const ggml_type KVT_TYPE_NONE = GGML_TYPE_COUNT;

// the types that a plan may hold, from the most to the least precise; KVT_TYPE_NONE past the end
ggml_type kvt_type_at(int32_t i);

// KVT_TYPE_NONE if the name is not one of a cache type
ggml_type kvt_type_from_name(const char * name);

// the layer in the name of the cache that a view looks at ("cache_k_l7"); -1 if it looks at none
int32_t kvt_cache_layer(const ggml_tensor * t);

// names of the types that a cache holds, for a log line: "q8_0", or "q8_0 + q4_0"
std::string kvt_type_names(const std::vector<ggml_type> & types);

// of a side of layers, each a struct with the tensor at `side`; none: of a layer without one
template <typename L>
std::string kvt_type_names(const std::vector<L> & layers, ggml_tensor * L::* side, ggml_type none) {
    std::vector<ggml_type> types;
    for (const L & layer : layers) {
        types.push_back(layer.*side ? (layer.*side)->type : none);
    }
    return kvt_type_names(types);
}
