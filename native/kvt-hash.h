// FNV-1a, 64 bits
#pragma once

#include <cstddef>
#include <cstdint>

static const uint64_t KVT_HASH_START = 0xcbf29ce484222325ull;

static inline uint64_t kvt_hash(uint64_t h, const void * data, size_t n) {
    for (size_t i = 0; i < n; i++) {
        h = (h ^ ((const uint8_t *) data)[i])*0x100000001b3ull;
    }
    return h;
}
