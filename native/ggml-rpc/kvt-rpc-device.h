// kvt-rpc-device.h - what libllama asks of a device on a host, through ggml_backend_reg_get_proc_address. Included by ggml-rpc.cpp
#pragma once

#include "kvt-rpc-proc.h"

static int32_t kvt_rpc_device_refuses(ggml_backend_dev_t dev, const kvt_pair_of_layer * pair) {
    const auto * ctx        = (const ggml_backend_rpc_device_context *) dev->context;
    const auto   dispatcher = get_dispatcher(ctx->endpoint);
    const auto   req        = std::make_shared<kvt_rpc_req>(kvt_rpc_req { (int32_t) ctx->device, *pair });
    kvt_rpc_rsp  rsp        = {};
    dispatcher->send(RPC_CMD_KVT, req, sizeof(*req), &rsp, sizeof(rsp));
    return dispatcher->kvt_lost ? KVT_REFUSES_ALL : rsp.refusal;
}

static bool kvt_rpc_device_lost(ggml_backend_dev_t dev) {
    return get_dispatcher(((const ggml_backend_rpc_device_context *) dev->context)->endpoint)->kvt_lost;
}

static void * kvt_rpc_proc(const char * name) {
    if (strcmp(name, KVT_DEVICE_REFUSES) == 0) {
        return (void *) kvt_rpc_device_refuses;
    }
    return strcmp(name, KVT_RPC_DEVICE_LOST) == 0 ? (void *) kvt_rpc_device_lost : nullptr;
}
