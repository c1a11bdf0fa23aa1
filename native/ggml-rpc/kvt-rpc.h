// kvt-rpc.h - a host over RPC: what it is asked before its devices are used, and what happens when it is lost. Included by ggml-rpc.cpp,
// whose messages it sends
//
// A host that is lost, or was never there, is no reason to abort: whatever is asked of it is answered with zeros, graphs fail, and
// kvt_unless_lost of libllama makes an error of it. It stays lost until nothing of it is held any more; after that it is connected to anew.
#pragma once

#include "kvt-refuses.h"
#include "kvt-rpc-build.h"

// in the place of an abort, where a host is connected to
#define KVT_RPC_FAILS(...)           \
    do {                             \
        GGML_LOG_ERROR(__VA_ARGS__); \
        return false;                \
    } while (0)

// of the HELLO, and whenever a device is asked
struct kvt_rpc_req {
    int32_t           device; // -1: its build alone
    kvt_pair_of_layer pair;
};

struct kvt_rpc_rsp {
    char    build_id[16];
    int32_t refusal;
};

//
// server
//

static bool kvt_rpc_is_cache_type(int32_t type, int64_t n_row) {
    return type >= 0 && type < GGML_TYPE_COUNT && ggml_blck_size((ggml_type) type) > 0 && n_row % ggml_blck_size((ggml_type) type) == 0;
}

// whoever asks may be anyone
static bool kvt_rpc_is_pair(const kvt_pair_of_layer & p) {
    for (const int32_t n : { p.n_head, p.n_head_kv, p.head_dim_k, p.head_dim_v }) {
        if (n <= 0 || n > (1 << 20)) {
            return false;
        }
    }
    return p.n_head % p.n_head_kv == 0 && kvt_rpc_is_cache_type(p.type_k, p.head_dim_k) && kvt_rpc_is_cache_type(p.type_v, p.head_dim_v);
}

static bool kvt_rpc_answer(const socket_ptr & sock, const std::vector<ggml_backend_t> & backends) {
    kvt_rpc_req req;
    if (!recv_msg(sock, &req, sizeof(req))) {
        return false;
    }
    kvt_rpc_rsp rsp = {};
    snprintf(rsp.build_id, sizeof(rsp.build_id), "%s", kvt_rpc_build_id());
    rsp.refusal = KVT_REFUSES_ALL;
    if (req.device >= 0 && (size_t) req.device < backends.size() && kvt_rpc_is_pair(req.pair)) {
        rsp.refusal = kvt_device_refuses(ggml_backend_get_device(backends[req.device]), &req.pair);
    }
    return send_msg(sock, &rsp, sizeof(rsp));
}

//
// client
//

// the types of another build may be others under the same numbers
static bool kvt_rpc_same_build(const socket_ptr & sock, const std::string & endpoint) {
    kvt_rpc_req req = {};
    kvt_rpc_rsp rsp = {};
    req.device      = -1;
    if (!send_rpc_cmd(sock, RPC_CMD_KVT, &req, sizeof(req), &rsp, sizeof(rsp))) {
        GGML_LOG_ERROR("RPC host %s runs a llama.cpp without kvtuner-gguf. Start it there by 'kvtuner-gguf rpc-server'\n", endpoint.c_str());
        return false;
    }
    rsp.build_id[sizeof(rsp.build_id) - 1] = 0;
    if (strcmp(rsp.build_id, kvt_rpc_build_id()) != 0) {
        GGML_LOG_ERROR("RPC host %s is of build %s, this program of %s. Install the same version of kvtuner-gguf on both\n", endpoint.c_str(), rsp.build_id, kvt_rpc_build_id());
        return false;
    }
    return true;
}

// what a dispatcher does with a message: sends it, or answers it with zeros
static void kvt_rpc_exchange(const socket_ptr & sock, std::atomic_bool & lost, rpc_cmd cmd, const void * input, size_t input_size, void * output, size_t output_size) {
    if (!lost) {
        lost = !(output ? send_rpc_cmd(sock, cmd, input, input_size, output, output_size) : send_rpc_cmd(sock, cmd, input, input_size));
        if (lost) {
            GGML_LOG_ERROR("an RPC host was lost: it ended, or its answer was malformed. Close the model, and load it again when the host is back\n");
        }
    }
    if (lost && output) {
        memset(output, 0, output_size);
    }
}
