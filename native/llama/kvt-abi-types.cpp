// kvt-abi-types.cpp - kvt.h: cache types, and the CPU's own codec of each for the calibration
#include "kvt.h"
#include "kvt-error.h"
#include "kvt-names.h"
#include "kvt-text.h"

#include "llama-impl.h"

#include "ggml-cpp.h"

#include <cstring>
#include <numeric>
#include <vector>

const char * kvt_type_name(int32_t i) {
    const ggml_type type = kvt_type_at(i);
    return type != KVT_TYPE_NONE ? ggml_type_name(type) : nullptr;
}

int32_t kvt_type_number(const char * name) {
    const ggml_type type = name ? kvt_type_from_name(name) : KVT_TYPE_NONE;
    return type != KVT_TYPE_NONE ? (int32_t) type : kvt_error(KVT_E_TYPE, format("'%s' is not the name of a cache type", name ? kvt_printable(name).c_str() : "(null)"));
}

// checks the arguments and finds the type; KVT_TYPE_NONE with the error set if they are not usable
static ggml_type kvt_codec_type(const char * name, int64_t n_per_row, int32_t * err) {
    const ggml_type type = name ? kvt_type_from_name(name) : KVT_TYPE_NONE;
    if (type == KVT_TYPE_NONE) {
        *err = kvt_error(KVT_E_TYPE, format("'%s' is not the name of a cache type", name ? name : "(null)"));
        return KVT_TYPE_NONE;
    }
    if (n_per_row <= 0 || n_per_row > INT32_MAX || n_per_row % ggml_blck_size(type) != 0) {
        *err = kvt_error(KVT_E_ARG, format("%s: a row of %lld values, need a positive multiple of its block of %d", name, (long long) n_per_row, (int) ggml_blck_size(type)));
        return KVT_TYPE_NONE;
    }
    *err = 0;
    return type;
}

int64_t kvt_row_bytes(const char * name, int64_t n_per_row) {
    int32_t         err;
    const ggml_type type = kvt_codec_type(name, n_per_row, &err);
    return err ? err : (int64_t) ggml_row_size(type, n_per_row);
}

int32_t kvt_encode(const char * name, const float * x, int64_t n_rows, int64_t n_per_row, void * dst) {
    int32_t         err;
    const ggml_type type = kvt_codec_type(name, n_per_row, &err);
    if (err) {
        return err;
    }
    if (!x || !dst || n_rows < 0) {
        return kvt_error(KVT_E_ARG, "kvt_encode: x and dst must not be null, n_rows not negative");
    }
    const ggml_backend_ptr cpu(ggml_backend_init_by_type(GGML_BACKEND_DEVICE_TYPE_CPU, nullptr));
    if (!cpu) {
        return kvt_error(KVT_E_STATE, "kvt_encode: no CPU backend is loaded");
    }
    if (n_rows == 0) {
        return 0;
    }
    ggml_backend_reg_t reg = ggml_backend_dev_backend_reg(ggml_backend_get_device(cpu.get()));
    if (auto * set_n_threads = (ggml_backend_set_n_threads_t) ggml_backend_reg_get_proc_address(reg, "ggml_backend_set_n_threads")) {
        set_n_threads(cpu.get(), 1); // callers have threads of their own
    }
    constexpr size_t N_LEAF = 3;
    // what writes a cache: rows of f32 set in a tensor of the type
    const ggml_context_ptr ctx(ggml_init({ (N_LEAF + 1) * ggml_tensor_overhead() + ggml_graph_overhead_custom(N_LEAF, false), nullptr, /*.no_alloc =*/true }));
    ggml_tensor *          cache = ggml_new_tensor_2d(ctx.get(), type, n_per_row, n_rows);
    ggml_tensor *          rows  = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, n_per_row, n_rows);
    ggml_tensor *          where = ggml_new_tensor_1d(ctx.get(), GGML_TYPE_I64, n_rows);
    std::vector<int64_t>   index(n_rows);
    std::iota(index.begin(), index.end(), 0);
    cache->data = dst;
    rows->data  = const_cast<float *>(x);
    where->data = index.data();

    ggml_cgraph * graph = ggml_new_graph_custom(ctx.get(), N_LEAF, false);
    ggml_build_forward_expand(graph, ggml_set_rows(ctx.get(), cache, rows, where));
    return ggml_backend_graph_compute(cpu.get(), graph) == GGML_STATUS_SUCCESS ? 0 : kvt_error(KVT_E_STATE, "kvt_encode: the CPU backend failed");
}

int32_t kvt_decode(const char * name, const void * src, int64_t n_rows, int64_t n_per_row, float * y) {
    int32_t         err;
    const ggml_type type = kvt_codec_type(name, n_per_row, &err);
    if (err) {
        return err;
    }
    if (!src || !y || n_rows < 0) {
        return kvt_error(KVT_E_ARG, "kvt_decode: src and y must not be null, n_rows not negative");
    }
    if (type == GGML_TYPE_F32) {
        memcpy(y, src, n_rows * ggml_row_size(type, n_per_row));
        return 0;
    }
    for (int64_t i = 0; i < n_rows; i++) {
        ggml_get_type_traits(type)->to_float((const uint8_t *) src + i * ggml_row_size(type, n_per_row), y + i * n_per_row, n_per_row);
    }
    return 0;
}
