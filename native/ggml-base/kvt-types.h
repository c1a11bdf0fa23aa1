// kvt-types.h - the blocks of the low-bit cache types that are ours. Values of a block are d*level[code].
// Plain C, for the CPU, CUDA and tests. Files and options name types; the numbers never leave the process.
#pragma once

#include "kvt-table.h"

#include <stdint.h>

// levels of the codes, and of ggml's iq4_nl; 6 bits: code - 32
#define KVT_LEVELS_Q2     { -10, -3, 3, 10 }
#define KVT_LEVELS_Q3     { -127, -79, -45, -14, 14, 45, 79, 127 }

// codes on a ring: the levels by the low and the high half of a window of 8 bits, see below. One standard deviation is 32
#define KVT_LEVELS_T2_LOW  { 41, -36, 13, -7, -12, 3, -36, 29, 23, -23, -12, 12, -27, -1, 33, 3 }
#define KVT_LEVELS_T2_HIGH { -8, -10, -34, 0, -30, 12, 12, 12, 32, 38, -14, -28, 10, -46, 10, 44 }
#define KVT_LEVELS_T3_LOW  { -14, 19, 3, 42, 10, -29, 29, -6, -8, -31, -19, 4, 13, 43, 25, -53 }
#define KVT_LEVELS_T3_HIGH { 8, -34, 36, 50, -4, 32, -48, 10, 22, 20, -20, -20, -34, 2, -10, -8 }
#define KVT_LEVELS_T4_LOW  { -18, 45, -63, 27, -48, -25, 8, -5, 20, 34, -3, -34, 61, 3, -11, 14 }
#define KVT_LEVELS_T4_HIGH { 12, -10, -20, 28, 28, -32, -24, -42, 6, 0, 44, 2, 14, -6, 20, -16 }

// of each group on the ring: those of the least squared error, a standard deviation being 32 (k2_64) or 36, divided by the share of a normal
// value's energy that kept says. So K is a little short: by the KLD that is better than the full length, which V has
#define KVT_LEVELS_K2_LOW { \
    { -23, 32, -13, -64, 42, 24, -6, 8, 17, 15, 5, 63, -15, -2, -40, -31 }, \
    { 10, -46, -13, 44, 11, 41, -34, -9, 34, -11, 11, -42, -46, 11, -12, 44 }, \
    { 36, -24, 16, -23, 34, -44, -12, 48, -36, 34, 26, -26, -30, 39, -49, 4 }, \
    { 28, -26, -27, 19, 25, -9, 21, -42, -27, 31, -30, 29, -13, 23, -28, 32 } }
#define KVT_LEVELS_K2_HIGH { \
    { -16, 26, -4, 38, 20, -22, -34, -14, -6, 0, 6, -6, -28, 36, 14, -16 }, \
    { 30, 40, 18, -32, 2, 16, 4, 22, -4, -46, -8, 20, -20, -10, -22, 0 }, \
    { 18, 20, 0, -26, 10, -4, 6, -6, 28, -6, -2, 48, -4, -28, -34, -28 }, \
    { 8, 6, -46, 2, 12, -36, 10, -10, -44, 46, 24, 0, 44, -16, -22, 24 } }
#define KVT_LEVELS_K3_LOW { \
    { -59, 53, 8, -17, 34, -6, 17, -33, -8, 13, 32, 58, 30, 2, -42, -22 }, \
    { 17, -44, -4, 40, 46, 21, -32, -9, -5, -6, -45, 29, -42, -10, 9, 41 }, \
    { 30, -28, 15, -35, 28, -35, -35, 33, 25, -29, 28, -36, -24, 21, -41, 31 } }
#define KVT_LEVELS_K3_HIGH { \
    { -38, -22, -8, 28, -18, 16, -32, 8, 24, -54, 14, -28, -6, 50, 2, -10 }, \
    { 20, 56, 20, -38, 14, -18, 2, 42, -4, -56, -34, 26, -28, 6, -8, -16 }, \
    { -4, -20, 22, 14, -42, -2, 38, 26, -16, -54, 6, 54, 56, 20, -34, -2 } }
#define KVT_LEVELS_G4_LOW  { -12, 14, -53, 52, -36, -28, 29, -44, -19, -63, 36, 63, 6, 22, -4, 43 }
#define KVT_LEVELS_G4_HIGH { -54, 22, -12, -6, 10, -30, -34, 30, -2, 18, 20, 6, -24, 50, 32, -20 }
#define KVT_LEVELS_G3_LOW  { 43, -62, -7, -39, 2, 29, -24, 14, 7, -38, 62, 30, -22, 43, -5, 17 }
#define KVT_LEVELS_G3_HIGH { 54, 38, -6, -8, -38, -42, 12, 4, 24, -52, -26, 12, 0, -2, -16, -22 }
#define KVT_LEVELS_K4_LOW { KVT_LEVELS_G4_LOW, KVT_LEVELS_G3_LOW, \
    { 20, 50, -38, -4, 35, -48, 6, -23, 39, -51, 10, -12, -28, -9, 14, 38 } }
#define KVT_LEVELS_K4_HIGH { KVT_LEVELS_G4_HIGH, KVT_LEVELS_G3_HIGH, \
    { 14, -26, -18, 32, 40, -44, -32, 22, 18, -50, 2, 36, -20, -10, 52, 0 } }

#define KVT_LEVELS_K5_LOW  { KVT_LEVELS_G4_LOW, KVT_LEVELS_G4_LOW, KVT_LEVELS_G3_LOW }
#define KVT_LEVELS_K5_HIGH { KVT_LEVELS_G4_HIGH, KVT_LEVELS_G4_HIGH, KVT_LEVELS_G3_HIGH }
#define KVT_FINE_K5        2

#define KVT_LEVELS_IQ4_NL { -127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113 }

// trellis types: the codes of a block are a ring of bits, 2, 3 or 4 for each value, and the level of a value is that of the 8 bits that end
// with its own: LOW[window & 15] + HIGH[window >> 4]. So a value has 256 levels, of which its neighbours leave it 4, 8 or 16, and the
// encoder chooses the way around. The order on the ring is value 0, 16, 32, 48, 1, 17, ...; the first of a value's bits is its highest
//
// group types: values 0..15 of a block are its first group, and so on; bits of a code are 4,2,1,1, or 6,3,2,1, or 7,4,3,2, or 8,5,4,3. K
// is such that its channels have one variance and come in order of what they matter, see kvt-cond.h. The groups are on such a ring, but for
// the first of k3_64, k4_64 and k5_64, with levels 4*code - 126, 2*code - 127 and code - 128. The fifth bit of the second group of k5_64 is
// not on the ring either: the level is KVT_FINE_K5 more where it is set, and as much less where it is not
//
// bits of values i, i + 16, i + 32, i + 48, of both: those on the ring are a number, a fifth bit is above them, and a first group's code
// that is not on it above that. The low 8 of its 8, 12, 16 or 20 bits are qs[i]; of 12 bits, the others are in qh, of i below 8 in the low
// half of byte i, of others in the high half of byte i - 8; of 16 bits, they are qh[i]; of 20, the next 4 are in qh[16] and on, as those of
// 12 are in qh, and the last 8 are qh[i]
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
typedef struct { kvt_e5m3 d; uint8_t qs[16]; uint8_t qh[24]; } kvt_block_k5_64;
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
