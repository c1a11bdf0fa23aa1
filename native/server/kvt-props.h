// kvt-props.h - what llama-server's /props tells of the K/V cache: types, bytes, and where the plan was left (C++, inside llama-server only)
#pragma once

#include "kvt.h"

#include "json.h"

#include <sstream>
#include <string>

// bytes: of K, V and the vectors of K, all slots together
inline common_json kvt_props(const llama_context * ctx) {
    const llama_model * model = llama_get_model(ctx);

    common_json layers = common_json::array();
    for (int32_t il = 0; il < kvt_model_n_layer(model); il++) {
        kvt_layer_cache layer;
        if (kvt_ctx_layer(ctx, il, &layer) == 0) {
            layers.push_back({ { "layer", il }, { "type_k", layer.type_k }, { "type_v", layer.type_v }, { "bytes", layer.bytes_k + layer.bytes_v } });
        }
    }
    kvt_memory memory = {};
    kvt_ctx_memory(ctx, &memory);

    std::string text(kvt_ctx_notes(ctx, nullptr, 0) + 1, '\0');
    kvt_ctx_notes(ctx, text.data(), text.size());
    text.pop_back();
    common_json        notes = common_json::array();
    std::istringstream lines(text);
    for (std::string line; std::getline(lines, line);) {
        notes.push_back(line);
    }
    return { { "plan", kvt_model_plan_source(model) }, { "bytes", memory.cache }, { "layers", layers }, { "notes", notes } };
}
