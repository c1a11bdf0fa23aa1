// kvt-rpc-proc.h - a question to the RPC backend, through ggml_backend_reg_get_proc_address: is the host of a device lost?
#pragma once

#include "ggml-backend.h"

#define KVT_RPC_DEVICE_LOST "kvt_rpc_device_lost"
typedef bool (*kvt_rpc_device_lost_t)(ggml_backend_dev_t dev);
