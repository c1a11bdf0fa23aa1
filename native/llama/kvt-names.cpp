// kvt-names.cpp - cache types by their names
#include "kvt-names.h"
#include "kvt-quants.h"

#include <cstdio>
#include <cstring>

static const ggml_type kvt_cache_types[] = { KVT_CACHE_TYPES(KVT_GGML_ITEM, KVT_TYPE_ITEM) };

static const int32_t KVT_N_TYPES = sizeof(kvt_cache_types) / sizeof(kvt_cache_types[0]);

ggml_type kvt_type_at(int32_t i) {
    return i >= 0 && i < KVT_N_TYPES ? kvt_cache_types[i] : KVT_TYPE_NONE;
}

ggml_type kvt_type_from_name(const char * name) {
    for (const ggml_type type : kvt_cache_types) {
        if (strcmp(name, ggml_type_name(type)) == 0) {
            return type;
        }
    }
    return KVT_TYPE_NONE;
}

int32_t kvt_cache_layer(const ggml_tensor * t) {
    while (t->view_src) {
        t = t->view_src;
    }
    const char * pos = strncmp(t->name, "cache_", 6) == 0 ? strstr(t->name, "_l") : nullptr;
    int32_t      il  = -1;
    return pos && sscanf(pos, "_l%d", &il) == 1 ? il : -1;
}

std::string kvt_type_names(const std::vector<ggml_type> & types) {
    std::string res;
    for (size_t i = 0; i < types.size(); i++) {
        bool seen = false;
        for (size_t j = 0; j < i; j++) {
            seen = seen || types[j] == types[i];
        }
        if (!seen) {
            res += (res.empty() ? "" : " + ") + std::string(ggml_type_name(types[i]));
        }
    }
    return res;
}
