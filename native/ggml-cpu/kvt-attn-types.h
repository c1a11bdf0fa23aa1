// kvt-attn-types.h - what attention must know of a type. A type without a row goes through ggml's to_float.
#pragma once

#include "kvt-attn-few.h"

struct kvt_attn_type {
    ggml_type     type;
    int           n;       // values in a block; head sizes must be a multiple of it
    kvt_unpack_t  unpack;  // to floats
    kvt_product_t product; // if rows can be read as they are
#ifdef KVT_DOT
    kvt_codes_t  codes_k, codes_v; // for products of integers
    kvt_scales_t scales;
    int          zero;
    bool         has_min;
    kvt_few_k_t  few_k; // null where KVT_FEW_ROWS is 0
    kvt_few_v_t  few_v;
    int          few_v_max; // rows
#endif
};

#define KVT_FLOATS(TYPE, STEP) { GGML_TYPE_##TYPE, KVT_VW, kvt_unpack<STEP>, kvt_product<STEP> }
#ifdef KVT_FEW
#define KVT_FEW_OF(ROW) kvt_few_k_of<ROW>, kvt_few_v_of<ROW>, kvt_few_v_max<ROW>()
#else
#define KVT_FEW_OF(ROW) nullptr, nullptr, 0
#endif
#ifdef KVT_DOT
#define KVT_BLOCK(TYPE, ROW) \
    { GGML_TYPE_##TYPE, ROW::n, nullptr, nullptr, kvt_codes_k<ROW>, kvt_codes_v<ROW>, kvt_scales<ROW>, ROW::ZERO, ROW::HAS_MIN, KVT_FEW_OF(ROW) }
#else
#define KVT_BLOCK(TYPE, ROW)  { GGML_TYPE_##TYPE, ROW::n, kvt_unpack_block<ROW>, nullptr }
#endif
#define KVT_ROW(NAME, name, number, n, bits) KVT_BLOCK(NAME, kvt_row_##name),

static const kvt_attn_type kvt_attn_types[] = {
    KVT_FLOATS(F32, kvt_step_float),
    KVT_FLOATS(F16, kvt_step_f16),
    KVT_FLOATS(BF16, kvt_step_bf16),
#ifdef KVT_BLOCKS
    KVT_BLOCK(Q8_0, kvt_row_q8_0),
    KVT_BLOCK(Q4_0, kvt_row_q4_0),
    KVT_BLOCK(Q4_1, kvt_row_q4_1),
    KVT_BLOCK(Q5_0, kvt_row_q5_0),
    KVT_BLOCK(Q5_1, kvt_row_q5_1),
    KVT_BLOCK(IQ4_NL, kvt_row_iq4_nl),
    KVT_TYPES(KVT_ROW)
#endif
};
