// kvt-plan.cpp - the plan of a model: from metadata, from override keys, or set through kvt.h
#include "kvt.h"
#include "kvt-plan.h"
#include "kvt-hash.h"
#include "kvt-quants.h"

#include "llama-impl.h"
#include "llama-model.h"
#include "llama-model-loader.h"

#include "gguf.h"

#include <cinttypes>
#include <cstring>

static const uint32_t KVT_SCHEMA_VERSION = 1;

// the types that a plan may hold, from the most to the least precise
static const ggml_type kvt_cache_types_all[] = { KVT_CACHE_TYPES(KVT_CACHE_TYPE_ITEM) };

static const int32_t KVT_N_TYPES = sizeof(kvt_cache_types_all)/sizeof(kvt_cache_types_all[0]);

const char * kvt_type_name(int32_t i) {
    return i >= 0 && i < KVT_N_TYPES ? ggml_type_name(kvt_cache_types_all[i]) : nullptr;
}

ggml_type kvt_type_from_name(const char * name) {
    for (const ggml_type type : kvt_cache_types_all) {
        if (strcmp(name, ggml_type_name(type)) == 0) {
            return type;
        }
    }
    return KVT_TYPE_NONE;
}

static thread_local std::string kvt_error_text;

int32_t kvt_error(int32_t code, const std::string & text) {
    kvt_error_text = text;
    return code;
}

const char * kvt_last_error(void) {
    return kvt_error_text.c_str();
}

int32_t kvt_write_lines(const std::vector<std::string> & lines, char * buf, int32_t size) {
    std::string text;
    for (const auto & line : lines) {
        text += line + "\n";
    }
    return buf && size > 0 ? snprintf(buf, size, "%s", text.c_str()) : (int32_t) text.size();
}

const char * kvt_build_id(void) {
    return KVT_BUILD_ID;
}

std::string kvt_layer_ranges(const std::vector<uint32_t> & il) {
    std::string res;
    for (size_t i = 0; i < il.size(); ) {
        size_t j = i;
        while (j + 1 < il.size() && il[j + 1] == il[j] + 1) {
            j++;
        }
        res += (res.empty() ? "" : ",") + std::to_string(il[i]) + (j > i ? "-" + std::to_string(il[j]) : "");
        i = j + 1;
    }
    return res;
}

// a string from a file as it may be printed: short, and without control characters
static std::string kvt_printable(const char * s) {
    std::string res;
    for (size_t i = 0; s[i] && i < 40; i++) {
        res += (unsigned char) s[i] < 32 || (unsigned char) s[i] >= 127 ? '?' : s[i];
    }
    return strlen(s) > 40 ? res + "..." : res;
}

//
// metadata
//

// one side of the plan in the file. false, with a note, if it cannot be used
static bool kvt_read_side(const gguf_context * gguf, const char * key, uint32_t n_layer, std::vector<ggml_type> & types, std::vector<std::string> & notes) {
    const int64_t kid = gguf_find_key(gguf, key);
    if (kid < 0) {
        notes.push_back(format("%s is missing", key));
        return false;
    }
    if (gguf_get_kv_type(gguf, kid) != GGUF_TYPE_ARRAY || gguf_get_arr_type(gguf, kid) != GGUF_TYPE_STRING) {
        notes.push_back(format("%s is not an array of string", key));
        return false;
    }
    const size_t n = gguf_get_arr_n(gguf, kid);
    if (n != n_layer) {
        notes.push_back(format("%s has %zu entries, the model has %u layers", key, n, n_layer));
        return false;
    }

    std::map<std::string, std::vector<uint32_t>> unknown;

    types.assign(n_layer, KVT_TYPE_NONE);
    for (uint32_t il = 0; il < n_layer; il++) {
        const char * name = gguf_get_arr_str(gguf, kid, il);
        types[il] = kvt_type_from_name(name);
        if (types[il] == KVT_TYPE_NONE && name[0]) {
            unknown[kvt_printable(name)].push_back(il);
        }
    }
    for (const auto & [name, il] : unknown) {
        notes.push_back(format("%s: layers %s have the type '%s', which this build does not know: f16 there", key, kvt_layer_ranges(il).c_str(), name.c_str()));
    }
    return true;
}

// a note where the plan was made on other weights
static void kvt_compare_weights(kvt_plan & plan, const char * hash) {
    const std::string have = kvt_printable(hash);
    if (have != plan.weights) {
        plan.notes.push_back(format("the plan was calibrated on other weights (%s, this file has %s): it is used, but calibrate again", have.c_str(), plan.weights.c_str()));
    }
}

// same value as plan.checksum: over the types and vectors as they stand in the file, "" for an array that is missing
static std::string kvt_plan_checksum(const gguf_context * gguf) {
    uint32_t crc = 0;
    for (const char * key : { "kvtuner.type_k", "kvtuner.type_v" }) {
        const int64_t kid = gguf_find_key(gguf, key);
        const bool is_list = kid >= 0 && gguf_get_kv_type(gguf, kid) == GGUF_TYPE_ARRAY && gguf_get_arr_type(gguf, kid) == GGUF_TYPE_STRING;
        for (size_t i = 0; is_list && i < gguf_get_arr_n(gguf, kid); i++) {
            const char * name = gguf_get_arr_str(gguf, kid, i);
            crc = kvt_crc32(crc, name, strlen(name) + 1);
        }
    }
    for (const char * key : { "kvtuner.k_mean", "kvtuner.k_mean.n_values", "kvtuner.k_scale", "kvtuner.k_scale.n_values" }) {
        const int64_t kid = gguf_find_key(gguf, key);
        const gguf_type type = kid >= 0 && gguf_get_kv_type(gguf, kid) == GGUF_TYPE_ARRAY ? gguf_get_arr_type(gguf, kid) : GGUF_TYPE_COUNT;
        if (type == GGUF_TYPE_FLOAT32 || type == GGUF_TYPE_UINT32) {
            crc = kvt_crc32(crc, gguf_get_arr_data(gguf, kid), 4*gguf_get_arr_n(gguf, kid));
        }
    }
    return format("%08x", crc);
}

// whether the types and vectors are as they were written; a plan without a checksum is taken as it is
static bool kvt_checksum_holds(const gguf_context * gguf, std::vector<std::string> & notes) {
    const int64_t kid = gguf_find_key(gguf, "kvtuner.checksum");
    if (kid < 0) {
        return true;
    }
    const std::string want = gguf_get_kv_type(gguf, kid) == GGUF_TYPE_STRING ? kvt_printable(gguf_get_val_str(gguf, kid)) : "(not a string)";
    const std::string have = kvt_plan_checksum(gguf);
    if (have != want) {
        notes.push_back(format("kvtuner.checksum is %s, the types and vectors have %s, so they are not as they were written. Write the plan again, or calibrate: the plan is ignored", want.c_str(), have.c_str()));
    }
    return have == want;
}

// kvtuner.enabled from the overrides, else from the file
static bool kvt_enabled(const llama_model_loader & ml, std::vector<std::string> & notes) {
    const auto it = ml.kv_overrides.find("kvtuner.enabled");
    if (it != ml.kv_overrides.end()) {
        if (it->second.tag == LLAMA_KV_OVERRIDE_TYPE_BOOL) {
            return it->second.val_bool;
        }
        notes.push_back("override kvtuner.enabled is not a bool: it is ignored");
    }
    const int64_t kid = gguf_find_key(ml.metadata, "kvtuner.enabled");
    if (kid >= 0) {
        if (gguf_get_kv_type(ml.metadata, kid) == GGUF_TYPE_BOOL) {
            return gguf_get_val_bool(ml.metadata, kid);
        }
        notes.push_back("kvtuner.enabled is not a bool: it is ignored");
    }
    return true;
}

static void kvt_read_file(const llama_model_loader & ml, const llama_hparams & hparams, kvt_plan & plan) {
    const gguf_context * gguf = ml.metadata;

    const uint32_t n_layer = hparams.n_layer_all;

    if (gguf_find_key(gguf, "kvtuner.type_k") < 0 && gguf_find_key(gguf, "kvtuner.type_v") < 0) {
        return;
    }

    const int64_t kid = gguf_find_key(gguf, "kvtuner.schema_version");
    if (kid < 0 || gguf_get_kv_type(gguf, kid) != GGUF_TYPE_UINT32) {
        plan.notes.push_back("kvtuner.schema_version is missing or not a u32: the plan is ignored");
        return;
    }
    const uint32_t version = gguf_get_val_u32(gguf, kid);
    if (version != KVT_SCHEMA_VERSION) {
        plan.notes.push_back(format("kvtuner.schema_version is %u, this build reads %u: the plan is ignored", version, KVT_SCHEMA_VERSION));
        return;
    }

    std::vector<ggml_type> type_k;
    std::vector<ggml_type> type_v;

    if (!kvt_read_side(gguf, "kvtuner.type_k", n_layer, type_k, plan.notes) ||
        !kvt_read_side(gguf, "kvtuner.type_v", n_layer, type_v, plan.notes)) {
        plan.notes.back() += ": the plan is ignored";
        return;
    }

    if (!kvt_checksum_holds(gguf, plan.notes)) {
        return;
    }

    plan.source = "file";
    plan.type_k = std::move(type_k);
    plan.type_v = std::move(type_v);

    kvt_cond_read(ml, hparams, plan);

    const int64_t kid_hash = gguf_find_key(gguf, "kvtuner.calibration.weights");
    if (kid_hash >= 0 && gguf_get_kv_type(gguf, kid_hash) != GGUF_TYPE_STRING) {
        plan.notes.push_back("kvtuner.calibration.weights is not a string: the plan is used, whatever the weights");
    } else if (kid_hash >= 0) {
        kvt_compare_weights(plan, gguf_get_val_str(gguf, kid_hash));
    }
}

// "kvtuner.type_k.7" -> layer 7 of the given side; -1 for any other key
static int64_t kvt_override_layer(const std::string & key, const char * prefix) {
    const size_t n = strlen(prefix);
    if (key.compare(0, n, prefix) != 0 || key.size() == n || key.size() > n + 6 ||
        key.find_first_not_of("0123456789", n) != std::string::npos) {
        return -1;
    }
    return std::stol(key.substr(n));
}

static void kvt_read_overrides(const llama_model_loader & ml, uint32_t n_layer, kvt_plan & plan) {
    const std::map<std::string, llama_model_kv_override> sorted(ml.kv_overrides.begin(), ml.kv_overrides.end());

    for (const auto & [key, o] : sorted) {
        if (key.compare(0, 8, "kvtuner.") != 0 || key == "kvtuner.enabled") {
            continue;
        }
        if (kvt_cond_override(key, o, plan)) {
            continue;
        }
        const int64_t il_k = kvt_override_layer(key, "kvtuner.type_k.");
        const int64_t il_v = kvt_override_layer(key, "kvtuner.type_v.");
        const int64_t il   = il_k >= 0 ? il_k : il_v;

        if (il < 0 || il >= n_layer) {
            plan.notes.push_back(format("override %s: need kvtuner.enabled, kvtuner.k_mean, kvtuner.k_scale, kvtuner.type_k.N or kvtuner.type_v.N with N from 0 to %u: it is ignored", kvt_printable(key.c_str()).c_str(), n_layer - 1));
            continue;
        }
        const ggml_type type = o.tag == LLAMA_KV_OVERRIDE_TYPE_STR ? kvt_type_from_name(o.val_str) : KVT_TYPE_NONE;
        if (type == KVT_TYPE_NONE) {
            plan.notes.push_back(format("override %s: '%s' is not the name of a cache type: it is ignored", key.c_str(),
                        o.tag == LLAMA_KV_OVERRIDE_TYPE_STR ? kvt_printable(o.val_str).c_str() : "(not a string)"));
            continue;
        }
        if (!plan.in_force()) {
            plan.type_k.assign(n_layer, KVT_TYPE_NONE);
            plan.type_v.assign(n_layer, KVT_TYPE_NONE);
        }
        plan.source = "override";
        (il_k >= 0 ? plan.type_k : plan.type_v)[il] = type;
    }
}

// architectures whose attention does not go through the common builders, which rotate per layer
static bool kvt_arch_refused(llm_arch arch) {
    switch (arch) {
        case LLM_ARCH_QWEN4EXP:
        case LLM_ARCH_MINIMAX_M3:
        case LLM_ARCH_DEEPSEEK4:
        case LLM_ARCH_DFLASH:
        case LLM_ARCH_GLM5_NEXT:
        case LLM_ARCH_HY_V4:
        case LLM_ARCH_DOTS3NOTE:
            return true;
        default:
            return false;
    }
}

// no types, and what does not depend on them
static std::shared_ptr<kvt_plan> kvt_plan_empty(std::string weights) {
    auto plan = std::make_shared<kvt_plan>();
    plan->weights = std::move(weights);
    return plan;
}

void kvt_plan_load(llama_model & model, const llama_model_loader & ml) {
    auto plan = kvt_plan_empty(kvt_weights_hash(ml));

    // without its hparams a model has no layers, and no context to plan for
    if (!model.hparams.vocab_only && kvt_enabled(ml, plan->notes)) {
        kvt_read_file     (ml, model.hparams, *plan);
        kvt_read_overrides(ml, model.hparams.n_layer_all, *plan);
    }

    if (plan->in_force() && kvt_arch_refused(model.arch)) {
        plan = kvt_plan_empty(plan->weights);
        plan->notes.push_back(format("%s has attention of its own, where types per layer are not supported: the plan is ignored", llm_arch_name(model.arch)));
    }

    for (const auto & note : plan->notes) {
        LLAMA_LOG_WARN("%s: %s\n", __func__, note.c_str());
    }
    if (plan->in_force()) {
        LLAMA_LOG_INFO("%s: K/V types per layer from: %s\n", __func__, plan->source);
    }

    model.kvt = std::move(plan);
}

void kvt_plan_flash_attn(const llama_model & model, llama_context_params & params) {
    if (!model.kvt || !model.kvt->in_force() || params.flash_attn_type != LLAMA_FLASH_ATTN_TYPE_AUTO || params.type_v != GGML_TYPE_F16) {
        return;
    }
    for (const ggml_type type : model.kvt->type_v) {
        if (type != KVT_TYPE_NONE && ggml_is_quantized(type)) {
            LLAMA_LOG_INFO("%s: enabling flash_attn since the plan has a quantized V cache\n", __func__);
            params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_ENABLED;
            return;
        }
    }
}

//
// kvt.h
//

int32_t kvt_type_number(const char * name) {
    const ggml_type type = name ? kvt_type_from_name(name) : KVT_TYPE_NONE;
    return type != KVT_TYPE_NONE ? (int32_t) type : kvt_error(KVT_E_TYPE, format("'%s' is not the name of a cache type", name ? kvt_printable(name).c_str() : "(null)"));
}

int32_t kvt_model_n_layer(const llama_model * model) {
    return model ? (int32_t) model->hparams.n_layer_all : kvt_error(KVT_E_ARG, "kvt_model_n_layer: model is null");
}

static int32_t kvt_parse_side(const char * side, const char * const * names, int32_t n_layer, std::vector<ggml_type> & types) {
    types.assign(n_layer, KVT_TYPE_NONE);
    for (int32_t il = 0; il < n_layer; il++) {
        if (!names[il]) {
            return kvt_error(KVT_E_ARG, format("layer %d: the %s type is null, need a name or \"\"", il, side));
        }
        types[il] = kvt_type_from_name(names[il]);
        if (types[il] == KVT_TYPE_NONE && names[il][0]) {
            return kvt_error(KVT_E_TYPE, format("layer %d: '%s' is not the name of a cache type", il, kvt_printable(names[il]).c_str()));
        }
    }
    return 0;
}

int32_t kvt_model_set_plan(llama_model * model, const char * const * type_k, const char * const * type_v, int32_t n_layer) {
    if (!model || !type_k || !type_v) {
        return kvt_error(KVT_E_ARG, "kvt_model_set_plan: model, type_k and type_v must not be null");
    }
    if (n_layer != (int32_t) model->hparams.n_layer_all) {
        return kvt_error(KVT_E_ARG, format("plan has %d layers, the model has %u", n_layer, model->hparams.n_layer_all));
    }
    if (kvt_arch_refused(model->arch)) {
        return kvt_error(KVT_E_STATE, format("%s has attention of its own, where types per layer are not supported", llm_arch_name(model->arch)));
    }

    auto plan = kvt_plan_empty(kvt_model_weights_hash(model));
    plan->source = "api";

    int32_t err = kvt_parse_side("K", type_k, n_layer, plan->type_k);
    if (!err) {
        err = kvt_parse_side("V", type_v, n_layer, plan->type_v);
    }
    if (!err) {
        model->kvt = std::move(plan);
    }
    return err;
}

int32_t kvt_model_clear_plan(llama_model * model) {
    if (!model) {
        return kvt_error(KVT_E_ARG, "kvt_model_clear_plan: model is null");
    }
    model->kvt = kvt_plan_empty(kvt_model_weights_hash(model));
    return 0;
}

int32_t kvt_model_set_plan_weights(llama_model * model, const char * hash) {
    if (!model || !hash) {
        return kvt_error(KVT_E_ARG, "kvt_model_set_plan_weights: model and hash must not be null");
    }
    if (!model->kvt || !model->kvt->in_force()) {
        return kvt_error(KVT_E_STATE, "kvt_model_set_plan_weights: no plan is in force. Set the types first");
    }
    auto plan = std::make_shared<kvt_plan>(*model->kvt); // contexts that exist keep the old one
    kvt_compare_weights(*plan, hash);
    model->kvt = std::move(plan);
    return 0;
}

const char * kvt_model_plan_source(const llama_model * model) {
    return model && model->kvt ? model->kvt->source : "none";
}

static const char * kvt_name_or_empty(ggml_type type) {
    return type == KVT_TYPE_NONE ? "" : ggml_type_name(type);
}

int32_t kvt_model_plan_layer(const llama_model * model, int32_t il, const char ** type_k, const char ** type_v) {
    if (!model || il < 0 || il >= (int32_t) model->hparams.n_layer_all) {
        return kvt_error(KVT_E_ARG, format("kvt_model_plan_layer: model is null, or layer %d is not one of it", il));
    }
    if (!model->kvt || !model->kvt->in_force()) {
        return kvt_error(KVT_E_NONE, "no plan is in force");
    }
    if (type_k) { *type_k = kvt_name_or_empty(model->kvt->type_k[il]); }
    if (type_v) { *type_v = kvt_name_or_empty(model->kvt->type_v[il]); }
    return 0;
}

int32_t kvt_model_plan_notes(const llama_model * model, char * buf, int32_t size) {
    return kvt_write_lines(model && model->kvt ? model->kvt->notes : std::vector<std::string>(), buf, size);
}
