// The low-bit cache types that are ours: numbers, names, blocks. Values of a block are d*level[code].
// Plain C, for the CPU, CUDA and tests. Files and options name types; the numbers never leave the process.
#pragma once

#include <stdint.h>

// X(name in capitals, name, number, values in a block, bits of a code)
// A number is never used again; upstream takes the next free one, so ours are far above.
#define KVT_TYPES(X) \
    X(Q2_64, q2_64, 200, 64, 2) \
    X(Q2_32, q2_32, 201, 32, 2) \
    X(Q3_64, q3_64, 202, 64, 3) \
    X(Q3_32, q3_32, 203, 32, 3) \
    X(Q6_32, q6_32, 204, 32, 6)

// levels of the codes; 6 bits: code - 32
#define KVT_LEVELS_Q2 { -10, -3, 3, 10 }
#define KVT_LEVELS_Q3 { -127, -79, -45, -14, 14, 45, 79, 127 }

// qs, 2 bits: bits 2j, 2j+1 of byte i are those of value i + j*sizeof(qs)
// qh, 3 bits: bit v of the little-endian number is the third bit of value v
// ql, 6 bits: the low 4 bits of value i in the low half of byte i, of value i + 16 in the high half; qh: as qs, bits 4 and 5
typedef uint16_t kvt_half;

typedef struct { kvt_half d; uint8_t qs[16];             } kvt_block_q2_64;
typedef struct { kvt_half d; uint8_t qs[ 8];             } kvt_block_q2_32;
typedef struct { kvt_half d; uint8_t qs[16]; uint8_t qh[8]; } kvt_block_q3_64;
typedef struct { kvt_half d; uint8_t qs[ 8]; uint8_t qh[4]; } kvt_block_q3_32;
typedef struct { kvt_half d; uint8_t ql[16]; uint8_t qh[8]; } kvt_block_q6_32;

#ifdef __cplusplus
#define KVT_STATIC_ASSERT static_assert
#else
#define KVT_STATIC_ASSERT _Static_assert
#endif
#define KVT_SIZE(NAME, name, number, n, bits) KVT_STATIC_ASSERT(sizeof(kvt_block_##name) == sizeof(kvt_half) + (n)*(bits)/8, "block of " #name);
KVT_TYPES(KVT_SIZE)
#undef KVT_SIZE
