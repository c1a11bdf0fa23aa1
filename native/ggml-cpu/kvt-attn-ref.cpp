// kvt-attn-ref.cpp - attention in double precision, one row at a time: what every fast version is compared with
#include "kvt-attn.h"

#include "ggml-cpu.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

static void kvt_row_to_float(const ggml_tensor * t, int64_t i1, int64_t i2, int64_t i3, float * x) {
    const char * row = (const char *) t->data + i1 * t->nb[1] + i2 * t->nb[2] + i3 * t->nb[3];
    if (t->type == GGML_TYPE_F32) {
        for (int64_t i = 0; i < t->ne[0]; i++) {
            x[i] = ((const float *) row)[i];
        }
    } else {
        ggml_get_type_traits(t->type)->to_float(row, x, t->ne[0]);
    }
}

// of ALiBi, as in ggml's soft_max
static double kvt_slope(float max_bias, int64_t n_head, int64_t h) {
    if (max_bias <= 0.0f) {
        return 1.0;
    }
    const int64_t n_log2 = (int64_t) 1 << (int) floor(log2((double) n_head));
    return h < n_log2 ? pow(2.0, -max_bias * (h + 1) / n_log2) : pow(2.0, -max_bias / 2 * (2 * (h - n_log2) + 1) / n_log2);
}

void kvt_attn_ref(ggml_tensor * dst) {
    const ggml_tensor * q     = dst->src[0]; // DK, N,    n_head,    n_stream
    const ggml_tensor * k     = dst->src[1]; // DK, n_kv, n_head_kv, n_stream
    const ggml_tensor * v     = dst->src[2]; // DV, n_kv, n_head_kv, n_stream
    const ggml_tensor * mask  = dst->src[3]; // n_kv, N, and broadcast
    const ggml_tensor * sinks = dst->src[4]; // n_head

    float scale, max_bias, softcap;
    memcpy(&scale, (const float *) dst->op_params + 0, sizeof(float));
    memcpy(&max_bias, (const float *) dst->op_params + 1, sizeof(float));
    memcpy(&softcap, (const float *) dst->op_params + 2, sizeof(float));

    const int64_t       n_kv = k->ne[1], DK = k->ne[0], DV = v->ne[0];
    std::vector<float>  row_q(DK), row_k(DK), row_v(DV);
    std::vector<double> s(n_kv), out(DV);

    for (int64_t ir = 0; ir < q->ne[1] * q->ne[2] * q->ne[3]; ir++) {
        const int64_t i1 = ir % q->ne[1], i2 = ir / q->ne[1] % q->ne[2], i3 = ir / q->ne[1] / q->ne[2];
        kvt_row_to_float(q, i1, i2, i3, row_q.data());

        double top = sinks ? ((const float *) sinks->data)[i2] : -INFINITY;
        for (int64_t ic = 0; ic < n_kv; ic++) {
            double bias = 0.0;
            if (mask) {
                const char * m = (const char *) mask->data + i1 * mask->nb[1] + (i2 % mask->ne[2]) * mask->nb[2] + (i3 % mask->ne[3]) * mask->nb[3];
                bias           = kvt_slope(max_bias, q->ne[2], i2) * ggml_fp16_to_fp32(((const ggml_fp16_t *) m)[ic]);
            }
            kvt_row_to_float(k, ic, i2 / (q->ne[2] / k->ne[2]), i3 / (q->ne[3] / k->ne[3]), row_k.data());
            double dot = 0.0;
            for (int64_t i = 0; i < DK; i++) {
                dot += (double) row_q[i] * row_k[i];
            }
            s[ic] = (softcap != 0.0f ? softcap * tanh(dot * scale / softcap) : dot * scale) + bias;
            top   = std::max(top, s[ic]);
        }

        double sum = sinks ? exp(((const float *) sinks->data)[i2] - top) : 0.0;
        std::fill(out.begin(), out.end(), 0.0);
        for (int64_t ic = 0; ic < n_kv; ic++) {
            if (s[ic] == -INFINITY) {
                continue;
            }
            const double p = exp(s[ic] - top);
            kvt_row_to_float(v, ic, i2 / (q->ne[2] / v->ne[2]), i3 / (q->ne[3] / v->ne[3]), row_v.data());
            for (int64_t i = 0; i < DV; i++) {
                out[i] += p * row_v[i];
            }
            sum += p;
        }

        float * y = (float *) ((char *) dst->data + i2 * dst->nb[1] + i1 * dst->nb[2] + i3 * dst->nb[3]);
        for (int64_t i = 0; i < DV; i++) {
            y[i] = sum == 0.0 ? 0.0f : (float) (out[i] / sum);
        }
    }
}
