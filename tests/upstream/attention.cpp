// attention.cpp - attention over pairs of cache types "k/v", as the library that it is linked with computes it, against float64 of the values
// that the cache holds. Prints a line for each pair and shape: the pair, the norm of the error over that of the result, and 1 if scores are loud, else 0.
#include "ggml-cpu.h"
#include "ggml.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

typedef std::vector<float> floats;

static ggml_type type_of(const std::string & name) {
    for (int i = 0; i < GGML_TYPE_COUNT; i++) {
        if (ggml_type_size((ggml_type) i) && name == ggml_type_name((ggml_type) i)) {
            return (ggml_type) i;
        }
    }
    fprintf(stderr, "no type %s\n", name.c_str());
    exit(2);
}

static floats normal(int64_t n, int seed) {
    std::mt19937                    gen(seed);
    std::normal_distribution<float> of;
    floats                          x(n);
    std::generate(x.begin(), x.end(), [&] { return of(gen); });
    return x;
}

// fills a tensor -> what it holds then
static floats fill(ggml_tensor * t, const floats & x) {
    const ggml_type_traits * type = ggml_get_type_traits(t->type);
    floats                   held = x;
    if (t->type == GGML_TYPE_F32) {
        memcpy(t->data, x.data(), x.size() * sizeof(float));
    } else {
        type->from_float_ref(x.data(), t->data, (int64_t) x.size());
        type->to_float(t->data, held.data(), (int64_t) held.size());
    }
    return held;
}

struct shape {
    int64_t d, n_gqa, n_q, n_kv;
    bool    loud = false; // scores are of a thousand, V's values 1 or -1, so that all of its scales are as large, and all is seen
};

static const int64_t N_HEAD_KV = 2;

// a cell that this token does not see
static bool hidden(const shape & s, int64_t token, int64_t cell) {
    return !s.loud && cell > 0 && (cell + token) % 5 == 0;
}

static std::vector<double> exact(const shape & s, const floats & q, const floats & k, const floats & v, double scale) {
    const int64_t       n_head = N_HEAD_KV * s.n_gqa;
    std::vector<double> out(s.d * n_head * s.n_q), p(s.n_kv);
    for (int64_t i = 0; i < n_head * s.n_q; i++) {
        const int64_t head = i % n_head, token = i / n_head, kv = head / s.n_gqa * s.n_kv;
        double        top = -INFINITY, sum = 0;
        for (int64_t c = 0; c < s.n_kv; c++) {
            p[c] = 0;
            for (int64_t j = 0; j < s.d; j++) {
                p[c] += scale * q[(head * s.n_q + token) * s.d + j] * k[(kv + c) * s.d + j];
            }
            p[c] = hidden(s, token, c) ? -INFINITY : p[c];
            top  = std::max(top, p[c]);
        }
        for (double & x : p) {
            sum += x = exp(x - top);
        }
        for (int64_t c = 0; c < s.n_kv; c++) {
            for (int64_t j = 0; j < s.d; j++) {
                out[i * s.d + j] += p[c] / sum * v[(kv + c) * s.d + j];
            }
        }
    }
    return out;
}

static double error(const shape & s, ggml_type type_k, ggml_type type_v) {
    ggml_context * ctx  = ggml_init({ 64u << 20, nullptr, false });
    ggml_tensor *  q    = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, s.d, s.n_q, N_HEAD_KV * s.n_gqa);
    ggml_tensor *  k    = ggml_new_tensor_3d(ctx, type_k, s.d, s.n_kv, N_HEAD_KV);
    ggml_tensor *  v    = ggml_new_tensor_3d(ctx, type_v, s.d, s.n_kv, N_HEAD_KV);
    ggml_tensor *  mask = ggml_new_tensor_2d(ctx, GGML_TYPE_F16, s.n_kv, s.n_q);
    for (int64_t i = 0; i < s.n_kv * s.n_q; i++) {
        ((ggml_fp16_t *) mask->data)[i] = ggml_fp32_to_fp16(hidden(s, i / s.n_kv, i % s.n_kv) ? -INFINITY : 0.0f);
    }
    const double scale = 1 / sqrt((double) s.d);
    floats       of_q = normal(ggml_nelements(q), 1), of_v = normal(ggml_nelements(v), 3);
    if (s.loud) {
        for (float & x : of_q) {
            x *= 1000;
        }
        for (float & x : of_v) {
            x = x < 0 ? -1 : 1;
        }
    }
    const floats x = fill(q, of_q), y = fill(k, normal(ggml_nelements(k), 2)), z = fill(v, of_v);

    ggml_tensor * out   = ggml_flash_attn_ext(ctx, q, k, v, mask, (float) scale, 0.0f, 0.0f);
    ggml_cgraph * graph = ggml_new_graph(ctx);
    ggml_build_forward_expand(graph, out);
    if (ggml_graph_compute_with_ctx(ctx, graph, 1) != GGML_STATUS_SUCCESS) {
        exit(3);
    }
    const std::vector<double> want = exact(s, x, y, z, scale);
    double                    off = 0, all = 0;
    for (size_t i = 0; i < want.size(); i++) {
        off += pow(((const float *) out->data)[i] - want[i], 2);
        all += want[i] * want[i];
    }
    ggml_free(ctx);
    return sqrt(off / all);
}

int main(int argc, char ** argv) {
    for (int i = 1; i < argc; i++) {
        const std::string pair = argv[i];
        const size_t      at   = pair.find('/');
        for (const shape & s : { shape{ 64, 3, 1, 300 }, shape{ 128, 2, 7, 61 }, shape{ 64, 7, 1, 77 }, shape{ 64, 7, 3, 300, true } }) {
            printf("%s %.3g %d\n", argv[i], error(s, type_of(pair.substr(0, at)), type_of(pair.substr(at + 1))), s.loud);
        }
    }
}
