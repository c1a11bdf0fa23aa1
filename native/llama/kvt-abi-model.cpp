// kvt-abi-model.cpp - kvt.h: the plan of a model
#include "kvt.h"
#include "kvt-arch.h"
#include "kvt-error.h"
#include "kvt-plan.h"
#include "kvt-text.h"
#include "kvt-weights.h"

#include "llama-impl.h"
#include "llama-model.h"

int32_t kvt_model_n_layer(const llama_model * model) {
    return model ? (int32_t) model->hparams.n_layer_all : kvt_error(KVT_E_ARG, "kvt_model_n_layer: model is null");
}

int32_t kvt_model_rope(const llama_model * model, int32_t il, int32_t * n_rot, bool * far) {
    if (!model || !n_rot || !far || il < 0 || il >= (int32_t) model->hparams.n_layer_all) {
        return kvt_error(KVT_E_ARG, format("kvt_model_rope: an argument is null, or layer %d is not one of the model", il));
    }
    const llama_hparams & hparams = model->hparams;

    *n_rot = hparams.rope_type != LLAMA_ROPE_TYPE_NONE && hparams.has_rope(il) ? hparams.n_rot(il) : 0;
    *far   = hparams.rope_type != LLAMA_ROPE_TYPE_NORM; // NEOX, and those made of it
    return 0;
}

int64_t kvt_model_kv_values(const llama_model * model) {
    if (!model) {
        return kvt_error(KVT_E_ARG, "kvt_model_kv_values: model is null");
    }
    int64_t n = 0;
    for (uint32_t il = 0; il < model->hparams.n_layer_all; il++) {
        n += model->hparams.n_embd_k_gqa(il) + model->hparams.n_embd_v_gqa(il);
    }
    return n;
}

int32_t kvt_model_n_pos(const llama_model * model) {
    if (!model) {
        return kvt_error(KVT_E_ARG, "kvt_model_n_pos: model is null");
    }
    return model->pos_embd ? (int32_t) model->pos_embd->ne[1] : 0;
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
    if (kvt_arch_has(model->arch, KVT_ARCH_OWN_ATTENTION)) {
        return kvt_error(KVT_E_STATE, format("%s has attention of its own, where types per layer are not supported", llm_arch_name(model->arch)));
    }

    auto plan    = kvt_plan_empty(kvt_model_weights_hash(model));
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

static void kvt_replace_vectors(llama_model & model, int32_t il, kvt_k_vectors vectors) {
    auto plan = std::make_shared<kvt_plan>(*model.kvt); // contexts that exist keep the old one
    plan->k_vectors.resize(model.hparams.n_layer_all);
    plan->k_vectors[il] = std::move(vectors);
    model.kvt           = std::move(plan);
}

int32_t kvt_model_set_k_vectors(llama_model * model, int32_t il, const float * mean, const float * scale, int32_t n_values) {
    if (!model || il < 0 || il >= (int32_t) model->hparams.n_layer_all || n_values < 0) {
        return kvt_error(KVT_E_ARG, format("kvt_model_set_k_vectors: model is null, layer %d is not one of it, or n_values %d is negative", il, n_values));
    }
    if (!model->kvt || !model->kvt->in_force()) {
        return kvt_error(KVT_E_STATE, "kvt_model_set_k_vectors: no plan is in force. Set the types first");
    }

    kvt_k_vectors vectors;
    if (mean) {
        vectors.mean.assign(mean, mean + n_values);
    }
    if (scale) {
        vectors.scale.assign(scale, scale + n_values);
    }

    const std::string fault = kvt_k_vectors_fault(vectors, model->hparams, il);
    if (!fault.empty()) {
        return kvt_error(KVT_E_ARG, fault);
    }

    kvt_replace_vectors(*model, il, std::move(vectors));
    return 0;
}

int32_t kvt_model_set_k_basis(llama_model * model, int32_t il, const int8_t * rows, int32_t n_values, const float * row_scale, int32_t n_rows) {
    if (!model || il < 0 || il >= (int32_t) model->hparams.n_layer_all || n_values < 0 || n_rows < 0 || !rows != !row_scale) {
        return kvt_error(KVT_E_ARG, format("kvt_model_set_k_basis: model or one of rows and row_scale is null, layer %d is not one of it, or one of %d values and %d rows is negative", il, n_values, n_rows));
    }
    if (!model->kvt || !model->kvt->in_force()) {
        return kvt_error(KVT_E_STATE, "kvt_model_set_k_basis: no plan is in force. Set the types first");
    }

    kvt_k_vectors vectors = model->kvt->k_vectors.empty() ? kvt_k_vectors() : model->kvt->k_vectors[il];
    vectors.basis         = nullptr;
    if (rows) {
        const std::string fault = kvt_k_basis_set(vectors, { rows, rows + n_values }, { row_scale, row_scale + n_rows }, model->hparams, il);
        if (!fault.empty()) {
            return kvt_error(KVT_E_ARG, fault);
        }
    }
    kvt_replace_vectors(*model, il, std::move(vectors));
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
    kvt_plan_compare_weights(*plan, hash);
    model->kvt = std::move(plan);
    return 0;
}

const char * kvt_model_weights_hash(const llama_model * model) {
    return model && model->kvt ? model->kvt->weights.c_str() : "";
}

int32_t kvt_model_fingerprint(const llama_model * model, uint64_t * fingerprint) {
    if (!model || !fingerprint) {
        return kvt_error(KVT_E_ARG, "kvt_model_fingerprint: model and fingerprint must not be null");
    }
    *fingerprint = kvt_weights_fingerprint(*model, kvt_model_weights_hash(model));
    return 0;
}

int32_t kvt_model_clear_plan(llama_model * model) {
    if (!model) {
        return kvt_error(KVT_E_ARG, "kvt_model_clear_plan: model is null");
    }
    model->kvt = kvt_plan_empty(kvt_model_weights_hash(model));
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
    if (type_k) {
        *type_k = kvt_name_or_empty(model->kvt->type_k[il]);
    }
    if (type_v) {
        *type_v = kvt_name_or_empty(model->kvt->type_v[il]);
    }
    return 0;
}

int32_t kvt_model_plan_notes(const llama_model * model, char * buf, int32_t size) {
    return kvt_write_lines(model && model->kvt ? model->kvt->notes : std::vector<std::string>(), buf, size);
}
