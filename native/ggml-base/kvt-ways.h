// kvt-ways.h - of all ways around a ring of codes, the one whose levels have the least squared error, found by the algorithm of Viterbi. The
// rules are those of kvt-blocks.h, for the CPU and a GPU alike
//
// A state is the bits that the next code finds before it. After a code of k bits and before one of l bits there are 1 << (8 - l) states;
// state n has 1 << l ways into it, whose windows are n | j << (8 - l) for number j, and comes from state window >> k. States are held in
// rows of 16: lane i of row h is state 16*h + i, so that the low half of a window is the lane, and the high half the same for all of a row.
// Costs are integers: their sums are the same everywhere.
#pragma once

#include "kvt-ways-simd.h"

#ifdef __CUDACC__
#define KVT_SHUFFLE_FROM(v, lane) __shfl_sync(0xFFFFFFFF, v, lane, 16)
#define KVT_LANE (threadIdx.x % 16)
#else
#ifndef KVT_SHUFFLE_FROM
#define KVT_SHUFFLE_FROM(v, lane) (v) // that of a lane's thread, of the 16 that share a block
#define KVT_LANE 0
#endif
#endif

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

    // of the last time, which is t, that of a state before a code of so many bits; and the time before is the last one
    template <int next> KVT_FN int take(kvt_numbers & w, int t, int state) {
        const int number = w.word[15] >> 24;
        w.word[15] <<= 8;
        if (t % 4 == 0) {
            for (int i = 15; i > 0; i--) {
                w.word[i] = w.word[i - 1];
            }
        }
        return KVT_SHUFFLE_FROM(number, state & 15) >> next * (state >> 4);
    }
};

template <> struct kvt_numbers<1> {
#ifdef KVT_WAYS_SIMD
    int16_t of[64][KVT_MAX_STATES];
#else
    int16_t of[64][16];
#endif

    template <int next> KVT_FN int take(const kvt_numbers & w, int t, int state) {
#ifdef KVT_WAYS_SIMD
        return w.of[t][state];
#else
        return w.of[t][state & 15] >> next * (state >> 4);
#endif
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
            step<p>(w, x, w.from.of[t]);
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
#ifdef KVT_WAYS_SIMD
        if constexpr (T == 1) {
            kvt_ways_simd<R>::rounds(w.cost[0], q, w.from.of, begin, end);
            return;
        }
#endif
        for (int t = begin; t < end; t += R::n_phase) {
            round<0>(w, q, t);
        }
    }

    // back over values i .. 0 of a lane, from the state after value i to the one before value 0; c and m are given their codes and levels
    template <int i> KVT_FN int back(kvt_ways & w, int lane, int n, uint8_t * c, int16_t * m) {
        typedef kvt_phase<R, i % R::n_phase> P;
        const int                            j      = kvt_numbers<T>::template take<P::next>(w.from, R::n_value * lane + i, n);
        const int                            window = n | (j & ((1 << P::next) - 1)) << (8 - P::next);
        if (T == 1 || kvt_lane<T>(0) == lane) {
            c[i * n_lane + (T == 1 ? lane : 0)] = (uint8_t) (window & ((1 << P::bits) - 1));
            m[i * n_lane + (T == 1 ? lane : 0)] = (int16_t) P::level(window);
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

    // the codes and levels of the best way that begins and ends at one state: that of a way over the end of the ring, of 24 bits or more
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
