// kvt-rpc-build.cpp - kvt_build_id, without libllama. Alone here: another id compiles this file anew, and no other
#include "kvt-rpc-build.h"

const char * kvt_rpc_build_id() {
    return KVT_BUILD_ID;
}
