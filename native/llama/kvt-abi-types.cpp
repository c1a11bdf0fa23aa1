// kvt-abi-types.cpp - kvt.h: cache types, and the CPU's own codec of each for the calibration
#include "kvt.h"
#include "kvt-error.h"
#include "kvt-names.h"
#include "kvt-text.h"

#include "llama-impl.h"

#include "ggml.h"
#include "ggml-cpu.h"

#include <cstring>

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
    ggml_cpu_init(); // tables of the f16 conversion
    if (type == GGML_TYPE_F32) {
        memcpy(dst, x, n_rows * ggml_row_size(type, n_per_row));
        return 0;
    }
    const ggml_from_float_t from_float = ggml_get_type_traits_cpu(type)->from_float;
    for (int64_t i = 0; i < n_rows; i++) {
        from_float(x + i * n_per_row, (uint8_t *) dst + i * ggml_row_size(type, n_per_row), n_per_row);
    }
    return 0;
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
