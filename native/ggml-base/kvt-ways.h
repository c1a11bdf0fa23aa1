// kvt-ways.h - of all ways around a ring of codes, the one whose levels have the least squared error, found by the algorithm of Viterbi. The
// rules are those of kvt-blocks.h, for the CPU and a GPU alike
//
// A state is the bits that the next code finds before it. After a code of k bits and before one of l bits there are 1 << (8 - l) states;
// state n has 1 << l ways into it, whose windows are n | j << (8 - l) for number j, and comes from state window >> k. States are held in
// rows of 16: lane i of row h is state 16*h + i, so that the low half of a window is the lane, and the high half the same for all of a row.
// Costs are integers: their sums are the same everywhere.
#pragma once

#include "kvt-rings.h"

#ifdef __CUDACC__
#define KVT_SHUFFLE_FROM(v, lane) __shfl_sync(0xFFFFFFFF, v, lane, 16)
#define KVT_LANE (threadIdx.x % 16)
#else
#ifndef KVT_SHUFFLE_FROM
#define KVT_SHUFFLE_FROM(v, lane) (v) // that of a lane's thread, of the 16 that share a block
#define KVT_LANE 0
#endif
#endif

// levels i .. i + 7 as bytes of a number
constexpr uint64_t kvt_bytes(const int16_t * level, int i) {
    uint64_t res = 0;
    for (int j = 7; j >= 0; j--) {
        res = res << 8 | (level[i + j] & 255);
    }
    return res;
}

// halves of levels as the search takes them; a multiple of the last argument
struct kvt_row {
    int16_t v[16];
};

constexpr kvt_row kvt_searched(const int16_t * level, int fine, int multiple) {
    kvt_row res = {};
    for (int i = 0; i < 16; i++) {
        res.v[i] = (int16_t) (((level[i] * fine + 32 * multiple) >> (multiple == 2 ? 7 : 6)) * multiple);
    }
    return res;
}

// A GPU has the halves in instructions: what it takes by an index from a table would be in memory
template <typename R, int p> struct kvt_phase {
    static constexpr kvt_row  low   = kvt_searched(R::low[p], R::fine[p], 1);
    static constexpr kvt_row  high  = kvt_searched(R::high[p], R::fine[p], 2);
    static constexpr uint64_t low_0 = kvt_bytes(low.v, 0), low_8 = kvt_bytes(low.v, 8);
    static constexpr uint64_t high_0 = kvt_bytes(high.v, 0), high_8 = kvt_bytes(high.v, 8);
    static constexpr uint64_t own_low_0 = kvt_bytes(R::low[p], 0), own_low_8 = kvt_bytes(R::low[p], 8);
    static constexpr uint64_t own_high_0 = kvt_bytes(R::high[p], 0), own_high_8 = kvt_bytes(R::high[p], 8);
    static const int          bits = R::bits[p], next = R::bits[(p + 1) % R::n_phase], shift = R::shift[p];

    // of a window, as the block's levels are
    KVT_FN int level(int window) {
        const int i = window & 15, j = window >> 4;
        return (int8_t) ((i < 8 ? own_low_0 : own_low_8) >> 8 * (i % 8)) + (int8_t) ((j < 8 ? own_high_0 : own_high_8) >> 8 * (j % 8));
    }

    KVT_FN int of_low(int i) {
        return (int8_t) ((i < 8 ? low_0 : low_8) >> 8 * (i % 8));
    }

    // halved
    KVT_FN int of_high(int i) {
        return (int8_t) ((i < 8 ? high_0 : high_8) >> 8 * (i % 8)) / 2;
    }
};

// Values are integers in the search, and within KVT_RING_MAX. A cost is a quarter of the squared error: no state is more than three steps
// of 212 behind another, and the best way of a block costs no more than its values do, so that 16 bits have room
static constexpr float KVT_RING_MAX   = 106.0f;
static constexpr float KVT_RING_SIGMA = 38.0f; // the most that a standard deviation is, where a scale is so small that its rounding is coarse
static const int       KVT_COST_START = -24576;
static const int       KVT_COST_OTHER = 16000; // more, for every state that a way does not start from

// number i of the lanes that a thread holds
template <int T> KVT_FN int kvt_lane(int i) {
    return T == 1 ? i : (int) KVT_LANE;
}

// what is held for a lane
template <int T> KVT_FN int kvt_of_lane(const int * row, int lane) {
    if constexpr (T == 1) {
        return row[lane];
    } else {
        return KVT_SHUFFLE_FROM(row[0], lane);
    }
}

#if !defined(__CUDACC__) && defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define KVT_VECTORS
#endif
#endif

#ifdef KVT_VECTORS
#ifdef __AVX2__
#include <immintrin.h>
#endif

typedef int16_t  kvt_v16 __attribute__((vector_size(32)));
typedef uint16_t kvt_u16 __attribute__((vector_size(32))); // where a sum may wrap on its way
typedef int32_t  kvt_v32 __attribute__((vector_size(32)));
typedef int64_t  kvt_v64 __attribute__((vector_size(32)));
typedef int64_t  kvt_v64h __attribute__((vector_size(16)));

static inline kvt_v16 kvt_min(kvt_v16 a, kvt_v16 b) {
#ifdef __AVX2__
    return (kvt_v16) _mm256_min_epi16((__m256i) a, (__m256i) b); // else it is a choice by the mask that the caller has use for: slower
#else
    return a < b ? a : b;
#endif
}

// high halves, halved, in the order of the states before a window; and e*e + low*e of each high half e, by lanes
struct kvt_rows {
    int16_t v[16][16];
};

template <typename P>
constexpr kvt_rows kvt_find_states() {
    kvt_rows res = {};
    for (int i = 0; i < 16 << (4 - P::bits); i++) {
        res.v[i >> 4][i & 15] = (int16_t) (P::high.v[i >> (4 - P::bits)] / 2);
    }
    return res;
}

template <typename P>
constexpr kvt_rows kvt_find_levels() {
    kvt_rows res = {};
    for (int i = 0; i < 256; i++) {
        const int e           = P::high.v[i >> 4] / 2;
        res.v[i >> 4][i & 15] = (int16_t) (e * e + P::low.v[i & 15] * e);
    }
    return res;
}

template <typename P> constexpr kvt_rows kvt_of_states = kvt_find_states<P>();
template <typename P> constexpr kvt_rows kvt_of_levels = kvt_find_levels<P>();

// lane l: cost[l >> k]
template <int k>
static inline void kvt_spread(const int16_t * cost, kvt_v16 * v) {
    if constexpr (k == 1) {
        kvt_v64h c;
        memcpy(&c, cost, sizeof(c));
        const kvt_v16 a = (kvt_v16) __builtin_shufflevector(c, c, 0, 1, 0, 1);
        *v              = __builtin_shufflevector(a, a, 0, 0, 1, 1, 2, 2, 3, 3, 12, 12, 13, 13, 14, 14, 15, 15);
    } else if constexpr (k == 2) {
        int64_t c;
        memcpy(&c, cost, sizeof(c));
        const kvt_v16 a = (kvt_v16) (c - kvt_v64 {});
        *v              = __builtin_shufflevector(a, a, 0, 0, 0, 0, 1, 1, 1, 1, 10, 10, 10, 10, 11, 11, 11, 11);
    } else if constexpr (k == 3) {
        int32_t c;
        memcpy(&c, cost, sizeof(c));
        const kvt_v16 a = (kvt_v16) (c - kvt_v32 {});
        *v              = __builtin_shufflevector(a, a, 0, 0, 0, 0, 0, 0, 0, 0, 9, 9, 9, 9, 9, 9, 9, 9);
    } else {
        *v = *cost - kvt_v16 {};
    }
}
#endif

// the numbers of the best predecessors at each time, a byte for a thread's states. Registers have no index: four times are a word, and
// the words move, so that the last time is in the last one
template <int T> struct kvt_numbers {
    uint32_t word[16] = {};

    KVT_FN void put(kvt_numbers & w, int t, int number) {
        if (t % 4 == 0) {
            for (int i = 0; i < 15; i++) {
                w.word[i] = w.word[i + 1];
            }
        }
        w.word[15] = w.word[15] >> 8 | (uint32_t) number << 24;
    }

    // of the last time, which is t, what a lane's thread put; and the time before is the last one
    KVT_FN int take(kvt_numbers & w, int t, int lane) {
        const int number = w.word[15] >> 24;
        w.word[15] <<= 8;
        if (t % 4 == 0) {
            for (int i = 15; i > 0; i--) {
                w.word[i] = w.word[i - 1];
            }
        }
        return KVT_SHUFFLE_FROM(number, lane);
    }
};

template <> struct kvt_numbers<1> {
    int16_t of[64][16];

    KVT_FN int take(const kvt_numbers & w, int t, int lane) {
        return w.of[t][lane];
    }
};

// the ways around a ring; T threads hold a block, T = 1 or 16
template <typename R, int T>
struct kvt_ways {
    static const int n      = 16 * R::n_value; // values
    static const int n_lane = 16 / T;          // of a row that a thread holds
    static const int n_row  = 8;               // the most

    int16_t        cost[n_row][n_lane];
    kvt_numbers<T> from; // the number of the best way into each state: bits for each row

    // a value is added to every way; the least of costs with a number is that of the first number. Where no sum is rounded down, it is taken
    // apart, times 16: what a state before and the value make is made once, and what a window makes is the same for all values
    template <int p> KVT_FN void step(kvt_ways & w, int x, int16_t * from) {
        typedef kvt_phase<R, p> P;
        const int               k = P::bits, l = P::next;
        constexpr bool          apart = P::shift == 0;
        int16_t                 cost[1 << (4 - l)][n_lane];
        int                     before[1 << (4 - k)][n_lane];
        for (int h = 0; h < 1 << (4 - k); h++) {
            for (int i = 0; i < n_lane; i++) {
                before[h][i] = (w.cost[h][i] - (apart ? x * P::of_high((16 * h + kvt_lane<T>(i)) >> (4 - k)) : 0)) * 16;
            }
        }
        for (int i = 0; i < n_lane; i++) {
            from[i] = 0;
        }
        for (int h = 0; h < 1 << (4 - l); h++) {
            for (int i = 0; i < n_lane; i++) {
                const int lane = kvt_lane<T>(i);
                const int low  = P::of_low(lane);
                const int u    = x - low;
                int       best = 0x7FFFFFFF;
                for (int j = 0; j < 1 << l; j++) {
                    const int first = (j << (8 - l - k)) + (16 * h >> k);
                    const int e     = P::of_high(h | j << (4 - l));
                    const int more  = apart ? e * e + low * e : (e * e - u * e) >> P::shift;
                    const int c     = kvt_of_lane<T>(before[first >> 4], (first & 15) + (lane >> k)) + (more * 16 + j);
                    best            = c < best ? c : best;
                }
                cost[h][i] = (int16_t) ((best >> 4) + (u * u >> (2 + P::shift)));
                from[i]    = (int16_t) (from[i] | (best & 15) << (l * h));
            }
        }
        memcpy(w.cost, cost, sizeof(cost));
    }

#ifdef KVT_VECTORS
    // as step: of each state before, what its cost and the value make together is the same for all values that may follow
    template <int p> static inline void step_of_vectors(kvt_ways & w, int x, int16_t * from) {
        typedef kvt_phase<R, p> P;
        const int               k = P::bits, l = P::next;
        constexpr bool          apart = P::shift == 0; // a sum that is rounded down is none of its parts'
        kvt_v16                 low, number = {};
        int16_t                 cost[1 << (4 - l)][16], before[1 << (4 - k)][16];
        memcpy(&low, P::low.v, sizeof(low));
        const kvt_v16 u  = (int16_t) x - low;
        const kvt_v16 uu = u * u >> (2 + P::shift);
        for (int i = 0; apart && i < 1 << (4 - k); i++) {
            kvt_u16 of_row, e;
            memcpy(&of_row, w.cost[i], sizeof(of_row));
            memcpy(&e, kvt_of_states<P>.v[i], sizeof(e));
            of_row -= (uint16_t) x * e;
            memcpy(before[i], &of_row, sizeof(of_row));
        }
        for (int h = 0; h < 1 << (4 - l); h++) {
            kvt_v16 best = {}, arg = {};
            for (int j = 0; j < 1 << l; j++) {
                const int16_t * states = (apart ? before[0] : w.cost[0]) + (j << (8 - l - k)) + (16 * h >> k);
                kvt_v16         c;
                kvt_spread<k>(states, &c);
                if constexpr (apart) {
                    kvt_u16 more;
                    memcpy(&more, kvt_of_levels<P>.v[h | j << (4 - l)], sizeof(more));
                    c = (kvt_v16) ((kvt_u16) c + more);
                } else {
                    const int16_t e = P::high.v[h | j << (4 - l)] / 2;
                    c += ((int16_t) (e * e) - u * e) >> P::shift;
                }
                if (j == 0) {
                    best = c;
                    continue;
                }
                const kvt_v16 mine = (c < best) & (int16_t) (j << (l * h));
                best               = kvt_min(c, best);
                arg                = mine > arg ? mine : arg;
            }
            best += uu;
            number |= arg;
            memcpy(cost[h], &best, sizeof(best));
        }
        memcpy(from, &number, sizeof(number));
        memcpy(w.cost, cost, sizeof(cost));
    }
#endif

    // the value at a time
    KVT_FN int value(const int16_t * q, int t) {
        const int i = t % R::n_value, lane = t / R::n_value;
        if constexpr (T == 1) {
            return q[16 * i + lane];
        } else {
            uint32_t all = 0;
            for (int j = 0; j < R::n_value; j++) {
                all |= (uint32_t) (q[j] & 255) << 8 * j;
            }
            return (int8_t) (KVT_SHUFFLE_FROM(all, lane) >> 8 * i);
        }
    }

    // a step for each phase from p on
    template <int p> KVT_FN void round(kvt_ways & w, const int16_t * q, int t) {
        const int x = value(q, t);
        if constexpr (T == 1) {
#ifdef KVT_VECTORS
            step_of_vectors<p>(w, x, w.from.of[t]);
#else
            step<p>(w, x, w.from.of[t]);
#endif
        } else {
            int16_t number;
            step<p>(w, x, &number);
            kvt_numbers<T>::put(w.from, t, number);
        }
        if constexpr (p + 1 < R::n_phase) {
            round<p + 1>(w, q, t + 1);
        }
    }

    KVT_FN void rounds(kvt_ways & w, const int16_t * q, int begin, int end) {
        for (int t = begin; t < end; t += R::n_phase) {
            round<0>(w, q, t);
        }
    }

    // back over values i .. 0 of a lane, from the state after value i to the one before value 0; c and m are given their codes and windows
    template <int i> KVT_FN int back(kvt_ways & w, int lane, int n, uint8_t * c, int16_t * m) {
        typedef kvt_phase<R, i % R::n_phase> P;
        const int                            j      = kvt_numbers<T>::take(w.from, R::n_value * lane + i, n & 15) >> (P::next * (n >> 4));
        const int                            window = n | (j & ((1 << P::next) - 1)) << (8 - P::next);
        if (T == 1 || kvt_lane<T>(0) == lane) {
            c[i * n_lane + (T == 1 ? lane : 0)] = (uint8_t) (window & ((1 << P::bits) - 1));
            m[i * n_lane + (T == 1 ? lane : 0)] = (int16_t) window;
        }
        if constexpr (i > 0) {
            return back<i - 1>(w, lane, window >> P::bits, c, m);
        } else {
            return window >> P::bits;
        }
    }

    // the state with the least cost, the first of several, where a lane's codes end
    KVT_FN int best(const kvt_ways & w) {
        int least = 0x7FFFFFFF;
        for (int h = 0; h < 1 << (4 - R::bits[0]); h++) {
            for (int i = 0; i < n_lane; i++) {
                const int c = (w.cost[h][i] + 32768) << 8 | (16 * h + kvt_lane<T>(i));
                least       = c < least ? c : least;
            }
        }
        for (int bit = T / 2; bit > 0; bit /= 2) {
            const int other = KVT_SHUFFLE(least, bit);
            least           = other < least ? other : least;
        }
        return least & 255;
    }

    // all ways start at a state, or at any if it is negative
    KVT_FN void start(kvt_ways & w, int state) {
        for (int h = 0; h < 1 << (4 - R::bits[0]); h++) {
            for (int i = 0; i < n_lane; i++) {
                const bool other = state >= 0 && state != 16 * h + kvt_lane<T>(i);
                w.cost[h][i]     = (int16_t) (KVT_COST_START + (other ? KVT_COST_OTHER : 0));
            }
        }
    }

    // the codes and windows of the best way that begins and ends at one state: that of a way over the end of the ring, of 24 bits or more
    KVT_FN void find(const int16_t * q, uint8_t * c, int16_t * m) {
        const int last = R::n_value - 1, n_over = (23 + kvt_bits_of_lane<R>) / kvt_bits_of_lane<R>;
        kvt_ways  w;
        start(w, -1);
        rounds(w, q, n - R::n_value * n_over, n);
        rounds(w, q, 0, R::n_value * n_over);
        int state = best(w);
        for (int lane = n_over - 1; lane >= 0; lane--) {
            state = back<last>(w, lane, state, c, m);
        }
        start(w, state);
        rounds(w, q, 0, n);
        for (int lane = 15; lane >= 0; lane--) {
            state = back<last>(w, lane, state, c, m);
        }
    }
};

// a value in the search: times scale, to the nearest; a is its |x|
KVT_FN int16_t kvt_on_ring(float x, float a, float scale) {
    const float r = kvt_round(kvt_least(a * scale, KVT_RING_MAX));
    return (int16_t) (x < 0.0f ? -r : r);
}
