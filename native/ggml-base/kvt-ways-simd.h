// kvt-ways-simd.h - the steps of kvt-ways.h on a CPU, all states at once: their costs stay in registers from one value to the next
//
// A vector holds numbers of 16 bits: of states in their order, or of windows in theirs. Those of a state n are n | j << (8 - l), l being the
// bits of the next code: so the windows of vector r are of the states of vector r % (vectors of states), and of rising j.
#pragma once

#include "kvt-phases.h"

static const int KVT_MAX_STATES = 128;

#if !defined(__CUDACC__) && defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define KVT_WAYS_SIMD
#endif
#endif

#ifdef KVT_WAYS_SIMD
#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#include <utility>

#if defined(__AVX512BW__)
static const int KVT_WAYS_LANES = 32;
#elif defined(__AVX2__)
static const int KVT_WAYS_LANES = 16;
#else
static const int KVT_WAYS_LANES = 8;
#endif

#define KVT_WITHIN __attribute__((always_inline)) // also what is long: else registers go through memory

typedef int16_t  kvt_vw __attribute__((vector_size(2 * KVT_WAYS_LANES)));
typedef uint16_t kvt_vu __attribute__((vector_size(2 * KVT_WAYS_LANES))); // where a sum may wrap on its way

template <int n> constexpr int kvt_n_vec = n > KVT_WAYS_LANES ? n / KVT_WAYS_LANES : 1;

static inline kvt_vw kvt_load(const int16_t * x) {
    kvt_vw res;
    memcpy(&res, x, sizeof(res));
    return res;
}

static inline void kvt_store(int16_t * x, kvt_vw v) {
    memcpy(x, &v, sizeof(v));
}

#if defined(__AVX2__) && !defined(__AVX512BW__)
#define KVT_LESS(a, b) (kvt_vw) _mm256_min_epi16((__m256i) (a), (__m256i) (b))
#define KVT_MORE(a, b) (kvt_vw) _mm256_max_epi16((__m256i) (a), (__m256i) (b))
#elif defined(__SSE2__)
#define KVT_LESS(a, b) (kvt_vw) _mm_min_epi16((__m128i) (a), (__m128i) (b))
#define KVT_MORE(a, b) (kvt_vw) _mm_max_epi16((__m128i) (a), (__m128i) (b))
#elif defined(__ARM_NEON)
#define KVT_LESS(a, b) (kvt_vw) vminq_s16((int16x8_t) (a), (int16x8_t) (b))
#define KVT_MORE(a, b) (kvt_vw) vmaxq_s16((int16x8_t) (a), (int16x8_t) (b))
#else
#define KVT_LESS(a, b) ((a) < (b) ? (a) : (b))
#define KVT_MORE(a, b) ((a) > (b) ? (a) : (b))
#endif

// the less of each two, and in at the number of that; the first of equals. Numbers rise
template <int number>
static inline KVT_WITHIN void kvt_choose(kvt_vw c, kvt_vw & least, kvt_vw & at) {
#ifdef __AVX512BW__
    const __mmask32 less = _mm512_cmplt_epi16_mask((__m512i) c, (__m512i) least);
    least                = (kvt_vw) _mm512_min_epi16((__m512i) c, (__m512i) least);
    at                   = (kvt_vw) _mm512_mask_mov_epi16((__m512i) at, less, _mm512_set1_epi16(number));
#else
    const kvt_vw mine = (c < least) & (int16_t) number;
    least             = KVT_LESS(c, least);
    at                = KVT_MORE(mine, at);
#endif
}

// numbers of a window, or of a state, in their order
template <int n> struct kvt_numbers_of {
    alignas(64) int16_t v[n > KVT_WAYS_LANES ? n : KVT_WAYS_LANES];
};

// halved, the high half of the window of each state before it
template <typename P>
constexpr auto kvt_find_states() {
    kvt_numbers_of<(256 >> P::bits)> res = {};
    for (int i = 0; i < 256 >> P::bits; i++) {
        res.v[i] = (int16_t) (P::high.v[i >> (4 - P::bits)] / 2);
    }
    return res;
}

// of each window e*e + low*e, or e where that is not wanted; e is its high half, halved
template <typename P>
constexpr auto kvt_find_windows(bool whole) {
    kvt_numbers_of<256> res = {};
    for (int i = 0; i < 256; i++) {
        const int e = P::high.v[i >> 4] / 2;
        res.v[i]    = (int16_t) (whole ? e * e + P::low.v[i & 15] * e : e);
    }
    return res;
}

// the low halves, as often as a vector has them
template <typename P>
constexpr auto kvt_find_low() {
    kvt_numbers_of<16> res = {};
    for (int i = 0; i < 16 || i < KVT_WAYS_LANES; i++) {
        res.v[i] = P::low.v[i & 15];
    }
    return res;
}

template <typename P> constexpr auto kvt_of_states  = kvt_find_states<P>();
template <typename P> constexpr auto kvt_of_windows = kvt_find_windows<P>(true);
template <typename P> constexpr auto kvt_of_high    = kvt_find_windows<P>(false);
template <typename P> constexpr auto kvt_of_low     = kvt_find_low<P>();

// what the states before codes of k bits have, given to the windows: that of state window >> k
#ifdef __AVX512BW__
template <int k, int r>
constexpr auto kvt_find_lanes() {
    kvt_numbers_of<32> res = {};
    for (int i = 0; i < 32; i++) {
        res.v[i] = (int16_t) (((32 * r + i) >> k) % 32);
    }
    return res;
}

template <int k, int r> constexpr auto kvt_lanes = kvt_find_lanes<k, r>();

template <int k> struct kvt_spread {
    kvt_vw of[kvt_n_vec<(256 >> k)>];

    template <int i> void put(kvt_vw v) { of[i] = v; }

    template <int r> kvt_vw windows() const {
        const kvt_vw lanes = kvt_load(kvt_lanes<k, r>.v);
        return (kvt_vw) _mm512_permutexvar_epi16((__m512i) lanes, (__m512i) of[(32 * r >> k) / 32]);
    }
};
#else
template <typename T>
static inline KVT_WITHIN kvt_vw kvt_repeated(const int16_t * x) {
    typedef T v __attribute__((vector_size(2 * KVT_WAYS_LANES)));
    T         one;
    memcpy(&one, x, sizeof(one));
    return (kvt_vw) (one - v {});
}

#ifndef __AVX2__
// each of the first 8 bytes' numbers twice
template <typename T>
static inline KVT_WITHIN kvt_vw kvt_twice(kvt_vw a) {
    constexpr bool of_16 = sizeof(T) == 2;
#if defined(__SSE2__)
    return (kvt_vw) (of_16 ? _mm_unpacklo_epi16((__m128i) a, (__m128i) a) : _mm_unpacklo_epi32((__m128i) a, (__m128i) a));
#elif defined(__ARM_NEON) && defined(__aarch64__)
    return of_16 ? (kvt_vw) vzip1q_s16((int16x8_t) a, (int16x8_t) a) : (kvt_vw) vzip1q_s32((int32x4_t) a, (int32x4_t) a);
#else
    return of_16 ? __builtin_shufflevector(a, a, 0, 0, 1, 1, 2, 2, 3, 3) : __builtin_shufflevector(a, a, 0, 1, 0, 1, 2, 3, 2, 3);
#endif
}
#endif

template <int k> struct kvt_spread {
    alignas(32) int16_t of[256 >> k];

    template <int i> void put(kvt_vw v) {
        kvt_store(of + KVT_WAYS_LANES * i, v);
        __asm__("" : "+m"(of)); // GCC would take them out of registers, by two or three instructions each
    }

    template <int r> kvt_vw windows() const {
        const int16_t * x = of + (KVT_WAYS_LANES * r >> k);
#ifdef __AVX2__
        if constexpr (k == 1) {
            typedef int64_t half __attribute__((vector_size(16)));
            half            c;
            memcpy(&c, x, sizeof(c));
            const kvt_vw a = (kvt_vw) __builtin_shufflevector(c, c, 0, 1, 0, 1);
            return __builtin_shufflevector(a, a, 0, 0, 1, 1, 2, 2, 3, 3, 12, 12, 13, 13, 14, 14, 15, 15);
        } else if constexpr (k == 2) {
            const kvt_vw a = kvt_repeated<int64_t>(x);
            return __builtin_shufflevector(a, a, 0, 0, 0, 0, 1, 1, 1, 1, 10, 10, 10, 10, 11, 11, 11, 11);
        } else if constexpr (k == 3) {
            const kvt_vw a = kvt_repeated<int32_t>(x);
            return __builtin_shufflevector(a, a, 0, 0, 0, 0, 0, 0, 0, 0, 9, 9, 9, 9, 9, 9, 9, 9);
        }
#else
        if constexpr (k == 1) {
            return kvt_twice<int16_t>(kvt_repeated<int64_t>(x));
        } else if constexpr (k == 2) {
            return kvt_twice<int32_t>(kvt_twice<int16_t>(kvt_repeated<int32_t>(x)));
        }
#endif
        return *x - kvt_vw {};
    }
};
#endif

template <typename F, int... i>
static inline KVT_WITHIN void kvt_each_of(std::integer_sequence<int, i...>, F f) {
    (f(std::integral_constant<int, i>()), ...);
}

// f(0), f(1) .. f(n - 1), where the numbers are constants
template <int n, typename F>
static inline KVT_WITHIN void kvt_each(F f) {
    kvt_each_of(std::make_integer_sequence<int, n>(), f);
}

template <typename R> struct kvt_ways_simd {
    // the costs of the states before a value -> of those after it; the number of the way to each of these. What a state before and the value
    // make together is the same for all windows, and what a window makes for all values: but a sum that is rounded down is none of its parts'
    template <int p> static inline KVT_WITHIN void step(kvt_vw * cost, int16_t x, int16_t * from) {
        typedef kvt_phase<R, p> P;
        constexpr int           k = P::bits, l = P::next, n_after = kvt_n_vec<(256 >> l)>, n_way = kvt_n_vec<256> / n_after;
        constexpr bool          apart = P::shift == 0;
        constexpr int           n_low = kvt_n_vec<16>;
        kvt_vw                  u[n_low];
        kvt_each<n_low>([&](auto i) KVT_WITHIN { u[i] = x - kvt_load(kvt_of_low<P>.v + KVT_WAYS_LANES * i); });
        kvt_spread<k> before;
        kvt_each<kvt_n_vec<(256 >> k)>>([&](auto i) KVT_WITHIN {
            const kvt_vu e = (kvt_vu) kvt_load(kvt_of_states<P>.v + KVT_WAYS_LANES * i);
            before.template put<i>(apart ? (kvt_vw) ((kvt_vu) cost[i] - (uint16_t) x * e) : cost[i]);
        });
        kvt_each<n_after>([&](auto h) KVT_WITHIN {
            kvt_vw least, at = {};
            kvt_each<n_way>([&](auto way) KVT_WITHIN {
                constexpr int r = decltype(h)::value + n_after * decltype(way)::value;
                kvt_vw        c = before.template windows<r>();
                if constexpr (apart) {
                    c = (kvt_vw) ((kvt_vu) c + (kvt_vu) kvt_load(kvt_of_windows<P>.v + KVT_WAYS_LANES * r));
                } else {
                    const kvt_vw e = kvt_load(kvt_of_high<P>.v + KVT_WAYS_LANES * r);
                    c += (e * (e - u[h % n_low])) >> P::shift;
                }
                if constexpr (way == 0) {
                    least = c;
                } else {
                    kvt_choose<(KVT_WAYS_LANES * r >> (8 - l))>(c, least, at);
                }
            });
            if constexpr (256 >> l < KVT_WAYS_LANES) {
                both_halves(least, at);
            }
            cost[h] = least + (u[h % n_low] * u[h % n_low] >> (2 + P::shift));
            kvt_store(from + KVT_WAYS_LANES * h, at);
        });
    }

    // a vector of 32 holds each of 16 states twice, with an even number and with the odd one after it: the least, in both
    static inline void both_halves(kvt_vw & least, kvt_vw & at) {
#ifdef __AVX512BW__
        const __m512i   c = (__m512i) least, odd = _mm512_maskz_set1_epi16(0xFFFF0000, 1), a = _mm512_add_epi16((__m512i) at, odd);
        const __m512i   other = _mm512_shuffle_i64x2(c, c, 0x4E), other_at = _mm512_shuffle_i64x2(a, a, 0x4E);
        const __mmask32 same = _mm512_cmpeq_epi16_mask(other, c), first = _mm512_cmplt_epi16_mask(other_at, a);
        const __mmask32 less = _mm512_cmplt_epi16_mask(other, c) | (same & first);
        least                = (kvt_vw) _mm512_min_epi16(other, c);
        at                   = (kvt_vw) _mm512_mask_mov_epi16(a, less, other_at);
#endif
    }

    template <int p> static inline KVT_WITHIN void round(kvt_vw * cost, const int16_t * q, int t, int16_t (*from)[KVT_MAX_STATES]) {
        step<p>(cost, q[16 * (t % R::n_value) + t / R::n_value], from[t]);
        if constexpr (p + 1 < R::n_phase) {
            round<p + 1>(cost, q, t + 1, from);
        }
    }

    // values begin .. end - 1 of q, in the order of a ring; costs of all states in their order
    static inline void rounds(int16_t * costs, const int16_t * q, int16_t (*from)[KVT_MAX_STATES], int begin, int end) {
        constexpr int n_vec = kvt_n_vec<(256 >> R::bits[0])>;
        kvt_vw        cost[kvt_n_vec<KVT_MAX_STATES>];
        kvt_each<n_vec>([&](auto i) KVT_WITHIN { cost[i] = kvt_load(costs + KVT_WAYS_LANES * i); });
        for (int t = begin; t < end; t += R::n_phase) {
            round<0>(cost, q, t, from);
        }
        kvt_each<n_vec>([&](auto i) KVT_WITHIN { kvt_store(costs + KVT_WAYS_LANES * i, cost[i]); });
    }
};
#endif
