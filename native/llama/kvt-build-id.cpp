// kvt-build-id.cpp - what this library was built from. Alone here: another id compiles this file anew, and no other
#include "kvt.h"

const char * kvt_build_id(void) {
    return KVT_BUILD_ID;
}
