// kvt-hash.h - FNV-1a of 64 bits, and CRC-32 as zlib has it
#pragma once

#include <cstddef>
#include <cstdint>

static const uint64_t KVT_HASH_START = 0xcbf29ce484222325ull;

static inline uint64_t kvt_hash(uint64_t h, const void * data, size_t n) {
    for (size_t i = 0; i < n; i++) {
        h = (h ^ ((const uint8_t *) data)[i]) * 0x100000001b3ull;
    }
    return h;
}

// goes on from crc, which is 0 at first
static inline uint32_t kvt_crc32(uint32_t crc, const void * data, size_t n) {
    crc = ~crc;
    for (size_t i = 0; i < n; i++) {
        crc ^= ((const uint8_t *) data)[i];
        for (int bit = 0; bit < 8; bit++) {
            crc = (crc >> 1) ^ (crc & 1 ? 0xedb88320u : 0);
        }
    }
    return ~crc;
}
