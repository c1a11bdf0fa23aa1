// kvt-attn-unpack.h - how a type's values come out of its bytes. A new type is a struct here, and a row in kvt_attn_types if it is ggml's.
//   floats  load(): KVT_VW values of a row (kvt-attn-gemm.h)
//   blocks  codes(): bytes c, d() and, if HAS_MIN, m(): the values are d*(c - ZERO) + m. Where each byte of a code's vectors comes of one byte
//           of a vector that is loaded, two functions: load() of a piece of the block, and unpack() of the bytes, in whatever order
#pragma once

#include "kvt-attn-gemm.h"
#include "kvt-types.h"

#define GGML_COMMON_DECL_C
#include "ggml-common.h"

#include <cstddef>

//
// floats
//

// n_rows rows of n values, nb bytes apart, to dst, ld floats apart
typedef void (*kvt_unpack_t)(const char * src, size_t nb, int n_rows, int64_t n, float * dst, int64_t ld);

template <typename T>
static void kvt_unpack(const char * src, size_t nb, int n_rows, int64_t n, float * dst, int64_t ld) {
    for (int r = 0; r < n_rows; r++) {
        const typename T::element * row = (const typename T::element *) (src + r * nb);
        for (int64_t i = 0; i < n; i += KVT_VW) {
            vf_store(dst + r * ld + i, T::load(row + i));
        }
    }
}

// C[n_rows][n] += P[n_rows][ldp] * rows, as kvt_unpack would give them
typedef void (*kvt_product_t)(int n_rows, const float * P, int64_t ldp, const char * src, size_t nb, int n_kv, int64_t n, float * C, kvt_ahead & ahead);

template <typename T>
static void kvt_product(int n_rows, const float * P, int64_t ldp, const char * src, size_t nb, int n_kv, int64_t n, float * C, kvt_ahead & ahead) {
    typedef typename T::element element;
    kvt_gemm<T, kvt_scale_none>({ n_rows, n, n_kv, P, ldp, (const element *) src, (int64_t) (nb / sizeof(element)), C, n, true, {}, nullptr, 0 }, ahead);
}

//
// blocks of KVT_VW/4 rows: the first at p, each next one nb bytes further
//

#ifdef KVT_BLOCKS

static KVT_INLINE vb vb_shr(vb a, int n) {
    return vb_and(vb_shr16(a, n), vb_set1((int8_t) (255 >> n)));
}

// nibbles: values 0..15 in the low ones, 16..31 in the high ones
static KVT_INLINE void vb_nibbles(vb q, vb * c) {
    c[0] = vb_and(q, vb_set1(15));
    c[1] = vb_shr(q, 4);
}

// x for each of 16*n values whose bit is set: the bits are at qh, 16 to a vector
template <int n>
static KVT_INLINE void vb_add_bits(const char * qh, size_t nb, int8_t x, vb * c) {
    static const int8_t bits[16]  = { 1, 2, 4, 8, 16, 32, 64, -128, 1, 2, 4, 8, 16, 32, 64, -128 };
    static const int8_t bytes[16] = { 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1 };
    const vb            h         = n == 2 ? vb_load4(qh, nb) : vb_load8(qh, nb);
    for (int i = 0; i < n; i++) {
        c[i] = vb_or(c[i], vb_test(vb_look(h, vb_or(vb_lut(bytes), vb_set1((int8_t) (2 * i)))), vb_lut(bits), vb_set1(x)));
    }
}

// 2 bits of 64 values, in 16 bytes: bits 2j, 2j + 1 of byte i are those of value i + 16*j
static KVT_INLINE void vb_quarters64(vb q, vb * c) {
    for (int j = 0; j < 4; j++) {
        c[j] = vb_and(vb_shr16(q, 2 * j), vb_set1(3));
    }
}

// of 32 values, in 8 bytes: of value i + 8*j
static KVT_INLINE void vb_quarters32(const char * qs, size_t nb, vb * c) {
    static const int8_t even[16] = { 3, 3, 3, 3, 3, 3, 3, 3 }, odd[16] = { 0, 0, 0, 0, 0, 0, 0, 0, 3, 3, 3, 3, 3, 3, 3, 3 };
    const vb            q = vb_load8(qs, nb);
    for (int j = 0; j < 2; j++) {
        c[j] = vb_or(vb_and(vb_shr16(q, 4 * j), vb_lut(even)), vb_and(vb_shr16(q, 4 * j + 2), vb_lut(odd)));
    }
}

// bytes that are looked up, around KVT_AROUND(128)
struct kvt_table {
    int8_t x[16];
};

template <int n>
static constexpr kvt_table kvt_around(const int8_t (&levels)[n], int zero = KVT_AROUND(128)) {
    kvt_table t = {};
    for (int i = 0; i < n; i++) {
        const int x = levels[i] + zero;
        t.x[i]      = (int8_t) (x > 127 ? x - 256 : x);
    }
    return t;
}

template <int n>
static KVT_INLINE void vb_levels(const kvt_table & levels, vb * c) {
    for (int j = 0; j < n; j++) {
        c[j] = vb_look(vb_lut(levels.x), c[j]);
    }
}

// c - x, around KVT_AROUND(128)
static KVT_INLINE vb vb_less(vb c, int x) {
    return x == KVT_AROUND(128) ? c : vb_sub(c, vb_set1((int8_t) (x - KVT_AROUND(128))));
}

template <typename B, int N, int Z, bool M = false>
struct kvt_row_block {
    typedef B            block;
    static const int     n       = N;
    static const int     ZERO    = KVT_AROUND(Z);
    static const bool    HAS_MIN = M;
    static const int     PIECES  = 0; // of load() and unpack()
    static KVT_INLINE vb load(const char * p, size_t nb, int piece) { return vb_load(p + offsetof(B, qs) + 16 * piece, nb); }
};

#define KVT_AT(FIELD) (p + offsetof(block, FIELD))

struct kvt_row_q8_0 : kvt_row_block<block_q8_0, QK8_0, 128> {
    static const int       PIECES = 2;
    static KVT_INLINE void unpack(vb q, vb * c) { c[0] = vb_less(q, 0); }
};

struct kvt_row_q4_0 : kvt_row_block<block_q4_0, QK4_0, 8> {
    static const int       PIECES = 1;
    static KVT_INLINE void unpack(vb q, vb * c) {
        vb_nibbles(q, c);
        c[0] = vb_sub(c[0], vb_set1(8 - ZERO));
        c[1] = vb_sub(c[1], vb_set1(8 - ZERO));
    }
};

struct kvt_row_q4_1 : kvt_row_block<block_q4_1, QK4_1, 0, true> {
    static const int       PIECES = 1;
    static KVT_INLINE void unpack(vb q, vb * c) { vb_nibbles(q, c); }
};

struct kvt_row_q5_0 : kvt_row_block<block_q5_0, QK5_0, 16> {
    static KVT_INLINE void codes(const char * p, size_t nb, vb * c) {
        vb_nibbles(vb_load(KVT_AT(qs), nb), c);
        vb_add_bits<2>(KVT_AT(qh), nb, 16, c);
        c[0] = vb_sub(c[0], vb_set1(16 - ZERO));
        c[1] = vb_sub(c[1], vb_set1(16 - ZERO));
    }
};

struct kvt_row_q5_1 : kvt_row_block<block_q5_1, QK5_1, 0, true> {
    static KVT_INLINE void codes(const char * p, size_t nb, vb * c) {
        vb_nibbles(vb_load(KVT_AT(qs), nb), c);
        vb_add_bits<2>(KVT_AT(qh), nb, 16, c);
    }
};

static constexpr kvt_table kvt_levels_q2     = kvt_around(KVT_LEVELS_Q2);
static constexpr kvt_table kvt_levels_q3     = kvt_around(KVT_LEVELS_Q3);
static constexpr kvt_table kvt_levels_iq4_nl = kvt_around(KVT_LEVELS_IQ4_NL);

struct kvt_row_iq4_nl : kvt_row_block<block_iq4_nl, QK4_NL, 128> {
    static const int       PIECES = 1;
    static KVT_INLINE void unpack(vb q, vb * c) {
        vb_nibbles(q, c);
        vb_levels<2>(kvt_levels_iq4_nl, c);
    }
};

struct kvt_row_q6_32 : kvt_row_block<kvt_block_q6_32, 32, 32> {
    static KVT_INLINE void codes(const char * p, size_t nb, vb * c) {
        static constexpr kvt_table high = { { 0, 16, 32, 48 } };
        vb                         h[2];
        vb_quarters32(KVT_AT(qh), nb, h);
        vb_levels<2>(high, h);
        vb_nibbles(vb_load(KVT_AT(ql), nb), c);
        for (int j = 0; j < 2; j++) {
            c[j] = vb_sub(vb_or(c[j], h[j]), vb_set1(32 - ZERO));
        }
    }
};

struct kvt_row_q2_64 : kvt_row_block<kvt_block_q2_64, 64, 128> {
    static const int       PIECES = 1;
    static KVT_INLINE void unpack(vb q, vb * c) {
        vb_quarters64(q, c);
        vb_levels<4>(kvt_levels_q2, c);
    }
};

struct kvt_row_q2_32 : kvt_row_block<kvt_block_q2_32, 32, 128> {
    static KVT_INLINE void codes(const char * p, size_t nb, vb * c) {
        vb_quarters32(KVT_AT(qs), nb, c);
        vb_levels<2>(kvt_levels_q2, c);
    }
};

struct kvt_row_q3_64 : kvt_row_block<kvt_block_q3_64, 64, 128> {
    static KVT_INLINE void codes(const char * p, size_t nb, vb * c) {
        vb_quarters64(vb_load(KVT_AT(qs), nb), c);
        vb_add_bits<4>(KVT_AT(qh), nb, 4, c);
        vb_levels<4>(kvt_levels_q3, c);
    }
};

struct kvt_row_q3_32 : kvt_row_block<kvt_block_q3_32, 32, 128> {
    static KVT_INLINE void codes(const char * p, size_t nb, vb * c) {
        vb_quarters32(KVT_AT(qs), nb, c);
        vb_add_bits<2>(KVT_AT(qh), nb, 4, c);
        vb_levels<2>(kvt_levels_q3, c);
    }
};

// of 16 values, in 8 bytes: of values 0..7 in the low halves, of 8..15 in the high ones
static KVT_INLINE vb vb_halves(const char * qh, size_t nb) {
    static const int8_t low[16] = { 15, 15, 15, 15, 15, 15, 15, 15 }, high[16] = { 0, 0, 0, 0, 0, 0, 0, 0, 15, 15, 15, 15, 15, 15, 15, 15 };
    const vb            h = vb_load8(qh, nb);
    return vb_or(vb_and(h, vb_lut(low)), vb_and(vb_shr16(h, 4), vb_lut(high)));
}

// windows of 8 bits on a ring: their low and high halves, and the bytes before those of a vector
static constexpr kvt_table kvt_low_t2 = kvt_around(KVT_LEVELS_T2_LOW), kvt_high_t2 = { KVT_LEVELS_T2_HIGH };
static constexpr kvt_table kvt_low_t3 = kvt_around(KVT_LEVELS_T3_LOW), kvt_high_t3 = { KVT_LEVELS_T3_HIGH };
static constexpr kvt_table kvt_low_t4 = kvt_around(KVT_LEVELS_T4_LOW), kvt_high_t4 = { KVT_LEVELS_T4_HIGH };

static KVT_INLINE vb vb_window(const kvt_table & of_low, const kvt_table & of_high, vb low, vb high) {
    return vb_add(vb_look(vb_lut(of_low.x), low), vb_look(vb_lut(of_high.x), high));
}

static KVT_INLINE vb vb_before(vb a) {
    static const int8_t before[16] = { 15, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14 };
    return vb_look(a, vb_lut(before));
}

// a of `bits` bits >> n, and above what is left the low bits of b, as a nibble
static KVT_INLINE vb vb_across(vb a, vb b, int n, int bits = 8) {
    const int left = bits - n, ones = (1 << left) - 1;
    return vb_or(vb_and(vb_shr16(a, n), vb_set1((int8_t) ones)), vb_and(vb_shl16(b, left), vb_set1((int8_t) (15 & ~ones))));
}

static KVT_INLINE vb vb_nibble(vb a, int n) {
    return vb_and(vb_shr16(a, n), vb_set1(15));
}

struct kvt_row_t2_64 : kvt_row_block<kvt_block_t2_64, 64, 128> {
    static KVT_INLINE void codes(const char * p, size_t nb, vb * c) {
        const vb q = vb_load(KVT_AT(qs), nb), b = vb_before(q);
        const vb n4 = vb_nibble(q, 4), n6 = vb_across(q, b, 6);
        c[3] = vb_window(kvt_low_t2, kvt_high_t2, vb_nibble(q, 0), n4);
        c[2] = vb_window(kvt_low_t2, kvt_high_t2, vb_nibble(q, 2), n6);
        c[1] = vb_window(kvt_low_t2, kvt_high_t2, n4, vb_nibble(b, 0));
        c[0] = vb_window(kvt_low_t2, kvt_high_t2, n6, vb_nibble(b, 2));
    }
};

struct kvt_row_t3_64 : kvt_row_block<kvt_block_t3_64, 64, 128> {
    static KVT_INLINE void codes(const char * p, size_t nb, vb * c) {
        const vb q = vb_load(KVT_AT(qs), nb), h = vb_halves(KVT_AT(qh), nb), b = vb_before(q);
        const vb above = vb_or(h, vb_shl16(vb_nibble(b, 0), 4)); // bits 8 to 15, as above those of q
        c[3]           = vb_window(kvt_low_t3, kvt_high_t3, vb_nibble(q, 0), vb_nibble(q, 4));
        c[2]           = vb_window(kvt_low_t3, kvt_high_t3, vb_nibble(q, 3), vb_across(q, h, 7));
        c[1]           = vb_window(kvt_low_t3, kvt_high_t3, vb_across(q, h, 6), vb_nibble(above, 2));
        c[0]           = vb_window(kvt_low_t3, kvt_high_t3, vb_nibble(above, 1), vb_nibble(b, 1));
    }
};

struct kvt_row_t4_64 : kvt_row_block<kvt_block_t4_64, 64, 128> {
    static KVT_INLINE void codes(const char * p, size_t nb, vb * c) {
        const vb q = vb_load(KVT_AT(qs), nb), h = vb_load(KVT_AT(qh), nb);
        const vb q0 = vb_nibble(q, 0), q4 = vb_nibble(q, 4), h0 = vb_nibble(h, 0), h4 = vb_nibble(h, 4);
        c[3] = vb_window(kvt_low_t4, kvt_high_t4, q0, q4);
        c[2] = vb_window(kvt_low_t4, kvt_high_t4, q4, h0);
        c[1] = vb_window(kvt_low_t4, kvt_high_t4, h0, h4);
        c[0] = vb_window(kvt_low_t4, kvt_high_t4, h4, vb_before(q0));
    }
};

// group types: their first group is c[0]
template <int n_groups>
struct kvt_tables {
    kvt_table group[n_groups];
};

template <int n>
static constexpr kvt_tables<n> kvt_tables_of(const int8_t (&levels)[n][16], int zero) {
    kvt_tables<n> t = {};
    for (int i = 0; i < n; i++) {
        t.group[i] = kvt_around(levels[i], zero);
    }
    return t;
}

static constexpr kvt_tables<4> kvt_low_k2 = kvt_tables_of(KVT_LEVELS_K2_LOW, KVT_AROUND(128)), kvt_high_k2 = kvt_tables_of(KVT_LEVELS_K2_HIGH, 0);
static constexpr kvt_tables<3> kvt_low_k3 = kvt_tables_of(KVT_LEVELS_K3_LOW, KVT_AROUND(128)), kvt_high_k3 = kvt_tables_of(KVT_LEVELS_K3_HIGH, 0);
static constexpr kvt_tables<3> kvt_low_k4 = kvt_tables_of(KVT_LEVELS_K4_LOW, KVT_AROUND(128)), kvt_high_k4 = kvt_tables_of(KVT_LEVELS_K4_HIGH, 0);
static constexpr kvt_tables<3> kvt_low_k5 = kvt_tables_of(KVT_LEVELS_K5_LOW, KVT_AROUND(128)), kvt_high_k5 = kvt_tables_of(KVT_LEVELS_K5_HIGH, 0);

struct kvt_row_k2_64 : kvt_row_block<kvt_block_k2_64, 64, 128> {
    static KVT_INLINE void codes(const char * p, size_t nb, vb * c) {
        const vb q = vb_load(KVT_AT(qs), nb), b = vb_before(q);
        c[3] = vb_window(kvt_low_k2.group[3], kvt_high_k2.group[3], vb_nibble(q, 0), vb_nibble(q, 4));
        c[2] = vb_window(kvt_low_k2.group[2], kvt_high_k2.group[2], vb_nibble(q, 1), vb_across(q, b, 5));
        c[1] = vb_window(kvt_low_k2.group[1], kvt_high_k2.group[1], vb_nibble(q, 2), vb_across(q, b, 6));
        c[0] = vb_window(kvt_low_k2.group[0], kvt_high_k2.group[0], vb_nibble(q, 4), vb_nibble(b, 0));
    }
};

struct kvt_row_k3_64 : kvt_row_block<kvt_block_k3_64, 64, 128> {
    static KVT_INLINE void codes(const char * p, size_t nb, vb * c) {
        const vb q = vb_load(KVT_AT(qs), nb), h = vb_halves(KVT_AT(qh), nb), b = vb_before(q);
        c[3] = vb_window(kvt_low_k3.group[2], kvt_high_k3.group[2], vb_nibble(q, 0), vb_across(q, b, 4, 6));
        c[2] = vb_window(kvt_low_k3.group[1], kvt_high_k3.group[1], vb_nibble(q, 1), vb_across(q, b, 5, 6));
        c[1] = vb_window(kvt_low_k3.group[0], kvt_high_k3.group[0], vb_across(q, b, 3, 6), vb_nibble(b, 1));
        c[0] = vb_less(vb_or(vb_and(vb_shr16(q, 4), vb_set1(12)), vb_shl16(h, 4)), 126);
    }
};

struct kvt_row_k4_64 : kvt_row_block<kvt_block_k4_64, 64, 128> {
    static KVT_INLINE void codes(const char * p, size_t nb, vb * c) {
        const vb q = vb_load(KVT_AT(qs), nb), h = vb_load(KVT_AT(qh), nb), b = vb_before(q);
        const vb above = vb_or(vb_and(h, vb_set1(1)), vb_shl16(vb_nibble(b, 0), 1)); // bits 8 to 12, as above those of q
        c[3]           = vb_window(kvt_low_k4.group[2], kvt_high_k4.group[2], vb_nibble(q, 0), vb_nibble(q, 4));
        c[2]           = vb_window(kvt_low_k4.group[1], kvt_high_k4.group[1], vb_nibble(q, 2), vb_across(q, above, 6));
        c[1]           = vb_window(kvt_low_k4.group[0], kvt_high_k4.group[0], vb_across(q, above, 5), vb_nibble(b, 0));
        c[0]           = vb_less(vb_or(h, vb_set1(1)), 128);
    }
};

struct kvt_row_k5_64 : kvt_row_block<kvt_block_k5_64, 64, 128> {
    static KVT_INLINE void codes(const char * p, size_t nb, vb * c) {
        const vb q = vb_load(KVT_AT(qs), nb), h = vb_halves(KVT_AT(qh) + 16, nb);
        const vb above = vb_or(vb_and(vb_shr16(q, 7), vb_set1(1)), vb_and(vb_shl16(h, 1), vb_set1(14))); // bits 7 to 10
        const vb finer = vb_sub(vb_and(vb_shr16(h, 1), vb_set1(2 * KVT_FINE_K5)), vb_set1(KVT_FINE_K5));
        c[3]           = vb_window(kvt_low_k5.group[2], kvt_high_k5.group[2], vb_nibble(q, 0), vb_nibble(q, 4));
        c[2]           = vb_window(kvt_low_k5.group[1], kvt_high_k5.group[1], vb_nibble(q, 3), above);
        c[1]           = vb_add(vb_window(kvt_low_k5.group[0], kvt_high_k5.group[0], above, vb_nibble(vb_before(q), 0)), finer);
        c[0]           = vb_less(vb_load(KVT_AT(qh), nb), 128);
    }
};
KVT_STATIC_ASSERT(KVT_FINE_K5 == 2, "its bit is where twice this is");

template <typename T>
static KVT_INLINE void kvt_codes(const char * p, size_t nb, vb * c) {
    if constexpr (T::PIECES > 0) {
        for (int i = 0; i < T::PIECES; i++) {
            T::unpack(T::load(p, nb, i), c + i * T::n / 16 / T::PIECES);
        }
    } else {
        T::codes(p, nb, c);
    }
}

#endif
