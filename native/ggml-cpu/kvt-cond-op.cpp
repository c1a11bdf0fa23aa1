// kvt-cond-op.cpp - conditioning of K and Q in one op
#include "kvt-cond-op.h"
#include "kvt-attn-simd.h"

#ifdef KVT_VW
static KVT_INLINE vf kvt_load(const float * p) { return vf_load(p); }
static KVT_INLINE vf kvt_load(const ggml_fp16_t * p) { return vf_load_f16(p); }
#endif
static KVT_INLINE float kvt_value(float x) { return x; }
static KVT_INLINE float kvt_value(ggml_fp16_t x) { return GGML_CPU_FP16_TO_FP32(x); }

// y = m*x for the rows [first, last) of m [n, n] and N vectors, nb bytes apart in x, n floats in y
template <int N, typename T>
static void kvt_times_rows(const T * m, const char * x, size_t nb, float * y, int64_t n, int64_t first, int64_t last) {
    const float * v[N];
    for (int i = 0; i < N; i++) {
        v[i] = (const float *) (x + i * nb);
    }
    for (int64_t r = first; r < last; r++) {
        const T * row    = m + r * n;
        float     sum[N] = {};
        int64_t   c      = 0;
#ifdef KVT_VW
        vf part[N];
        for (int i = 0; i < N; i++) {
            part[i] = vf_set1(0.0f);
        }
        for (; c + KVT_VW <= n; c += KVT_VW) {
            const vf w = kvt_load(row + c);
            for (int i = 0; i < N; i++) {
                part[i] = vf_fma(w, vf_load(v[i] + c), part[i]);
            }
        }
        for (int i = 0; i < N; i++) {
            sum[i] = vf_hsum(part[i]);
        }
#endif
        for (; c < n; c++) {
            for (int i = 0; i < N; i++) {
                sum[i] += kvt_value(row[c]) * v[i][c];
            }
        }
        for (int i = 0; i < N; i++) {
            y[i * n + r] = sum[i];
        }
    }
}

template <typename T>
static void kvt_times_matrix(const T * m, const char * x, size_t nb, int64_t n_vector, float * y, int64_t n, int64_t first, int64_t last) {
    for (; n_vector >= 4; n_vector -= 4, x += 4 * nb, y += 4 * n) {
        kvt_times_rows<4>(m, x, nb, y, n, first, last);
    }
    switch (n_vector) {
        case 3: kvt_times_rows<3>(m, x, nb, y, n, first, last); break;
        case 2: kvt_times_rows<2>(m, x, nb, y, n, first, last); break;
        case 1: kvt_times_rows<1>(m, x, nb, y, n, first, last); break;
    }
}

// what a KV head's vectors x, nb bytes apart, become, in the channels [first, last)
static void kvt_cond_head(const ggml_tensor * of, bool is_matrix, int64_t head_kv, const char * x, size_t nb, int64_t n_vector, float * y, int64_t first, int64_t last) {
    const int64_t n = of->ne[0];
    if (is_matrix) {
        const char * m = (const char *) of->data + head_kv * of->nb[2];
        if (of->type == GGML_TYPE_F16) {
            kvt_times_matrix((const ggml_fp16_t *) m, x, nb, n_vector, y, n, first, last);
        } else {
            kvt_times_matrix((const float *) m, x, nb, n_vector, y, n, first, last);
        }
        return;
    }
    const float * factor = (const float *) ((const char *) of->data + head_kv * of->nb[1]);
    for (int64_t i = 0; i < n_vector; i++) {
        const float * v = (const float *) (x + i * nb);
        for (int64_t c = first; c < last; c++) {
            y[i * n + c] = v[c] * factor[c];
        }
    }
}

void kvt_cond_forward(ggml_tensor * dst, int ith, int nth, void * userdata) {
    const ggml_tensor *q = dst->src[0], *k = dst->src[1], *of_q = dst->src[2], *of_k = dst->src[3], *mean = dst->src[4];

    const int64_t n = k->ne[0], n_head_kv = k->ne[1], n_rep = q->ne[1] / n_head_kv, n_tokens = k->ne[2];
    const bool    is_matrix = of_k->ne[1] == n && of_k->ne[2] == n_head_kv;
    const int64_t first = n * ith / nth, last = n * (ith + 1) / nth;
    float *       y_q = (float *) dst->data;
    float *       y_k = y_q + ggml_nelements(q);
    float         centered[KVT_COND_MAX_HEAD_DIM];

    GGML_ASSERT(n <= KVT_COND_MAX_HEAD_DIM && q->ne[0] == n && q->ne[1] == n_rep * n_head_kv && q->nb[0] == sizeof(float) && k->nb[0] == sizeof(float));
    if (first == last) {
        return;
    }
    for (int64_t t = 0; t < n_tokens; t++) {
        for (int64_t h = 0; h < n_head_kv; h++) {
            const char * x_q = (const char *) q->data + t * q->nb[2] + h * n_rep * q->nb[1];
            const char * x_k = (const char *) k->data + t * k->nb[2] + h * k->nb[1];
            kvt_cond_head(of_q, is_matrix, h, x_q, q->nb[1], n_rep, y_q + (t * n_head_kv + h) * n_rep * n, first, last);
            if (mean) {
                const float * m = (const float *) ((const char *) mean->data + h * mean->nb[1]);
                for (int64_t c = 0; c < n; c++) {
                    centered[c] = ((const float *) x_k)[c] - m[c];
                }
                x_k = (const char *) centered;
            }
            kvt_cond_head(of_k, is_matrix, h, x_k, k->nb[1], 1, y_k + (t * n_head_kv + h) * n, first, last);
        }
    }
    GGML_UNUSED(userdata);
}
