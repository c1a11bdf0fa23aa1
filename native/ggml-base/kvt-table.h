// kvt-table.h - what a K or V cache may hold: a row for each type, from the most to the least precise. Plain C, and no more than
// what a list of types needs: it is for all that include ggml.h, and CMake has the preprocessor list the names (kvt-cuda.cmake)
#pragma once

// G(name in capitals)                                                          ggml's own
// X(name in capitals, name, number, values in a block, bits of a code)         ours; kB_N: bits on average, in four groups; tB_N: trellis
// A number is never used again; upstream takes the next free one, so ours are far above.
#define KVT_CACHE_TYPES(G, X) \
    G(F32)    \
    G(F16)    \
    G(BF16)   \
    G(Q8_0)   \
    X(Q6_32, q6_32, 204, 32, 6) \
    G(Q5_1)   \
    G(Q5_0)   \
    X(K5_64, k5_64, 211, 64, 5) \
    G(Q4_1)   \
    G(Q4_0)   \
    G(IQ4_NL) \
    X(T4_64, t4_64, 210, 64, 4) \
    X(K4_64, k4_64, 207, 64, 4) \
    X(Q3_32, q3_32, 203, 32, 3) \
    X(T3_64, t3_64, 209, 64, 3) \
    X(Q3_64, q3_64, 202, 64, 3) \
    X(K3_64, k3_64, 206, 64, 3) \
    X(Q2_32, q2_32, 201, 32, 2) \
    X(T2_64, t2_64, 208, 64, 2) \
    X(Q2_64, q2_64, 200, 64, 2) \
    X(K2_64, k2_64, 205, 64, 2)

// types whose quarters of a block have bits of their own: for a K in a basis (kvt-cond.h)
#define KVT_GROUP_TYPES(X) X(K5_64) X(K4_64) X(K3_64) X(K2_64)

// ours alone
#define KVT_TYPES(X)   KVT_CACHE_TYPES(KVT_NO_ROW, X)
#define KVT_NO_ROW(NAME)

// in ggml_type, and its count: one more than the largest number
#define KVT_TYPE_ENUM(NAME, name, number, n, bits) GGML_TYPE_##NAME = (number),
#define KVT_TYPE_COUNT 212

// in other lists, switches and parsers
#define KVT_TYPE_ITEM(NAME, name, number, n, bits)            GGML_TYPE_##NAME,
#define KVT_TYPE_CASE(NAME, name, number, n, bits)            case GGML_TYPE_##NAME:
#define KVT_TYPE_RETURN_IF_NAMED(NAME, name, number, n, bits) if (s == #name) { return GGML_TYPE_##NAME; }
