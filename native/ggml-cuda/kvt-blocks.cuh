// kvt-blocks.cuh - cache types on a GPU: one kvt_codec<type> each, which for ggml's own reads only
// Read four values at a time, as int8 levels in one register: d*level is the value, or d*level + m.
// Written by KVT_THREADS threads for each block, with the code of kvt-blocks.h, kvt-groups.h and kvt-trellis.h, and of what they include.
// Host code, too, with the instructions spelled out, so that tests compare it with the CPU's without a GPU.
#pragma once

#include "kvt-groups.h"
#include "kvt-quants.h"
#include "kvt-trellis.h"

static const int KVT_THREADS = 16; // that share a block when it is written

// ggml's, with the scale as bits
// clang-format off
typedef struct { kvt_half d; uint8_t qs[32]; }                      kvt_block_q8_0;
typedef struct { kvt_half d; uint8_t qs[16]; }                      kvt_block_q4_0;
typedef struct { kvt_half d, m; uint8_t qs[16]; }                   kvt_block_q4_1;
typedef struct { kvt_half d; uint8_t qh[4], qs[16]; }               kvt_block_q5_0;
typedef struct { kvt_half d, m; uint8_t qh[4], qs[16]; }            kvt_block_q5_1;
// clang-format on

//
// instructions
//

// four bytes out of eight, by the low three bits of each of the four low nibbles of sel
KVT_FN uint32_t kvt_prmt(uint32_t lo, uint32_t hi, uint32_t sel) {
#ifdef __CUDACC__
    return __byte_perm(lo, hi, sel);
#else
    const uint64_t bytes = (uint64_t) hi << 32 | lo;
    uint32_t       res   = 0;
    for (int i = 0; i < 4; i++) {
        res |= (uint32_t) (bytes >> 8 * (sel >> 4 * i & 7) & 0xFF) << 8 * i;
    }
    return res;
#endif
}

// four bytes at any address: from words that hold one of them
KVT_FN uint32_t kvt_load4(const uint8_t * x) {
#ifdef __CUDACC__
    const unsigned   over = (uintptr_t) x % 4;
    const uint32_t * word = (const uint32_t *) (x - over);
    return __funnelshift_r(word[0], word[over > 0], 8 * over);
#else
    uint32_t res;
    memcpy(&res, x, sizeof(res));
    return res;
#endif
}

//
// from codes, one in each byte, to levels
//

constexpr uint32_t kvt_byte(int level) {
    return level & 0xFFu;
}

// levels i .. i + 3 as bytes of a word; two levels: twice, so that they are read whatever the second bit of a code is
template <typename T, int n>
constexpr uint32_t kvt_word(const T (&level)[n], int i, int more = 0) {
    return kvt_byte(level[i] + more) | kvt_byte(level[i + 1] + more) << 8 | kvt_byte(level[(i + 2) % n] + more) << 16 | kvt_byte(level[(i + 3) % n] + more) << 24;
}

constexpr int kvt_table_q2[]     = KVT_LEVELS_Q2;
constexpr int kvt_table_q3[]     = KVT_LEVELS_Q3;
constexpr int kvt_table_iq4_nl[] = KVT_LEVELS_IQ4_NL;

constexpr uint32_t kvt_q2_0     = kvt_word(kvt_table_q2, 0);
constexpr uint32_t kvt_q3_0     = kvt_word(kvt_table_q3, 0);
constexpr uint32_t kvt_q3_4     = kvt_word(kvt_table_q3, 4);
constexpr uint32_t kvt_iq4_nl_0 = kvt_word(kvt_table_iq4_nl, 0);
constexpr uint32_t kvt_iq4_nl_4 = kvt_word(kvt_table_iq4_nl, 4);
constexpr uint32_t kvt_iq4_nl_8 = kvt_word(kvt_table_iq4_nl, 8);
constexpr uint32_t kvt_iq4_nl_c = kvt_word(kvt_table_iq4_nl, 12);

// one byte each -> one nibble each, in the low half
KVT_FN uint32_t kvt_nibbles(uint32_t codes) {
    return kvt_prmt(codes | codes >> 4, 0, 0x4420);
}

// four out of 16 levels, in words of four, by nibbles
KVT_FN uint32_t kvt_lookup16(uint32_t t0, uint32_t t4, uint32_t t8, uint32_t tc, uint32_t code) {
    return kvt_prmt(kvt_prmt(t0, t4, code), kvt_prmt(t8, tc, code), 0x3210 | (code & 0x8888) >> 1);
}

// bits 0, 1, 2, 3 -> bits 2, 6, 10, 14: the third bit of each nibble
KVT_FN uint32_t kvt_third_bits(uint32_t bits) {
    return (bits * (0x41 << 2) & 0x0C0C) * 9 & 0x4444;
}

//
// 2-bit codes of values 4*i .. 4*i + 3 of n; and written from what one thread holds: the codes of values j, j + 16, ...
//

template <int n>
KVT_FN uint32_t kvt_read2(const uint8_t * qs, unsigned i) {
    constexpr unsigned n_word = n / 16;
    return kvt_load4(qs + 4 * (i % n_word)) >> 2 * (i / n_word) & 0x03030303;
}

template <int n>
KVT_FN void kvt_write2(const uint8_t * c, uint8_t * qs, int j) {
    if (n == 64) {
        qs[j] = (c[0] & 3) | (c[1] & 3) << 2 | (c[2] & 3) << 4 | (c[3] & 3) << 6;
        return;
    }
    const int own  = (c[0] & 3) | (c[1] & 3) << 4;
    const int next = KVT_SHUFFLE(own, 8); // eight values on
    if (j < 8) {
        qs[j] = own | next << 2;
    }
}

//
// the types. levels: of values 4*i .. 4*i + 3; write: the codes that thread j holds
//

template <typename C> struct kvt_cuda;

template <typename block, int N>
struct kvt_cuda<kvt_codec_q2<block, N>> : kvt_codec_q2<block, N> {
    KVT_FN uint32_t levels(const block & x, unsigned i) {
        return kvt_prmt(kvt_q2_0, 0, kvt_nibbles(kvt_read2<N>(x.qs, i)));
    }

    KVT_FN void write(const uint8_t * c, block * y, int j) {
        kvt_write2<N>(c, y->qs, j);
    }
};

template <typename block, int N>
struct kvt_cuda<kvt_codec_q3<block, N>> : kvt_codec_q3<block, N> {
    KVT_FN uint32_t levels(const block & x, unsigned i) {
        const uint32_t high = x.qh[i / 2] >> 4 * (i % 2) & 0x0F;
        return kvt_prmt(kvt_q3_0, kvt_q3_4, kvt_nibbles(kvt_read2<N>(x.qs, i)) | kvt_third_bits(high));
    }

    KVT_FN void write(const uint8_t * c, block * y, int j) {
        kvt_write2<N>(c, y->qs, j);
        for (int i = 0; i < N / KVT_THREADS; i++) {
            int bits = (c[i] >> 2) << j;
            for (int bit = KVT_THREADS / 2; bit > 0; bit /= 2) {
                bits |= KVT_SHUFFLE(bits, bit);
            }
            if (j == i) {
                ((uint16_t *) y->qh)[i] = bits;
            }
        }
    }
};

template <>
struct kvt_cuda<kvt_codec_q6_32> : kvt_codec_q6_32 {
    KVT_FN uint32_t levels(const block_t & x, unsigned i) {
        const uint32_t code     = (kvt_load4(x.ql + 4 * (i % 4)) >> 4 * (i / 4) & 0x0F0F0F0F) | kvt_read2<n>(x.qh, i) << 4;
        const uint32_t negative = ~code & 0x20202020; // code - 32 as int8: bits 5, 6 and 7 are the sign
        return (code & 0x1F1F1F1F) | negative * 7;
    }

    KVT_FN void write(const uint8_t * c, block_t * y, int j) {
        const uint8_t high[2] = { (uint8_t) (c[0] >> 4), (uint8_t) (c[1] >> 4) };
        y->ql[j]              = (c[0] & 15) | (c[1] & 15) << 4;
        kvt_write2<n>(high, y->qh, j);
    }
};

//
// codes on a ring. A warp reads all groups at once, and a thread the same one of every block: what depends on the group are shifts, masks,
// words of a table, and a choice between two results, not what is done
//

// by halves of windows, one in each byte, four levels. Both halves of one are within 64, and more by that here: so a sum of bytes has no
// carry, and is more by 128
template <typename R, int p> struct kvt_words {
    static constexpr uint32_t low[]  = { kvt_word(R::low[p], 0, 64), kvt_word(R::low[p], 4, 64), kvt_word(R::low[p], 8, 64), kvt_word(R::low[p], 12, 64) };
    static constexpr uint32_t high[] = { kvt_word(R::high[p], 0, 64), kvt_word(R::high[p], 4, 64), kvt_word(R::high[p], 8, 64), kvt_word(R::high[p], 12, 64) };

    // of the first phase from p on whose group is this one, or of the last
    KVT_FN void of(unsigned group, uint32_t * words) {
        constexpr uint32_t all[8] = { low[0], low[1], low[2], low[3], high[0], high[1], high[2], high[3] };
        if constexpr (p + 1 < R::n_phase) {
            kvt_words<R, p + 1>::of(group, words);
        }
        const bool mine = p + 1 == R::n_phase || group == p + 4 - R::n_value;
        for (int i = 0; i < 8; i++) {
            words[i] = mine ? all[i] : words[i];
        }
    }
};

// more: what is added to each byte
template <typename R>
KVT_FN uint32_t kvt_levels_of_windows(uint32_t window, unsigned group, uint32_t more = 0) {
    uint32_t w[8];
    kvt_words<R, 0>::of(group, w);
    const uint32_t low  = kvt_lookup16(w[0], w[1], w[2], w[3], kvt_nibbles(window & 0x0F0F0F0F));
    const uint32_t high = kvt_lookup16(w[4], w[5], w[6], w[7], kvt_nibbles(window >> 4 & 0x0F0F0F0F));
    return (low + high + more) ^ 0x80808080;
}

// bits shift .. shift + 7 of four numbers in bytes: of their low n_bit bits, and of those above, of which lo and hi are the low eight each
template <int n_bit = 8>
KVT_FN uint32_t kvt_windows(uint32_t lo, uint32_t hi, unsigned shift) {
    const uint32_t mask = (((1u << n_bit) - 1) >> shift) * 0x01010101;
    return (lo >> shift & mask) | (hi << (n_bit - shift) & ~mask);
}

// bits of the codes on the ring below those of each group, in bytes
template <typename R>
constexpr uint32_t kvt_shifts() {
    uint32_t res = 0;
    for (int p = 0; p < R::n_value; p++) {
        res |= (uint32_t) kvt_bits_after<R>(p) << 8 * (p + 4 - R::n_value);
    }
    return res;
}

template <typename R> constexpr uint32_t kvt_all_shifts = kvt_shifts<R>();

template <typename R>
KVT_FN unsigned kvt_shift(unsigned group) {
    return kvt_all_shifts<R> >> 8 * group & 255;
}

// the bytes of four lanes, and those of the lanes before them
KVT_FN uint32_t kvt_own(const uint8_t * qs, unsigned i, uint32_t * before) {
    const unsigned lane = 4 * (i % 4);
    const uint32_t own  = kvt_load4(qs + lane);
    *before             = own << 8 | qs[(lane + 15) % 16];
    return own;
}

// of 16 values in 8 bytes, the first eight in the low halves
KVT_FN uint32_t kvt_halves(const uint8_t * qh, unsigned i) {
    return kvt_load4(qh + 4 * (i % 2)) >> 2 * (i & 2) & 0x0F0F0F0F;
}

template <typename C>
struct kvt_cuda_ring : C {
    // the number of a thread's lane
    KVT_FN void write(const uint8_t * c, typename C::block_t * y, int j) {
        constexpr int n_high = kvt_n_high<typename C::block_t>, rest = n_high / 16;
        const int     number = C::template number<1>(c);
        y->qs[j]             = number;
        if constexpr (rest > 0) {
            y->qh[j] = number >> (n_high / 2);
        }
        if constexpr (n_high % 16 == 8) {
            const int own  = number >> 8 & 15;
            const int next = KVT_SHUFFLE(own, 8); // eight lanes on
            if (j < 8) {
                y->qh[16 * rest + j] = own | next << 4;
            }
        }
    }
};

template <>
struct kvt_cuda<kvt_codec_k2_64> : kvt_cuda_ring<kvt_codec_k2_64> {
    KVT_FN uint32_t levels(const block_t & x, unsigned i) {
        uint32_t       before;
        const uint32_t own = kvt_own(x.qs, i, &before);
        return kvt_levels_of_windows<R>(kvt_windows(own, before, kvt_shift<R>(i / 4)), i / 4);
    }
};

template <>
struct kvt_cuda<kvt_codec_k3_64> : kvt_cuda_ring<kvt_codec_k3_64> {
    KVT_FN uint32_t levels(const block_t & x, unsigned i) {
        uint32_t       before;
        const uint32_t own   = kvt_own(x.qs, i, &before);
        const uint32_t first = ((own >> 4 & 0x0C0C0C0C) | kvt_halves(x.qh, i) << 4) ^ 0x82828282; // 4*code + 2 - 128
        const uint32_t other = kvt_levels_of_windows<R>(kvt_windows<6>(own, before, kvt_shift<R>(i / 4)), i / 4);
        return i / 4 == 0 ? first : other;
    }
};

template <>
struct kvt_cuda<kvt_codec_k4_64> : kvt_cuda_ring<kvt_codec_k4_64> {
    KVT_FN uint32_t levels(const block_t & x, unsigned i) {
        uint32_t       before;
        const uint32_t own   = kvt_own(x.qs, i, &before);
        const uint32_t high  = kvt_load4(x.qh + 4 * (i % 4));
        const uint32_t above = (high & 0x01010101) | (before & 0x7F7F7F7F) << 1;
        const uint32_t other = kvt_levels_of_windows<R>(kvt_windows(own, above, kvt_shift<R>(i / 4)), i / 4);
        return i / 4 == 0 ? (high | 0x01010101) ^ 0x80808080 : other; // 2*code + 1 - 128
    }
};

template <>
struct kvt_cuda<kvt_codec_k5_64> : kvt_cuda_ring<kvt_codec_k5_64> {
    KVT_FN uint32_t levels(const block_t & x, unsigned i) {
        uint32_t       before;
        const uint32_t own = kvt_own(x.qs, i, &before), high = kvt_halves(x.qh + 16, i);
        const uint32_t above = (high & 0x07070707) | (before & 0x1F1F1F1F) << 3;
        const uint32_t finer = i / 4 == 1 ? (high >> 3 & 0x01010101) * (2 * R::finer) - 0x01010101 * R::finer : 0;
        const uint32_t other = kvt_levels_of_windows<R>(kvt_windows(own, above, kvt_shift<R>(i / 4)), i / 4, finer);
        return i / 4 == 0 ? kvt_load4(x.qh + 4 * (i % 4)) ^ 0x80808080 : other; // code - 128
    }
};

// bits 8 and on of the numbers of four lanes and of those of the lanes before them, whose low bits are given, in bytes: 8 to 15, and 16 to 23
KVT_FN void kvt_ring_above(const kvt_block_t2_64 &, unsigned, uint32_t before, uint32_t * above) {
    above[0] = before;
    above[1] = 0;
}

KVT_FN void kvt_ring_above(const kvt_block_t3_64 & x, unsigned i, uint32_t before, uint32_t * above) {
    above[0] = kvt_halves(x.qh, i) | (before & 0x0F0F0F0F) << 4;
    above[1] = before >> 4 & 0x0F0F0F0F;
}

KVT_FN void kvt_ring_above(const kvt_block_t4_64 & x, unsigned i, uint32_t before, uint32_t * above) {
    above[0] = kvt_load4(x.qh + 4 * (i % 4));
    above[1] = before;
}

template <typename block, typename ring>
struct kvt_cuda<kvt_codec_t<block, ring>> : kvt_cuda_ring<kvt_codec_t<block, ring>> {
    KVT_FN uint32_t levels(const block & x, unsigned i) {
        const unsigned shift = kvt_shift<ring>(i / 4);
        uint32_t       before, above[2];
        const uint32_t own = kvt_own(x.qs, i, &before);
        kvt_ring_above(x, i, before, above);
        return kvt_levels_of_windows<ring>(kvt_windows(shift < 8 ? own : above[0], shift < 8 ? above[0] : above[1], shift % 8), 0);
    }
};

//
// ggml's own: for reading only
//

template <typename block>
struct kvt_cuda_ggml {
    static const int n = 32;
    typedef block    block_t;

    // of 4 bits
    KVT_FN uint32_t code(const block_t & x, unsigned i) {
        return kvt_load4(x.qs + 4 * (i % 4)) >> 4 * (i / 4) & 0x0F0F0F0F;
    }

    // the fifth
    KVT_FN uint32_t high(const block_t & x, unsigned i) {
        return (kvt_load4(x.qh) >> 4 * i & 15) * 0x00204081 << 4 & 0x10101010;
    }

    // code - less
    KVT_FN uint32_t levels_of(uint32_t code, int less) {
        return (code + 0x01010101 * (128 - less)) ^ 0x80808080;
    }
};

struct kvt_cuda_q8_0 : kvt_cuda_ggml<kvt_block_q8_0> {
    KVT_FN uint32_t levels(const block_t & x, unsigned i) { return kvt_load4(x.qs + 4 * i); }
};

struct kvt_cuda_q4_0 : kvt_cuda_ggml<kvt_block_q4_0> {
    KVT_FN uint32_t levels(const block_t & x, unsigned i) { return levels_of(code(x, i), 8); }
};

struct kvt_cuda_q4_1 : kvt_cuda_ggml<kvt_block_q4_1> {
    KVT_FN uint32_t levels(const block_t & x, unsigned i) { return code(x, i); }
};

struct kvt_cuda_q5_0 : kvt_cuda_ggml<kvt_block_q5_0> {
    KVT_FN uint32_t levels(const block_t & x, unsigned i) { return levels_of(code(x, i) | high(x, i), 16); }
};

struct kvt_cuda_q5_1 : kvt_cuda_ggml<kvt_block_q5_1> {
    KVT_FN uint32_t levels(const block_t & x, unsigned i) { return code(x, i) | high(x, i); }
};

struct kvt_cuda_iq4_nl : kvt_cuda_ggml<kvt_block_q4_0> {
    KVT_FN uint32_t levels(const block_t & x, unsigned i) {
        return kvt_lookup16(kvt_iq4_nl_0, kvt_iq4_nl_4, kvt_iq4_nl_8, kvt_iq4_nl_c, kvt_nibbles(code(x, i)));
    }
};

template <ggml_type type>
struct kvt_codec {
    static const int n = 0; // not read
    typedef char     block_t;
};

#define KVT_CODEC_CUDA(NAME, name, number, n, bits) \
    template <> struct kvt_codec<GGML_TYPE_##NAME> : kvt_cuda<kvt_codec_##name> {};
KVT_TYPES(KVT_CODEC_CUDA)
#undef KVT_CODEC_CUDA

template <> struct kvt_codec<GGML_TYPE_Q8_0> : kvt_cuda_q8_0 {};
template <> struct kvt_codec<GGML_TYPE_Q5_1> : kvt_cuda_q5_1 {};
template <> struct kvt_codec<GGML_TYPE_Q5_0> : kvt_cuda_q5_0 {};
template <> struct kvt_codec<GGML_TYPE_Q4_1> : kvt_cuda_q4_1 {};
template <> struct kvt_codec<GGML_TYPE_Q4_0> : kvt_cuda_q4_0 {};
template <> struct kvt_codec<GGML_TYPE_IQ4_NL> : kvt_cuda_iq4_nl {};

//
// what kernels ask for. row: an array of blocks; i: in fours of values
//

template <ggml_type type>
KVT_FN void kvt_dequantize4(const void * row, unsigned i, float * y) {
    constexpr unsigned n      = kvt_codec<type>::n / 4;
    const auto &       x      = ((const typename kvt_codec<type>::block_t *) row)[i / n];
    const uint32_t     levels = kvt_codec<type>::levels(x, i % n);
    const float        d      = kvt_from_half(KVT_HALF_OF(x.d));
    for (int l = 0; l < 4; l++) {
        y[l] = d * (int8_t) (levels >> 8 * l);
    }
}

// one block, by KVT_THREADS threads at once
template <ggml_type type>
KVT_FN void kvt_encode(const float * x, void * block, int j) {
    typedef kvt_codec<type> C;
    float                   v[C::n / KVT_THREADS];
    uint8_t                 c[C::n / KVT_THREADS];
    for (int i = 0; i < C::n / KVT_THREADS; i++) {
        v[i] = x[i * KVT_THREADS + j];
    }
    const kvt_half d = C::template quantize<KVT_THREADS>(v, c);
    auto *         y = (typename C::block_t *) block;
    if (j == 0) {
        KVT_SET_SCALE(y->d, d);
    }
    C::write(c, y, j);
}
