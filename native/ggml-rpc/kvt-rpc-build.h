// kvt-rpc-build.h - kvt_build_id, without libllama.
#pragma once

const char * kvt_rpc_build_id();
