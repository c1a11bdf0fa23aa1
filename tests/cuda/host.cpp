// host.cpp - the device code of our cache types, run on the host and compared with the CPU's codecs
// Bytes and dequantized values must be equal, dot products within the rounding of their sums.
#include "emulate.h"
#include "values.h"

#include "ggml.h"

// what ggml-cuda's headers declare around ours
#define WARP_SIZE 32
typedef float (* vec_dot_KQ_t)(const char *, const void *, const int *, const void *);
typedef void (* dequantize_V_t)(const void *, void *, int64_t);
template <ggml_type type, int D, int nthreads>      constexpr vec_dot_KQ_t   get_vec_dot_KQ()   { return nullptr; }
template <ggml_type type, typename T, int ne> constexpr dequantize_V_t get_dequantize_V() { return nullptr; }

#include "kvt-convert.cuh"
#include "kvt-cuda.cuh"
#include "kvt-fattn.cuh"

#include <cmath>
#include <limits>
#include <random>
#include <string>

static int n_fail = 0;

static void check(bool ok, ggml_type type, const std::string & what) {
    n_fail += !ok;
    printf("%s %s %s\n", ok ? "ok" : "FAIL", ggml_type_name(type), what.c_str());
}

static bool same(const std::vector<float> & a, const std::vector<float> & b) {
    return a.size() == b.size() && memcmp(a.data(), b.data(), a.size()*sizeof(float)) == 0;
}

// a tensor of type, contiguous, or with its first two dimensions' rows permuted
static kvt_dims dims(ggml_type type, int64_t ne0, int64_t ne1, int64_t ne2, int64_t ne3 = 1, bool permuted = false) {
    const int64_t row = ggml_row_size(type, ne0);
    kvt_dims res = { { ne0, ne1, ne2, ne3 }, { (int64_t) ggml_type_size(type), row, row*ne1, row*ne1*ne2 } };
    if (permuted) {
        res.nb[1] = row*ne2;
        res.nb[2] = row;
    }
    return res;
}

template <ggml_type type, typename idx_t>
static void test_set_rows(const char * name) {
    const int64_t ne0 = 576, ne1 = 3, ne2 = 3, ne3 = 2, n_row = 11; // 9 blocks of 64: the last threads have none
    const auto x      = values(ne0*ne1*ne2*ne3);
    const auto packed = encode(type, x);
    const int64_t row = ggml_row_size(type, ne0);

    // one list of rows for every second ne2 index, as broadcast in ggml
    std::vector<idx_t> rows(ne1*1*ne3);
    for (size_t i = 0; i < rows.size(); i++) {
        rows[i] = (5*i + 3) % n_row;
    }
    std::vector<uint8_t> want(row*n_row*ne2*ne3, 0xAA), got = want;
    for (int64_t i3 = 0; i3 < ne3; i3++) {
        for (int64_t i2 = 0; i2 < ne2; i2++) {
            for (int64_t i1 = 0; i1 < ne1; i1++) {
                memcpy(&want[((i3*ne2 + i2)*n_row + rows[i3*ne1 + i1])*row], &packed[((i3*ne2 + i2)*ne1 + i1)*row], row);
            }
        }
    }
    const kvt_dims idx = { { ne1, 1, ne3, 1 }, { (int64_t) sizeof(idx_t), (int64_t) sizeof(idx_t)*ne1, (int64_t) sizeof(idx_t)*ne1, 0 } };
    const int n_thread = kvt_write_block<kvt_codec<type>>;
    const int n_part   = (ne0/kvt_codec<type>::n*KVT_THREADS + n_thread - 1)/n_thread;
    launch(dim3(ne1*ne2*ne3, n_part), n_thread, [&] {
        k_kvt_set_rows<type, idx_t>((const char *) x.data(), (const char *) rows.data(), (char *) got.data(),
            dims(GGML_TYPE_F32, ne0, ne1, ne2, ne3), idx, dims(type, ne0, n_row, ne2, ne3));
    });
    check(got == want, type, name);
}

template <ggml_type type>
static void test_cpy_from_f32() {
    const int64_t ne0 = 192, ne1 = 5, ne2 = 7;
    const auto x    = values(ne0*ne1*ne2);
    const auto want = encode(type, x);
    const int64_t n_block  = x.size()/kvt_codec<type>::n;
    const int     n_thread = kvt_write_block<kvt_codec<type>>;
    std::vector<uint8_t> got(want.size());
    launch(dim3((n_block*KVT_THREADS + n_thread - 1)/n_thread), n_thread, [&] {
        k_kvt_cpy_from_f32<type>((const char *) x.data(), (char *) got.data(), dims(GGML_TYPE_F32, ne0, ne1, ne2), dims(type, ne0, ne1, ne2), n_block);
    });
    check(got == want, type, "copy from f32");

    // K-shift: both sides are views of the same shape with rows of heads and tokens exchanged
    std::vector<uint8_t> permuted(want.size());
    launch(dim3((n_block*KVT_THREADS + n_thread - 1)/n_thread), n_thread, [&] {
        k_kvt_cpy_from_f32<type>((const char *) x.data(), (char *) permuted.data(), dims(GGML_TYPE_F32, ne0, ne1, ne2, 1, true), dims(type, ne0, ne1, ne2, 1, true), n_block);
    });
    check(permuted == want, type, "copy from f32, permuted");
}

template <ggml_type type>
static void test_cpy_to_f32() {
    const int64_t ne0 = 192, ne1 = 5, ne2 = 13;
    const auto packed = encode(type, tame(values(ne0*ne1*ne2)));
    const auto flat   = decode(type, packed);
    std::vector<float> want(flat.size()), got(flat.size());
    for (int64_t i2 = 0; i2 < ne2; i2++) {
        for (int64_t i1 = 0; i1 < ne1; i1++) {
            memcpy(&want[(i2*ne1 + i1)*ne0], &flat[(i1*ne2 + i2)*ne0], ne0*sizeof(float));
        }
    }
    launch(dim3((flat.size()/4 + KVT_CUDA_BLOCK - 1)/KVT_CUDA_BLOCK), KVT_CUDA_BLOCK, [&] {
        k_kvt_cpy_to_f32<type>((const char *) packed.data(), (char *) got.data(), dims(type, ne0, ne1, ne2, 1, true), dims(GGML_TYPE_F32, ne0, ne1, ne2), flat.size()/4);
    });
    check(same(got, want), type, "copy to f32, permuted");
}

template <ggml_type type>
static void test_dequantize() {
    const auto packed = encode(type, tame(values(64*600)));
    const auto want   = decode(type, packed);
    std::vector<float> convert(want.size()), v(want.size());
    const int n = kvt_codec<type>::n;
    for (size_t i = 0; i < want.size(); i += 2) {
        float2 two;
        kvt_dequantize<type>(packed.data(), i/n, i % n, two);
        convert[i + 0] = two.x;
        convert[i + 1] = two.y;
    }
    check(same(convert, want), type, "dequantize, for conversions and rows");
    for (size_t i = 0; i < want.size(); i += 4) {
        kvt_get_dequantize_V<type, float, 4>()(packed.data(), &v[i], i);
    }
    check(same(v, want), type, "dequantize V");
}

// as the kernel has it: each thread holds every nthreads-th four of a query in q8_1, and their block's scale and sum
template <ggml_type type, int D>
static void test_dot() {
    const int nthreads = D/4 < WARP_SIZE ? D/4 : WARP_SIZE;
    const int n_row    = 64;
    const auto packed = encode(type, tame(values(D*n_row)));
    const auto k      = decode(type, packed);
    std::mt19937 gen(2);
    std::normal_distribution<float> normal;
    int8_t q[D];
    float  d[D/32];
    for (int i = 0; i < D; i++) {
        q[i] = (int8_t) fmaxf(-127.0f, fminf(127.0f, roundf(40.0f*normal(gen))));
        d[i/32] = fabsf(normal(gen)) + 0.01f;
    }

    double worst = 0.0;
    for (int row = 0; row < n_row; row++) {
        double want = 0.0, sum_abs = 0.0, got = 0.0;
        for (int i = 0; i < D; i++) {
            want    += (double) k[row*D + i]*q[i]*d[i/32];
            sum_abs += fabs((double) k[row*D + i]*q[i]*d[i/32]);
        }
        for (threadIdx.x = 0; threadIdx.x < (unsigned) nthreads; threadIdx.x++) {
            int    q_i32[D/4];
            float2 q_ds [D/4];
            for (int i = 0; i < D/4; i += nthreads) {
                memcpy(&q_i32[i/nthreads], q + 4*(i + threadIdx.x), 4);
                q_ds[i/nthreads] = make_float2(d[(i + threadIdx.x)/8], NAN); // the sum is not asked for
            }
            got += kvt_get_vec_dot_KQ<type, D, D/4 < WARP_SIZE ? D/4 : WARP_SIZE>()((const char *) packed.data() + row*ggml_row_size(type, D), nullptr, q_i32, q_ds);
        }
        worst = fmax(worst, fabs(got - want)/(sum_abs + 1e-30));
    }
    // three roundings in each product of four values, and those of at most D/128 additions
    const double bound = (3 + D/128)*0x1p-24;
    check(worst <= bound, type, "dot product, head size " + std::to_string(D) + ", error " + std::to_string(worst/bound) + " of the bound");
}

template <ggml_type type>
static void test_reading() {
    test_dequantize<type>();
    test_cpy_to_f32<type>();
    test_dot<type,  64>();
    test_dot<type, 128>();
    test_dot<type, 256>();
}

int main() {
#define TEST(NAME, name, number, n, bits) \
    test_set_rows<GGML_TYPE_##NAME, int64_t>("set rows, 64-bit indices"); \
    test_set_rows<GGML_TYPE_##NAME, int32_t>("set rows, 32-bit indices"); \
    test_cpy_from_f32<GGML_TYPE_##NAME>(); \
    test_reading<GGML_TYPE_##NAME>();
    KVT_TYPES(TEST)
    test_reading<GGML_TYPE_IQ4_NL>();
    return n_fail > 0;
}
