// host.cpp - the device code of our cache types, run on the host and compared with the CPU's codecs
// Bytes and dequantized values must be equal, attention within what its roundings to f16 may add.
#include "emulate.h"
#include "values.h"

#include "ggml.h"

#include "kvt-attn.cuh"
#include "kvt-convert.cuh"
#include "kvt-cuda.cuh"

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
    std::vector<float> convert(want.size());
    const int n = kvt_codec<type>::n;
    for (size_t i = 0; i < want.size(); i += 2) {
        float2 two;
        kvt_dequantize<type>(packed.data(), i/n, i % n, two);
        convert[i + 0] = two.x;
        convert[i + 1] = two.y;
    }
    check(same(convert, want), type, "dequantize, for conversions and rows");
}

//
// attention
//

struct attention {
    const char * name;
    int          n_head, n_head_kv, n_q, n_kv, n_seq, n_split;
    float        max_bias, softcap;
    bool         mask, sinks;
};

// as flash_attn_combine_results of ggml-cuda
static void combine(const std::vector<float> & parts, const std::vector<float2> & meta, int n_split, int head_dim, std::vector<float> & out) {
    for (size_t i = 0; i < out.size(); i++) {
        const float2 * m    = &meta[i/head_dim*n_split];
        double         most = m[0].x, value = 0.0, total = 0.0;
        for (int j = 1; j < n_split; j++) {
            most = fmax(most, m[j].x);
        }
        for (int j = 0; j < n_split; j++) {
            value += exp(m[j].x - most)*parts[(i/head_dim*n_split + j)*head_dim + i % head_dim];
            total += exp(m[j].x - most)*m[j].y;
        }
        out[i] = value/total;
    }
}

// the kernel's result, and its largest error over what its roundings to f16 may add
template <int D>
static double error_of_attention(const attention & s, ggml_type type_k, ggml_type type_v) {
    std::mt19937 gen(3);
    std::normal_distribution<float> normal;
    const int64_t n_cell = (int64_t) s.n_seq*s.n_kv*s.n_head_kv, n_query = (int64_t) s.n_seq*s.n_q*s.n_head;
    std::vector<float> x(n_cell*D), y = tame(values(n_cell*D)), q(n_query*D), sinks(s.n_head);
    for (size_t i = 0; i < x.size(); i++) {
        x[i] = normal(gen)*(1 + i/64 % 5)/3.0f;
    }
    for (float & v : q)     { v = normal(gen); }
    for (float & v : sinks) { v = 2*normal(gen); }
    const auto row    = [&](ggml_type type) { return (int64_t) ggml_row_size(type, D); };
    const auto packed = [&](ggml_type type, const std::vector<float> & z) {
        if (type == GGML_TYPE_F16) {
            std::vector<uint8_t> res(2*z.size());
            ggml_fp32_to_fp16_row(z.data(), (ggml_fp16_t *) res.data(), z.size());
            return res;
        }
        return encode(type, z);
    };
    const auto k_bytes = packed(type_k, x), v_bytes = packed(type_v, y);
    const auto k = decode(type_k, k_bytes), v = decode(type_v, v_bytes);

    // some tokens are hidden, from one query more than from another, and all of a stretch from all
    std::vector<ggml_fp16_t> mask(s.n_seq*s.n_q*s.n_kv);
    for (size_t i = 0; i < mask.size(); i++) {
        const int token = i % s.n_kv, query = i/s.n_kv;
        const bool hidden = (token*7 + query) % 11 == 0 || (token >= 32 && token < 200 && s.n_kv > 256);
        mask[i] = ggml_fp32_to_fp16(hidden ? -INFINITY : -0.25f*(token % 3));
    }

    kvt_attn_args a = {};
    a.q = (const char *) q.data(), a.k = (const char *) k_bytes.data(), a.v = (const char *) v_bytes.data();
    a.mask  = s.mask  ? (const char *) mask.data() : nullptr;
    a.sinks = s.sinks ? sinks.data() : nullptr;
    a.type_k = type_k, a.type_v = type_v;
    a.gqa = s.n_head/s.n_head_kv, a.n_q = s.n_q, a.n_kv = s.n_kv, a.n_seq_mask = s.n_seq;
    a.split   = (s.n_kv + s.n_split - 1)/s.n_split;
    a.n_split = s.n_split;
    for (int i = 0; i < 2; i++) { // as llama.cpp has them: the heads of a token beside each other
        int64_t * nb = i ? a.nb_v : a.nb_k;
        nb[1] = row(i ? type_v : type_k);
        nb[0] = nb[1]*s.n_head_kv;
        nb[2] = nb[0]*s.n_kv;
    }
    a.nb_q[1] = D*sizeof(float), a.nb_q[0] = a.nb_q[1]*s.n_head, a.nb_q[2] = a.nb_q[0]*s.n_q;
    a.nb_mask[0] = s.n_kv*sizeof(ggml_fp16_t), a.nb_mask[1] = a.nb_mask[0]*s.n_q;
    const float scale = 1/sqrtf(D);
    a.params = { s.softcap != 0.0f ? scale/s.softcap : scale, s.max_bias, s.softcap, s.n_head };

    std::vector<float>  got(n_query*D), parts(n_query*D*s.n_split);
    std::vector<float2> meta(n_query*s.n_split);
    a.out = s.n_split > 1 ? parts.data() : got.data(), a.meta = meta.data();
    const int n_part = (a.gqa*a.n_q + KVT_ATTN_COLS - 1)/KVT_ATTN_COLS;
    launch(dim3(s.n_split, s.n_head_kv*n_part, s.n_seq), KVT_ATTN_BLOCK, [&] { k_kvt_attn<D>(a); });
    if (s.n_split > 1) {
        combine(parts, meta, s.n_split, D, got);
    }

    double worst = 0.0;
    for (int64_t i = 0; i < n_query; i++) {
        const int seq = i/s.n_head/s.n_q, token = i/s.n_head % s.n_q, head = i % s.n_head;
        const float slope = kvt_attn_slope(a.params, head);
        const auto cell = [&](int64_t j) { return ((seq*s.n_kv + j)*s.n_head_kv + head/a.gqa)*D; };
        std::vector<double> score(s.n_kv);
        double most = s.sinks ? sinks[head] : -1e30, total = 0.0, off = 0.0; // off: of a score
        for (int64_t j = 0; j < s.n_kv; j++) {
            double sum_abs = 0.0;
            for (int l = 0; l < D; l++) {
                score[j] += (double) q[i*D + l]*k[cell(j) + l]*scale;
                sum_abs  += fabs((double) q[i*D + l]*k[cell(j) + l]*scale);
            }
            off      = fmax(off, sum_abs*0x1p-12);
            score[j] = s.softcap != 0.0f ? s.softcap*tanh(score[j]/s.softcap) : score[j];
            score[j] += s.mask ? slope*ggml_fp16_to_fp32(mask[(seq*s.n_q + token)*s.n_kv + j]) : 0.0;
            most = fmax(most, score[j]);
        }
        for (double & p : score) {
            p = exp(p - most);
            total += p;
        }
        total += s.sinks ? exp(sinks[head] - most) : 0.0;
        for (int l = 0; l < D; l++) {
            double want = 0.0, sum_abs = 0.0, all = 0.0;
            for (int64_t j = 0; j < s.n_kv; j++) {
                want    += score[j]/total*v[cell(j) + l];
                sum_abs += score[j]/total*fabs(v[cell(j) + l]);
                all     += fabs(v[cell(j) + l])/total;
            }
            const double allowed = sum_abs*(0x1p-10 + off) + all*0x1p-25 + 0x1p-24;
            worst = fmax(worst, fabs(got[i*D + l] - want)/allowed);
            if (!(fabs(got[i*D + l]) < 1e30)) {
                worst = INFINITY;
            }
        }
    }
    return worst;
}

static const attention ATTENTIONS[] = {
    // name                                    heads KV q  n_kv seq splits bias cap  mask   sinks
    { "one query",                             3,    1, 1, 96,  1,  1, 0, 0,  true,  false },
    { "seven heads to one, two queries",       14,   2, 2, 70,  1,  1, 0, 0,  true,  false },
    { "splits, two sequences, hidden tokens",  8,    2, 1, 400, 2,  3, 0, 0,  true,  false },
    { "no mask, soft cap",                     2,    2, 1, 64,  1,  1, 0, 5,  false, false },
    { "ALiBi, sinks",                          6,    3, 3, 64,  1,  2, 8, 0,  true,  true  },
};

template <int D>
static void test_attention(ggml_type type_k, ggml_type type_v, bool all) {
    for (const attention & s : ATTENTIONS) {
        const double error = error_of_attention<D>(s, type_k, type_v);
        check(error <= 1.0, type_k, std::string("attention over ") + ggml_type_name(type_k) + "-" + ggml_type_name(type_v) + ", head size " + std::to_string(D) +
            ", " + s.name + ": error " + std::to_string(error) + " of the bound");
        if (!all) {
            return;
        }
    }
}

static void test_attentions() {
#define TYPE(NAME, ...) GGML_TYPE_##NAME,
    const std::vector<ggml_type> types = { KVT_CACHE_TYPES(TYPE, TYPE) };
    for (const ggml_type type : types) {
        if (kvt_attn_reads_k(type)) {
            test_attention<64>(type, GGML_TYPE_Q8_0, false);
            test_attention<128>(type, GGML_TYPE_Q4_0, false);
            test_attention<256>(type, GGML_TYPE_T4_64, false);
        }
        if (kvt_attn_reads_v(type)) {
            test_attention<64>(GGML_TYPE_Q8_0, type, false);
            test_attention<128>(GGML_TYPE_F16, type, false);
            test_attention<256>(GGML_TYPE_K2_64, type, false);
        }
    }
    test_attention<64>(GGML_TYPE_K3_64, GGML_TYPE_T2_64, true);
    test_attention<128>(GGML_TYPE_Q8_0, GGML_TYPE_Q4_1, true);
}

template <ggml_type type>
static void test_reading() {
    test_dequantize<type>();
    test_cpy_to_f32<type>();
}

int main() {
#define TEST(NAME, name, number, n, bits) \
    test_set_rows<GGML_TYPE_##NAME, int64_t>("set rows, 64-bit indices"); \
    test_set_rows<GGML_TYPE_##NAME, int32_t>("set rows, 32-bit indices"); \
    test_cpy_from_f32<GGML_TYPE_##NAME>(); \
    test_reading<GGML_TYPE_##NAME>();
    KVT_TYPES(TEST)
    test_reading<GGML_TYPE_IQ4_NL>();
    test_attentions();
    return n_fail > 0;
}
