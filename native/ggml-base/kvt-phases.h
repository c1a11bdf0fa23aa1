// kvt-phases.h - the levels of each phase of a ring (kvt-rings.h) as the search for its codes takes them (kvt-ways.h). For the CPU and a GPU alike
#pragma once

#include "kvt-rings.h"

// levels i .. i + 7 as bytes of a number
constexpr uint64_t kvt_bytes(const int16_t * level, int i) {
    uint64_t res = 0;
    for (int j = 7; j >= 0; j--) {
        res = res << 8 | (level[i + j] & 255);
    }
    return res;
}

// halves of levels as the search takes them; a multiple of the last argument
struct kvt_row {
    int16_t v[16];
};

constexpr kvt_row kvt_searched(const int16_t * level, int fine, int multiple) {
    kvt_row res = {};
    for (int i = 0; i < 16; i++) {
        res.v[i] = (int16_t) (((level[i] * fine + 32 * multiple) >> (multiple == 2 ? 7 : 6)) * multiple);
    }
    return res;
}

// A GPU has the halves in instructions: what it takes by an index from a table would be in memory
template <typename R, int p> struct kvt_phase {
    static constexpr kvt_row  low   = kvt_searched(R::low[p], R::fine[p], 1);
    static constexpr kvt_row  high  = kvt_searched(R::high[p], R::fine[p], 2);
    static constexpr uint64_t low_0 = kvt_bytes(low.v, 0), low_8 = kvt_bytes(low.v, 8);
    static constexpr uint64_t high_0 = kvt_bytes(high.v, 0), high_8 = kvt_bytes(high.v, 8);
    static constexpr uint64_t own_low_0 = kvt_bytes(R::low[p], 0), own_low_8 = kvt_bytes(R::low[p], 8);
    static constexpr uint64_t own_high_0 = kvt_bytes(R::high[p], 0), own_high_8 = kvt_bytes(R::high[p], 8);
    static const int          bits = R::bits[p], next = R::bits[(p + 1) % R::n_phase], shift = R::shift[p];

    // of a window, as the block's levels are
    KVT_FN int level(int window) {
        const int i = window & 15, j = window >> 4;
        return (int8_t) ((i < 8 ? own_low_0 : own_low_8) >> 8 * (i % 8)) + (int8_t) ((j < 8 ? own_high_0 : own_high_8) >> 8 * (j % 8));
    }

    KVT_FN int of_low(int i) {
        return (int8_t) ((i < 8 ? low_0 : low_8) >> 8 * (i % 8));
    }

    // halved
    KVT_FN int of_high(int i) {
        return (int8_t) ((i < 8 ? high_0 : high_8) >> 8 * (i % 8)) / 2;
    }
};
