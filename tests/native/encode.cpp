// encode.cpp - numbers from stdin, as f32 -> the names of our types in a line, and then the bytes of the numbers in each of them
#include "kvt-groups.h"
#include "kvt-quants.h"
#include "kvt-trellis.h"

#include <cmath>
#include <cstdio>
#include <vector>

// as ggml's, for values within f16's range: no library is linked
float ggml_fp16_to_fp32(ggml_fp16_t x) {
    const int   exponent = x >> 10 & 31, mantissa = x & 1023;
    const float size = exponent ? ldexpf((float) (1024 + mantissa), exponent - 25) : ldexpf((float) mantissa, -24);
    return x >> 15 ? -size : size;
}

ggml_fp16_t ggml_fp32_to_fp16(float x) {
    const float a        = fabsf(x);
    const int   exponent = a >= ldexpf(1.0f, -14) ? ilogbf(a) : -14;
    const int   steps    = (int) nearbyintf(ldexpf(a, 10 - exponent)); // 2048: the next exponent's first
    return (ggml_fp16_t) ((std::signbit(x) ? 0x8000 : 0) + ((exponent + 14) << 10) + steps);
}

template <typename C>
static void write(const std::vector<float> & x) {
    std::vector<typename C::block_t> blocks(x.size() / C::n);
    kvt_encode_row<C>(x.data(), blocks.data(), (int64_t) x.size());
    fwrite(blocks.data(), sizeof(blocks[0]), blocks.size(), stdout);
}

int main() {
    std::vector<float> x;
    for (float v; fread(&v, sizeof(v), 1, stdin) == 1;) {
        x.push_back(v);
    }
#define NAME(NAME, name, number, n, bits) fputs(#name " ", stdout);
    KVT_TYPES(NAME)
    putchar('\n');
#define WRITE(NAME, name, number, n, bits) write<kvt_codec_##name>(x);
    KVT_TYPES(WRITE)
}
