// kvt-rings.h - what the bytes of a block on a ring say (kvt-types.h): its codes, the levels that they stand for, and a first group that is
// not on the ring. For the CPU and a GPU alike
#pragma once

#include "kvt-blocks.h"

// A ring: its codes come in phases, each with bits, halves of the levels and accuracy of its own
//   n_value  values of a lane on the ring, their number in the block being lane + 16*(4 - n_value), and 16 more for each next one
//   n_phase  1, where all are alike, or n_value
//   bits     of a code; kept: the share of a normal value's energy that levels of the least squared error were divided by
//   sigma    a standard deviation by which a block's scale is chosen, in levels. For groups it is more than that of the levels: the smaller
//            scale costs the groups with few bits less than it gives the others, by the error of attention
//   finer    what a bit that is not on the ring gives the level of the first phase, more or less; 0 = there is none
//   fine     in 64ths, and shift: in the search, a value and its levels are taken times fine/64, and a cost >> shift. So costs have the
//            weights that errors have: for groups the inverse of what a normal value's is
template <int k> struct kvt_ring_even {
    static const int       n_value = 4, n_phase = 1, finer = 0;
    static constexpr int   bits[1] = { k }, fine[1] = { 64 }, shift[1] = { 0 };
    static constexpr float sigma = 32.0f;
};

struct kvt_ring_t2 : kvt_ring_even<2> {
    static constexpr float   kept[]    = { 0.922f };
    static constexpr int16_t low[][16] = { KVT_LEVELS_T2_LOW }, high[][16] = { KVT_LEVELS_T2_HIGH };
};

struct kvt_ring_t3 : kvt_ring_even<3> {
    static constexpr float   kept[]    = { 0.978f };
    static constexpr int16_t low[][16] = { KVT_LEVELS_T3_LOW }, high[][16] = { KVT_LEVELS_T3_HIGH };
};

struct kvt_ring_t4 : kvt_ring_even<4> {
    static constexpr float   kept[]    = { 0.994f };
    static constexpr int16_t low[][16] = { KVT_LEVELS_T4_LOW }, high[][16] = { KVT_LEVELS_T4_HIGH };
};

struct kvt_ring_k2 {
    static const int         n_value = 4, n_phase = 4, finer = 0;
    static constexpr int     bits[] = { 4, 2, 1, 1 }, fine[] = { 64, 34, 31, 31 }, shift[] = { 0, 2, 4, 4 };
    static constexpr float   kept[]    = { 0.9933f, 0.9220f, 0.7392f, 0.7516f };
    static constexpr float   sigma     = 34.8f;
    static constexpr int16_t low[][16] = KVT_LEVELS_K2_LOW, high[][16] = KVT_LEVELS_K2_HIGH;
};

struct kvt_ring_k3 {
    static const int         n_value = 3, n_phase = 3, finer = 0;
    static constexpr int     bits[] = { 3, 2, 1 }, fine[] = { 56, 29, 27 }, shift[] = { 0, 0, 2 };
    static constexpr float   kept[]    = { 0.9766f, 0.9228f, 0.7567f };
    static constexpr float   sigma     = 39.1f;
    static constexpr int16_t low[][16] = KVT_LEVELS_K3_LOW, high[][16] = KVT_LEVELS_K3_HIGH;
};

struct kvt_ring_k4 {
    static const int         n_value = 3, n_phase = 3, finer = 0;
    static constexpr int     bits[] = { 4, 3, 2 }, fine[] = { 60, 31, 32 }, shift[] = { 0, 0, 2 };
    static constexpr float   kept[]    = { 0.9939f, 0.9785f, 0.9259f };
    static constexpr float   sigma     = 37.5f;
    static constexpr int16_t low[][16] = KVT_LEVELS_K4_LOW, high[][16] = KVT_LEVELS_K4_HIGH;
};

struct kvt_ring_k5 {
    static const int         n_value = 3, n_phase = 3, finer = KVT_FINE_K5;
    static constexpr int     bits[] = { 4, 4, 3 }, fine[] = { 60, 52, 52 }, shift[] = { 0, 0, 2 };
    static constexpr float   kept[]    = { 0.9939f, 0.9939f, 0.9785f };
    static constexpr float   sigma     = 36.0f;
    static constexpr int16_t low[][16] = KVT_LEVELS_K5_LOW, high[][16] = KVT_LEVELS_K5_HIGH;
};

// the bits of a lane's codes after that of phase p
template <typename R>
constexpr int kvt_bits_after(int p) {
    int res = 0;
    for (int i = p + 1; i < R::n_value; i++) {
        res += R::bits[i % R::n_phase];
    }
    return res;
}

// as constants, which a GPU's code may use
template <typename R> constexpr int        kvt_bits_of_lane = kvt_bits_after<R>(-1);
template <typename R, int p> constexpr int kvt_bits_below   = kvt_bits_after<R>(p);

// of n_value values of a lane, whose codes are given and those of the lane before
template <typename R, int i = 0>
static inline void kvt_levels_on_ring(uint32_t before, uint32_t own, int8_t * l) {
    const int window = (before << kvt_bits_of_lane<R> | own) >> kvt_bits_below<R, i> & 255;
    l[16 * i]        = (int8_t) (R::low[i % R::n_phase][window & 15] + R::high[i % R::n_phase][window >> 4]);
    if constexpr (i + 1 < R::n_value) {
        kvt_levels_on_ring<R, i + 1>(before, own, l);
    }
}

// of the codes of a lane on the ring, a stride apart; above those of the first one is the bit that is not on it
template <typename R, int stride, int i = 0>
KVT_FN int kvt_bits_on_ring(const uint8_t * c) {
    const int bits = (c[stride * i] & ((1 << R::bits[i % R::n_phase]) - 1)) << kvt_bits_below<R, i>;
    if constexpr (i + 1 < R::n_value) {
        return bits | kvt_bits_on_ring<R, stride, i + 1>(c);
    } else {
        return bits;
    }
}

// bytes of a block that hold what is above the low eight bits of its lanes' numbers (kvt-types.h)
template <typename block> constexpr int kvt_n_high = sizeof(block) - sizeof(block::d) - sizeof(block::qs);

template <typename block>
static inline void kvt_pack_lane(int i, int number, block * y) {
    y->qs[i]             = (uint8_t) number;
    constexpr int n_high = kvt_n_high<block>;
    if constexpr (n_high > 8) {
        y->qh[i] = (uint8_t) (number >> (n_high / 2));
    }
    if constexpr (n_high % 16 == 8) {
        uint8_t * half = y->qh + n_high / 16 * 16 + i % 8;
        *half          = (uint8_t) (i < 8 ? number >> 8 & 15 : *half | (number >> 8 & 15) << 4);
    }
}

template <typename block>
static inline int kvt_unpack_lane(int i, const block * x) {
    constexpr int n_high = kvt_n_high<block>;
    int           number = x->qs[i];
    if constexpr (n_high > 8) {
        number |= x->qh[i] << (n_high / 2);
    }
    if constexpr (n_high % 16 == 8) {
        number |= (x->qh[n_high / 16 * 16 + i % 8] >> (i < 8 ? 0 : 4) & 15) << 8;
    }
    return number;
}

// a block on a ring, and its first group, if that is not on it: its codes stand for odd multiples of half a step
template <typename block, typename ring>
struct kvt_codec_ring {
    static const int n = 64;
    typedef block    block_t;
    typedef ring     R;

    static const int n_bit = kvt_bits_of_lane<R>, n_first = 4 - R::n_value; // of a lane on the ring; groups that are not
    static const int n_below = n_bit + (R::finer > 0);                      // bits below the first group's code
    static const int bits = (16 + kvt_n_high<block>) / 2 - n_below, step = 256 >> bits;

    static void levels(const block * x, int8_t * l) {
        uint32_t before = kvt_unpack_lane(15, x);
        for (int i = 0; i < 16; i++) {
            const uint32_t own = kvt_unpack_lane(i, x);
            if (n_first > 0) {
                l[i] = (int8_t) (step * (own >> n_below) + step / 2 - 128);
            }
            kvt_levels_on_ring<R>(before, own & ((1 << n_bit) - 1), l + 16 * n_first + i);
            if (R::finer > 0) {
                l[16 * n_first + i] += (int8_t) (own >> n_bit & 1 ? R::finer : -R::finer);
            }
            before = own;
        }
    }

    // of the codes of a lane, a stride apart
    template <int stride> KVT_FN int number(const uint8_t * c) {
        const int first = n_first > 0 ? c[0] << n_below : 0;
        const int finer = R::finer > 0 ? c[stride * n_first] >> R::bits[0] << n_bit : 0;
        return first | finer | kvt_bits_on_ring<R, stride>(c + stride * n_first);
    }

    static void pack(const uint8_t * c, block * y) {
        for (int i = 0; i < 16; i++) {
            kvt_pack_lane(i, number<16>(c + i), y);
        }
    }
};
