// kvt-types.h - the blocks of the low-bit cache types that are ours. Values of a block are d*level[code].
// Plain C, for the CPU, CUDA and tests. Files and options name types; the numbers never leave the process.
#pragma once

#include "kvt-table.h"

#include <stdint.h>

// levels of the codes, and of ggml's iq4_nl; 6 bits: code - 32
#define KVT_LEVELS_Q2     { -10, -3, 3, 10 }
#define KVT_LEVELS_Q3     { -127, -79, -45, -14, 14, 45, 79, 127 }
#define KVT_LEVELS_IQ4_NL { -127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113 }

// qs, 2 bits: bits 2j, 2j+1 of byte i are those of value i + j*sizeof(qs)
// qh, 3 bits: bit v of the little-endian number is the third bit of value v
// ql, 6 bits: the low 4 bits of value i in the low half of byte i, of value i + 16 in the high half; qh: as qs, bits 4 and 5
typedef uint16_t kvt_half;

// clang-format off
typedef struct { kvt_half d; uint8_t qs[16];             } kvt_block_q2_64;
typedef struct { kvt_half d; uint8_t qs[ 8];             } kvt_block_q2_32;
typedef struct { kvt_half d; uint8_t qs[16]; uint8_t qh[8]; } kvt_block_q3_64;
typedef struct { kvt_half d; uint8_t qs[ 8]; uint8_t qh[4]; } kvt_block_q3_32;
typedef struct { kvt_half d; uint8_t ql[16]; uint8_t qh[8]; } kvt_block_q6_32;
// clang-format on

#ifdef __cplusplus
#define KVT_STATIC_ASSERT static_assert
#else
#define KVT_STATIC_ASSERT _Static_assert
#endif
#define KVT_SIZE(NAME, name, number, n, bits) KVT_STATIC_ASSERT(sizeof(kvt_block_##name) == sizeof(kvt_half) + (n)*(bits)/8, "block of " #name);
KVT_TYPES(KVT_SIZE)
#undef KVT_SIZE
