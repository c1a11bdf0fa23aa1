// kvt-abi-rpc.cpp - kvt.h: hosts over RPC, and being one
#include "kvt.h"
#include "kvt-error.h"
#include "kvt-lost.h"
#include "kvt-rpc-proc.h"
#include "kvt-text.h"

#include "llama-impl.h"

#include "ggml-backend.h"
#include "ggml-rpc.h"

#include <cstdio>
#include <string>
#include <vector>

// a function of the RPC backend; null, with the error set, if this build has none
template <typename F>
static F kvt_rpc_proc(const char * name) {
    ggml_backend_reg_t reg  = ggml_backend_reg_by_name("RPC");
    F                  proc = reg ? (F) ggml_backend_reg_get_proc_address(reg, name) : nullptr;
    if (!proc) {
        kvt_error(KVT_E_STATE, "this build has no RPC. Install kvtuner-gguf with -DKVTUNER_RPC=ON");
    }
    return proc;
}

int32_t kvt_rpc_use(const char * endpoint, kvt_rpc_host * host) {
    if (!endpoint || !host) {
        return kvt_error(KVT_E_ARG, "kvt_rpc_use: endpoint and host must not be null");
    }
    const auto add = kvt_rpc_proc<decltype(&ggml_backend_rpc_add_server)>("ggml_backend_rpc_add_server");
    if (!add) {
        return KVT_E_STATE;
    }
    ggml_backend_reg_t reg = add(endpoint);
    if (!reg) {
        return kvt_error(KVT_E_NONE, format("RPC host %s cannot be used", kvt_printable(endpoint).c_str()));
    }
    if (!ggml_backend_reg_by_name(ggml_backend_reg_name(reg))) {
        ggml_backend_register(reg);
    }
    *host = {};
    for (size_t i = 0; i < ggml_backend_reg_dev_count(reg); i++) {
        size_t free = 0, total = 0;
        ggml_backend_dev_memory(ggml_backend_reg_dev_get(reg, i), &free, &total);
        host->n_devices++;
        host->free += free;
        host->total += total;
    }
    const auto lost = kvt_rpc_proc<kvt_rpc_device_lost_t>(KVT_RPC_DEVICE_LOST);
    if (host->n_devices && lost && lost(ggml_backend_reg_dev_get(reg, 0))) {
        return kvt_error(KVT_E_NONE, format("RPC host %s is not there, or was lost by a model that is still loaded", kvt_printable(endpoint).c_str()));
    }
    return 0;
}

const char * kvt_ctx_lost_host(llama_context * ctx) {
    return ctx ? kvt_lost_host(*ctx) : nullptr;
}

// what a host offers: its GPUs, or else its processors
static std::vector<ggml_backend_dev_t> kvt_rpc_devices() {
    std::vector<ggml_backend_dev_t> res;
    for (size_t i = 0; i < ggml_backend_dev_count(); i++) {
        ggml_backend_dev_t dev  = ggml_backend_dev_get(i);
        const auto         type = ggml_backend_dev_type(dev);
        if (type == GGML_BACKEND_DEVICE_TYPE_GPU || type == GGML_BACKEND_DEVICE_TYPE_IGPU) {
            res.push_back(dev);
        }
    }
    if (res.empty()) {
        res.push_back(ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU));
    }
    return res;
}

int32_t kvt_rpc_serve(const char * endpoint, const char * cache_dir, int32_t n_threads) {
    if (!endpoint || n_threads < 1) {
        return kvt_error(KVT_E_ARG, format("kvt_rpc_serve: endpoint is null, or %d threads are not 1 or more", n_threads));
    }
    const auto serve = kvt_rpc_proc<decltype(&ggml_backend_rpc_start_server)>("ggml_backend_rpc_start_server");
    if (!serve) {
        return KVT_E_STATE;
    }
    std::vector<ggml_backend_dev_t> devices = kvt_rpc_devices();
    setvbuf(stdout, nullptr, _IOLBF, BUFSIZ); // what it tells is for whoever waits for it
    serve(endpoint, cache_dir, n_threads, devices.size(), devices.data());
    return kvt_error(KVT_E_NONE, format("%s cannot be listened to", kvt_printable(endpoint).c_str())); // it returns for nothing else
}
