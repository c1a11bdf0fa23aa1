// encode.cpp - numbers from stdin, as f32 -> the names of our types in a line, and then the bytes of the numbers in each of them
#include "kvt-groups.h"
#include "kvt-quants.h"
#include "kvt-trellis.h"

#include <cstdio>
#include <vector>

#ifdef __aarch64__
typedef __fp16 half;
#else
typedef _Float16 half;
#endif

float ggml_fp16_to_fp32(ggml_fp16_t x) {
    half h;
    memcpy(&h, &x, sizeof(h));
    return (float) h;
}

ggml_fp16_t ggml_fp32_to_fp16(float x) {
    const half  h = (half) x;
    ggml_fp16_t res;
    memcpy(&res, &h, sizeof(res));
    return res;
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
