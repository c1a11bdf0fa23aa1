// kvt-lost.cpp - an RPC host that was lost while it computed
#include "kvt-lost.h"
#include "kvt-rpc-proc.h"

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-model.h"

static kvt_rpc_device_lost_t kvt_lost_proc(ggml_backend_dev_t dev) {
    ggml_backend_reg_t reg = dev ? ggml_backend_dev_backend_reg(dev) : nullptr;
    return reg ? (kvt_rpc_device_lost_t) ggml_backend_reg_get_proc_address(reg, KVT_RPC_DEVICE_LOST) : nullptr;
}

const char * kvt_lost_host(llama_context & ctx) {
    bool waited = false;
    for (const auto & device : ctx.get_model().devices) {
        const kvt_rpc_device_lost_t lost = kvt_lost_proc(device.dev);
        if (lost && !waited) {
            ctx.synchronize();
            waited = true;
        }
        if (lost && lost(device.dev)) {
            LLAMA_LOG_ERROR("RPC host %s was lost. Close the model, and load it again when the host is back\n", ggml_backend_dev_description(device.dev));
            return ggml_backend_dev_description(device.dev);
        }
    }
    return nullptr;
}
