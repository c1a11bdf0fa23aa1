// kvt-lost.h - an RPC host that was lost while it computed: an error, not an answer made of zeros (C++, inside libllama only)
#pragma once

struct llama_context;

// what llama_decode returns then, as when a graph fails
static const int KVT_LOST = -3;

// "host:port" of one that the context's model has lost; null if there is none. Waits for the hosts, if there are any
const char * kvt_lost_host(llama_context & ctx);

// what a function of the C API returns: value, or what says that it failed
template <typename T>
T kvt_unless_lost(llama_context & ctx, T value, T failed) {
    return kvt_lost_host(ctx) ? failed : value;
}
