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

// trellis types: the levels by the low and the high half of a window of 8 bits, see below. One standard deviation is 32
#define KVT_LEVELS_T2_LOW  { 41, -36, 13, -7, -12, 3, -36, 29, 23, -23, -12, 12, -27, -1, 33, 3 }
#define KVT_LEVELS_T2_HIGH { -8, -10, -34, 0, -30, 12, 12, 12, 32, 38, -14, -28, 10, -46, 10, 44 }
#define KVT_LEVELS_T3_LOW  { -14, 19, 3, 42, 10, -29, 29, -6, -8, -31, -19, 4, 13, 43, 25, -53 }
#define KVT_LEVELS_T3_HIGH { 8, -34, 36, 50, -4, 32, -48, 10, 22, 20, -20, -20, -34, 2, -10, -8 }
#define KVT_LEVELS_T4_LOW  { -18, 45, -63, 27, -48, -25, 8, -5, 20, 34, -3, -34, 61, 3, -11, 14 }
#define KVT_LEVELS_T4_HIGH { 12, -10, -20, 28, 28, -32, -24, -42, 6, 0, 44, 2, 14, -6, 20, -16 }

#define KVT_LEVELS_IQ4_NL { -127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113 }

// group types: values 0..15 of a block are its first group, and so on; bits of a code are 4,2,1,1, or 6,3,2,1, or 6,4,3,3. K is such
// that its channels have one variance and come in order of what they matter, see kvt-cond.h
// qs: as with 2 bits, the low two bits of each code; k2_64 and k3_64: bits 3 and 2 of the first and second group where a group of one
// bit has room, k2_64: bit 2 of the first group in the third, bit 3 in the fourth, k3_64: bit 2 of the second group in the fourth
// qh of k3_64: bits 2 to 5 of the first group, of value i in the low half of byte i, of value i + 8 in the high half
// qh of k4_64: bits 0..3 of byte i: bits 2 to 5 of value i; bits 4, 5: bits 2, 3 of value i + 16; bit 6: bit 2 of value i + 32; bit 7: i + 48
//
// trellis types: the codes of a block are a ring of bits, 2, 3 or 4 for each value, and the level of a value is that of the 8 bits that end
// with its own: LOW[window & 15] + HIGH[window >> 4]. So a value has 256 levels, of which its neighbours leave it 4, 8 or 16, and the
// encoder chooses the way around. The order on the ring is value 0, 16, 32, 48, 1, 17, ...; the first of a value's bits is its highest
// Bits of four values i, i + 16, i + 32, i + 48, a number of 8, 12 or 16 bits: the low 8 are qs[i];
// 3 bits: its bits 8 to 11 are in qh, of i below 8 in the low half of byte i, of others in the high half of byte i - 8; 4 bits: qh[i]
//
// d, a byte: bits 7 to 14 of an f16, which are its exponent and the first three bits of its fraction. No scale is negative
// qs, 2 bits: bits 2j, 2j+1 of byte i are those of value i + j*sizeof(qs)
// qh, 3 bits: bit v of the little-endian number is the third bit of value v
// ql, 6 bits: the low 4 bits of value i in the low half of byte i, of value i + 16 in the high half; qh: as qs, bits 4 and 5
typedef uint16_t kvt_half;
typedef uint8_t  kvt_e5m3;

// a block's d as f16, and what it is of an f16
#define KVT_HALF_OF(d)       ((kvt_half) (sizeof(d) == sizeof(kvt_e5m3) ? (d) << 7 : (d)))
#define KVT_SET_SCALE(to, d) ((to) = sizeof(to) == sizeof(kvt_e5m3) ? (d) >> 7 : (d))

// clang-format off
typedef struct { kvt_half d; uint8_t qs[16];             } kvt_block_q2_64;
typedef struct { kvt_half d; uint8_t qs[ 8];             } kvt_block_q2_32;
typedef struct { kvt_half d; uint8_t qs[16]; uint8_t qh[8]; } kvt_block_q3_64;
typedef struct { kvt_half d; uint8_t qs[ 8]; uint8_t qh[4]; } kvt_block_q3_32;
typedef struct { kvt_half d; uint8_t ql[16]; uint8_t qh[8]; } kvt_block_q6_32;
typedef struct { kvt_e5m3 d; uint8_t qs[16];              } kvt_block_k2_64;
typedef struct { kvt_e5m3 d; uint8_t qs[16]; uint8_t qh[ 8]; } kvt_block_k3_64;
typedef struct { kvt_e5m3 d; uint8_t qs[16]; uint8_t qh[16]; } kvt_block_k4_64;
typedef struct { kvt_e5m3 d; uint8_t qs[16];              } kvt_block_t2_64;
typedef struct { kvt_e5m3 d; uint8_t qs[16]; uint8_t qh[ 8]; } kvt_block_t3_64;
typedef struct { kvt_e5m3 d; uint8_t qs[16]; uint8_t qh[16]; } kvt_block_t4_64;
// clang-format on

#ifdef __cplusplus
#define KVT_STATIC_ASSERT static_assert
#else
#define KVT_STATIC_ASSERT _Static_assert
#endif
#define KVT_SIZE(NAME, name, number, n, bits) KVT_STATIC_ASSERT(sizeof(kvt_block_##name) == sizeof(((kvt_block_##name *) 0)->d) + (n)*(bits)/8, "block of " #name);
KVT_TYPES(KVT_SIZE)
#undef KVT_SIZE
