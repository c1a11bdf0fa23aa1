// kvt-plan.cpp - the plan of a model, from its metadata and override keys
#include "kvt-plan.h"
#include "kvt-arch.h"
#include "kvt-hash.h"
#include "kvt-text.h"
#include "kvt-weights.h"

#include "llama-impl.h"
#include "llama-model.h"
#include "llama-model-loader.h"

#include "ggml-cpp.h"
#include "gguf.h"

#include <cstdlib>
#include <cstring>

static const uint32_t KVT_SCHEMA_VERSION = 1;

//
// from the file
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
        types[il]         = kvt_type_from_name(name);
        if (types[il] == KVT_TYPE_NONE && name[0]) {
            unknown[kvt_printable(name)].push_back(il);
        }
    }
    for (const auto & [name, il] : unknown) {
        notes.push_back(format("%s: layers %s have the type '%s', which this build does not know: f16 there", key, kvt_layer_ranges(il).c_str(), name.c_str()));
    }
    return true;
}

void kvt_plan_compare_weights(kvt_plan & plan, const char * hash) {
    const std::string have = kvt_printable(hash);
    if (have != plan.weights) {
        plan.notes.push_back(format("the plan was calibrated on other weights (%s, this file has %s): it is used, but calibrate again", have.c_str(), plan.weights.c_str()));
    }
}

// same value as plan.checksum: over the types and vectors as they stand in the file, "" for an array that is missing
static std::string kvt_plan_checksum(const gguf_context * gguf) {
    uint32_t crc = 0;
    for (const char * key : { "kvtuner.type_k", "kvtuner.type_v" }) {
        const int64_t kid     = gguf_find_key(gguf, key);
        const bool    is_list = kid >= 0 && gguf_get_kv_type(gguf, kid) == GGUF_TYPE_ARRAY && gguf_get_arr_type(gguf, kid) == GGUF_TYPE_STRING;
        for (size_t i = 0; is_list && i < gguf_get_arr_n(gguf, kid); i++) {
            const char * name = gguf_get_arr_str(gguf, kid, i);
            crc               = kvt_crc32(crc, name, strlen(name) + 1);
        }
    }
    for (const char * key : { "kvtuner.k_mean", "kvtuner.k_mean.n_values", "kvtuner.k_scale", "kvtuner.k_scale.n_values", "kvtuner.k_basis",
                 "kvtuner.k_basis.n_values", "kvtuner.k_basis_scale", "kvtuner.k_basis_scale.n_values" }) {
        const int64_t   kid  = gguf_find_key(gguf, key);
        const gguf_type type = kid >= 0 && gguf_get_kv_type(gguf, kid) == GGUF_TYPE_ARRAY ? gguf_get_arr_type(gguf, kid) : GGUF_TYPE_COUNT;
        if (type == GGUF_TYPE_FLOAT32 || type == GGUF_TYPE_UINT32 || type == GGUF_TYPE_INT8) {
            crc = kvt_crc32(crc, gguf_get_arr_data(gguf, kid), (type == GGUF_TYPE_INT8 ? 1 : 4) * gguf_get_arr_n(gguf, kid));
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

static bool kvt_holds_plan(const gguf_context * gguf) {
    return gguf_find_key(gguf, "kvtuner.type_k") >= 0 || gguf_find_key(gguf, "kvtuner.type_v") >= 0;
}

static void kvt_read_file(const gguf_context * gguf, const char * source, const llama_hparams & hparams, kvt_plan & plan) {
    const uint32_t n_layer = hparams.n_layer_all;

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

    plan.source = source;
    plan.type_k = std::move(type_k);
    plan.type_v = std::move(type_v);

    kvt_k_vectors_read(gguf, hparams, plan.k_vectors, plan.notes);

    const int64_t kid_hash = gguf_find_key(gguf, "kvtuner.calibration.weights");
    if (kid_hash >= 0 && gguf_get_kv_type(gguf, kid_hash) != GGUF_TYPE_STRING) {
        plan.notes.push_back("kvtuner.calibration.weights is not a string: the plan is used, whatever the weights");
    } else if (kid_hash >= 0) {
        kvt_plan_compare_weights(plan, gguf_get_val_str(gguf, kid_hash));
    }
}

// a plan in a GGUF of its own, which comes before the model's: programs that are no Python cannot read a sidecar
static void kvt_read_environment(const llama_hparams & hparams, kvt_plan & plan) {
    const char * path = getenv("KVTUNER_GGUF_PLAN");
    if (!path || !path[0]) {
        return;
    }
    const gguf_context_ptr gguf(gguf_init_from_file(path, { /*.no_alloc =*/true, /*.ctx =*/nullptr }));
    if (!gguf || !kvt_holds_plan(gguf.get())) {
        plan.notes.push_back(format("KVTUNER_GGUF_PLAN names '%s', which is no GGUF with a plan: it is ignored", kvt_printable(path).c_str()));
        return;
    }
    kvt_read_file(gguf.get(), "environment", hparams, plan);
}

//
// from override keys
//

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
        if (kvt_k_vectors_override(key, o, plan.k_vectors, plan.notes)) {
            continue;
        }
        const int64_t il_k = kvt_override_layer(key, "kvtuner.type_k.");
        const int64_t il_v = kvt_override_layer(key, "kvtuner.type_v.");
        const int64_t il   = il_k >= 0 ? il_k : il_v;

        if (il < 0 || il >= n_layer) {
            plan.notes.push_back(format("override %s: need kvtuner.enabled, kvtuner.k_mean, kvtuner.k_scale, kvtuner.k_basis, kvtuner.type_k.N or kvtuner.type_v.N with N from 0 to %u: it is ignored", kvt_printable(key.c_str()).c_str(), n_layer - 1));
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
        plan.source                                 = "override";
        (il_k >= 0 ? plan.type_k : plan.type_v)[il] = type;
    }
}

//
// of a model
//

std::shared_ptr<kvt_plan> kvt_plan_empty(std::string weights) {
    auto plan     = std::make_shared<kvt_plan>();
    plan->weights = std::move(weights);
    return plan;
}

void kvt_plan_load(llama_model & model, const llama_model_loader & ml) {
    auto plan = kvt_plan_empty(kvt_weights_hash(ml));

    // without its hparams a model has no layers, and no context to plan for
    if (!model.hparams.vocab_only && kvt_enabled(ml, plan->notes)) {
        kvt_read_environment(model.hparams, *plan);
        if (!plan->in_force() && kvt_holds_plan(ml.metadata)) {
            kvt_read_file(ml.metadata, "file", model.hparams, *plan);
        }
        kvt_read_overrides(ml, model.hparams.n_layer_all, *plan);
    }

    if (plan->in_force() && kvt_arch_has(model.arch, KVT_ARCH_OWN_ATTENTION)) {
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
