// kvt-types.h - the blocks of the low-bit cache types that are ours. Values of a block are d*level[code].
// Plain C, for the CPU, CUDA and tests. Files and options name types; the numbers never leave the process.
#pragma once

#include "kvt-table.h"

#include <stdint.h>

// levels of the codes, and of ggml's iq4_nl; 6 bits: code - 32
#define KVT_LEVELS_Q2     { -10, -3, 3, 10 }
#define KVT_LEVELS_Q3     { -127, -79, -45, -14, 14, 45, 79, 127 }

// levels of the groups of k2_64, k3_64 and k4_64, by the bits of a code; 6 bits: 4*code - 126. One standard deviation is 38.5 in all of
// them. Those of Lloyd and Max, divided by the share of a normal value's energy that they keep: so the values are not too short
#define KVT_LEVELS_K1 { -48, 48 }
#define KVT_LEVELS_K2 { -66, -20, 20, 66 }
#define KVT_LEVELS_K3 { -86, -54, -30, -10, 10, 30, 54, 86 }
#define KVT_LEVELS_K4 { -105, -80, -62, -49, -36, -25, -15, -5, 5, 15, 25, 36, 49, 62, 80, 105 }

#define KVT_LEVELS_IQ4_NL { -127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113 }

// group types: values 0..15 of a block are its first group, and so on; bits of a code are 4,2,1,1, or 6,3,2,1, or 6,4,3,3. K is such
// that its channels have one variance and come in order of what they matter, see kvt-cond.h
// qs: as with 2 bits, the low two bits of each code; k2_64 and k3_64: bits 3 and 2 of the first and second group where a group of one
// bit has room, k2_64: bit 2 of the first group in the third, bit 3 in the fourth, k3_64: bit 2 of the second group in the fourth
// qh of k3_64: bits 2 to 5 of the first group, of value i in the low half of byte i, of value i + 8 in the high half
// qh of k4_64: bits 0..3 of byte i: bits 2 to 5 of value i; bits 4, 5: bits 2, 3 of value i + 16; bit 6: bit 2 of value i + 32; bit 7: i + 48
//
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
typedef struct { kvt_half d; uint8_t qs[16];              } kvt_block_k2_64;
typedef struct { kvt_half d; uint8_t qs[16]; uint8_t qh[ 8]; } kvt_block_k3_64;
typedef struct { kvt_half d; uint8_t qs[16]; uint8_t qh[16]; } kvt_block_k4_64;
// clang-format on

#ifdef __cplusplus
#define KVT_STATIC_ASSERT static_assert
#else
#define KVT_STATIC_ASSERT _Static_assert
#endif
#define KVT_SIZE(NAME, name, number, n, bits) KVT_STATIC_ASSERT(sizeof(kvt_block_##name) == sizeof(kvt_half) + (n)*(bits)/8, "block of " #name);
KVT_TYPES(KVT_SIZE)
#undef KVT_SIZE
