// kvt-set-rows.cpp - rows written into a cache of our types on the CPU, by blocks
#include "kvt-set-rows.h"
#include "kvt-quants.h"

#define GGML_COMMON_DECL_CPP
#include "ggml-common.h"
#include "ggml-cpu-impl.h"
#include "ggml-cpu.h"

#include <algorithm>

template <typename idx_t>
static void kvt_set_rows(const ggml_compute_params * params, const ggml_tensor * src, const ggml_tensor * rows, ggml_tensor * dst) {
    const auto    from_float = ggml_get_type_traits_cpu(dst->type)->from_float;
    const int64_t n = ggml_blck_size(dst->type), size = ggml_type_size(dst->type), n_row = src->ne[0] / n;
    const int64_t n_block = n_row * ggml_nrows(src), per_thread = (n_block + params->nth - 1) / params->nth;
    const int64_t last = std::min(n_block, per_thread * (params->ith + 1));

    for (int64_t at = per_thread * params->ith; at < last;) {
        const int64_t first = at % n_row, count = std::min(n_row - first, last - at), row = at / n_row;
        const int64_t i1 = row % src->ne[1], i2 = row / src->ne[1] % src->ne[2], i3 = row / src->ne[1] / src->ne[2];
        const char *  index = (const char *) rows->data + i1 * rows->nb[0] + i2 % rows->ne[1] * rows->nb[1] + i3 % rows->ne[2] * rows->nb[2];
        const int64_t to    = *(const idx_t *) index;
        GGML_ASSERT(to >= 0 && to < dst->ne[1]);

        const char * x = (const char *) src->data + i1 * src->nb[1] + i2 * src->nb[2] + i3 * src->nb[3];
        char *       y = (char *) dst->data + to * dst->nb[1] + i2 * dst->nb[2] + i3 * dst->nb[3];
        from_float((const float *) x + first * n, y + first * size, count * n);
        at += count;
    }
}

bool kvt_set_rows_forward(const ggml_compute_params * params, ggml_tensor * dst) {
    const ggml_tensor *src = dst->src[0], *rows = dst->src[1];
    if (!kvt_is_type(dst->type) || src->type != GGML_TYPE_F32 || src->nb[0] != sizeof(float)) {
        return false;
    }
    if (rows->type == GGML_TYPE_I64) {
        kvt_set_rows<int64_t>(params, src, rows, dst);
    } else {
        kvt_set_rows<int32_t>(params, src, rows, dst);
    }
    return true;
}
