// values.h - what the tests of the CUDA code write into a cache, and the CPU's own codecs to compare with
#pragma once

#include "ggml.h"

#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

// normal values of many magnitudes, with outliers, integers, halves between levels, zeros, subnormals, and no numbers at all
static std::vector<float> values(int64_t n) {
    std::mt19937 gen(1);
    std::normal_distribution<float> normal;
    std::vector<float> x(n);
    for (int64_t i = 0; i < n; i++) {
        const int64_t block = i/64;
        x[i] = normal(gen)*powf(10.0f, block % 13 - 6);
        if (block %  5 == 1 && i % 64 == 7) { x[i] *= 50.0f; }
        if (block % 11 == 2) { x[i] = roundf(x[i]); }
        if (block % 17 == 3) { x[i] = 0.0f; }
        if (block % 19 == 4) { x[i] = (i % 7 - 3)*0.5f; }
        if (block % 23 == 5) { x[i] *= 1e-38f; }
        if (block % 29 == 6 && i % 9 == 0) { x[i] = i % 2 ? NAN : INFINITY; }
        if (block % 31 == 7) { x[i] *= 1e30f; }
        if (block % 37 == 8) { x[i] = 3.0f; }
    }
    return x;
}

static std::vector<uint8_t> encode(ggml_type type, const std::vector<float> & x) {
    std::vector<uint8_t> res(ggml_row_size(type, x.size()));
    ggml_get_type_traits(type)->from_float_ref(x.data(), res.data(), x.size());
    return res;
}

static std::vector<float> decode(ggml_type type, const std::vector<uint8_t> & x) {
    std::vector<float> res(x.size()/ggml_type_size(type)*ggml_blck_size(type));
    ggml_get_type_traits(type)->to_float(x.data(), res.data(), res.size());
    return res;
}

// finite blocks only: a stock type may have a scale that is not
static std::vector<float> tame(std::vector<float> x) {
    for (float & v : x) {
        v = std::isfinite(v) ? fminf(fmaxf(v, -1e4f), 1e4f) : 1.0f;
    }
    return x;
}
