// kvt-trellis.h - how a block of each trellis type is written and read: of all ways around the ring of codes (kvt-types.h), the one whose
// levels have the least squared error, found by the algorithm of Viterbi. The rules are those of kvt-blocks.h, for the CPU and a GPU alike
//
// A state is the bits that a code leaves to the next one, 8 - k of them; state n has 1 << k predecessors, (n >> k) | j << (8 - 2k), and
// what comes from number j has the window n | j << (8 - k). States are held in rows of 16: lane l of row h is state 16*h + l, so that the
// low half of a window is the lane, and the high half the same for all of a row. Costs are integers: their sums are the same everywhere.
#pragma once

#include "kvt-blocks.h"

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

// halves of the level of a window, and the share of a normal value's energy that the codes keep. A GPU has the halves in instructions:
// what it takes by an index from a table would be in memory
template <int k> struct kvt_ring;

#define KVT_RING(BITS, KEPT) \
    template <> struct kvt_ring<BITS> { \
        static constexpr int16_t  low[]  = KVT_LEVELS_T##BITS##_LOW; \
        static constexpr int16_t  high[] = KVT_LEVELS_T##BITS##_HIGH; \
        static constexpr uint64_t low_0 = kvt_bytes(low, 0), low_8 = kvt_bytes(low, 8); \
        static constexpr uint64_t high_0 = kvt_bytes(high, 0), high_8 = kvt_bytes(high, 8); \
        KVT_FN float kept() { \
            return KEPT; \
        } \
        KVT_FN int of_low(int i) { \
            return (int8_t) ((i < 8 ? low_0 : low_8) >> 8 * (i % 8)); \
        } \
        KVT_FN int of_high(int i) { \
            return (int8_t) ((i < 8 ? high_0 : high_8) >> 8 * (i % 8)); \
        } \
    };
KVT_RING(2, 0.922f)
KVT_RING(3, 0.978f)
KVT_RING(4, 0.994f)
#undef KVT_RING

// Values are integers in the search, about 32 to a standard deviation, and within this. A cost is a quarter of the squared error: no state is more
// than three steps of 212 behind another, and the best way of a block costs no more than its values do, so that 16 bits have room
static const float KVT_RING_MAX   = 106.0f;
static const float KVT_RING_SIGMA = 34.0f; // the most that a standard deviation is, where a scale is so small that its rounding is coarse
static const int   KVT_COST_START = -24576;
static const int   KVT_COST_OTHER = 16000; // more, for every state that a way does not start from

// number i of the lanes that a thread holds
template <int T> KVT_FN int kvt_lane(int i) {
    return T == 1 ? i : (int) KVT_LANE;
}

// what is held for a lane
template <int T> KVT_FN int kvt_of_lane(const int16_t * row, int lane) {
    if constexpr (T == 1) {
        return row[lane];
    } else {
        return KVT_SHUFFLE_FROM((int) row[0], lane);
    }
}

#if !defined(__CUDACC__) && defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define KVT_VECTORS
#endif
#endif

#ifdef KVT_VECTORS
typedef int16_t kvt_v16 __attribute__((vector_size(32)));
typedef int32_t kvt_v32 __attribute__((vector_size(32)));
typedef int64_t kvt_v64 __attribute__((vector_size(32)));

// lane l: cost[l >> k]
template <int k>
static inline void kvt_spread(const int16_t * cost, kvt_v16 * v) {
    if constexpr (k == 2) {
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

// the ways around a ring of codes of k bits; T threads hold a block, T = 1 or 16
template <int k, int T>
struct kvt_ways {
    static const int n_row  = 1 << (4 - k);
    static const int n_from = 1 << k; // predecessors of a state
    static const int n_lane = 16 / T; // of a row that a thread holds

    int16_t        cost[n_row][n_lane];
    kvt_numbers<T> from; // k bits for each row

    // a value is added to every way; the least of costs with a number is that of the first number
    KVT_FN void step(kvt_ways & w, int x, int16_t * from) {
        int16_t cost[n_row][n_lane];
        for (int i = 0; i < n_lane; i++) {
            from[i] = 0;
        }
        for (int h = 0; h < n_row; h++) {
            for (int i = 0; i < n_lane; i++) {
                const int lane = kvt_lane<T>(i);
                const int u    = x - kvt_ring<k>::of_low(lane);
                int       best = 0x7FFFFFFF;
                for (int j = 0; j < n_from; j++) {
                    const int first = j << (8 - 2 * k);
                    const int e     = kvt_ring<k>::of_high(h | j << (4 - k)) / 2;
                    const int last  = kvt_of_lane<T>(w.cost[first >> 4], (first & 15) + ((16 * h + lane) >> k));
                    const int c     = (last + e * e - u * e) * 16 + j;
                    best            = c < best ? c : best;
                }
                cost[h][i] = (int16_t) ((best >> 4) + (u * u >> 2));
                from[i]    = (int16_t) (from[i] | (best & 15) << (k * h));
            }
        }
        memcpy(w.cost, cost, sizeof(cost));
    }

#ifdef KVT_VECTORS
    static inline void step_of_vectors(kvt_ways & w, int x, int16_t * from) {
        kvt_v16 low, number = {};
        int16_t cost[n_row][16];
        memcpy(&low, kvt_ring<k>::low, sizeof(low));
        const kvt_v16 u  = (int16_t) x - low;
        const kvt_v16 uu = u * u >> 2;
        for (int h = 0; h < n_row; h++) {
            kvt_v16 best = {}, arg = {};
            for (int j = 0; j < n_from; j++) {
                const int16_t e = kvt_ring<k>::high[h | j << (4 - k)] / 2;
                kvt_v16       c;
                kvt_spread<k>(&w.cost[0][0] + (j << (8 - 2 * k)) + (16 * h >> k), &c);
                c = c + (int16_t) (e * e) - u * e;
                if (j == 0) {
                    best = c;
                    continue;
                }
                const kvt_v16 less = c < best;
                const kvt_v16 mine = less & (int16_t) (j << (k * h));
                best               = less ? c : best;
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
        if constexpr (T == 1) {
            return q[t % 4 * 16 + t / 4];
        } else {
            const uint32_t all = (q[0] & 255) | (q[1] & 255) << 8 | (q[2] & 255) << 16 | (uint32_t) q[3] << 24;
            return (int8_t) (KVT_SHUFFLE_FROM(all, t / 4) >> 8 * (t % 4));
        }
    }

    KVT_FN void steps(kvt_ways & w, const int16_t * q, int begin, int end) {
        for (int t = begin; t < end; t++) {
            const int x = value(q, t);
            if constexpr (T == 1) {
#ifdef KVT_VECTORS
                step_of_vectors(w, x, w.from.of[t]);
#else
                step(w, x, w.from.of[t]);
#endif
            } else {
                int16_t number;
                step(w, x, &number);
                kvt_numbers<T>::put(w.from, t, number);
            }
        }
    }

    // the state that a way through state n at this time comes from; asked from the last time on, once for each
    KVT_FN int before(kvt_ways & w, int t, int n) {
        const int j = kvt_numbers<T>::take(w.from, t, n & 15) >> (k * (n >> 4)) & (n_from - 1);
        return n >> k | j << (8 - 2 * k);
    }

    // the state with the least cost, the first of several
    KVT_FN int best(const kvt_ways & w) {
        int least = 0x7FFFFFFF;
        for (int h = 0; h < n_row; h++) {
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
        for (int h = 0; h < n_row; h++) {
            for (int i = 0; i < n_lane; i++) {
                const bool other = state >= 0 && state != 16 * h + kvt_lane<T>(i);
                w.cost[h][i]     = (int16_t) (KVT_COST_START + (other ? KVT_COST_OTHER : 0));
            }
        }
    }

    // the codes and levels of the best way that begins and ends at one state: that of a way over the end of the ring, some values long
    KVT_FN void find(const int16_t * q, uint8_t * c, int16_t * m) {
        const int n_over = 24 / k;
        kvt_ways  w;
        start(w, -1);
        steps(w, q, 64 - n_over, 64);
        steps(w, q, 0, n_over);
        int n = best(w);
        for (int t = n_over; t > 0; t--) {
            n = before(w, t - 1, n);
        }
        start(w, n);
        steps(w, q, 0, 64);
        for (int lane = 15; lane >= 0; lane--) {
            for (int p = 3; p >= 0; p--) {
                const int from   = before(w, 4 * lane + p, n);
                const int window = n | from >> (8 - 2 * k) << (8 - k);
                const int i      = p * n_lane + (T == 1 ? lane : 0);
                if (T == 1 || kvt_lane<T>(0) == lane) {
                    c[i] = (uint8_t) (n & (n_from - 1));
                    m[i] = (int16_t) window;
                }
                n = from;
            }
        }
        for (int i = 0; i < 64 / T; i++) {
            m[i] = (int16_t) (kvt_ring<k>::of_low(m[i] & 15) + kvt_ring<k>::of_high(m[i] >> 4));
        }
    }
};

static inline void kvt_pack_ring(int i, int bits, kvt_block_t2_64 * y) {
    y->qs[i] = (uint8_t) bits;
}

static inline int kvt_unpack_ring(int i, const kvt_block_t2_64 * x) {
    return x->qs[i];
}

static inline void kvt_pack_ring(int i, int bits, kvt_block_t3_64 * y) {
    y->qs[i]     = (uint8_t) bits;
    y->qh[i % 8] = (uint8_t) (i < 8 ? bits >> 8 : y->qh[i % 8] | bits >> 8 << 4);
}

static inline int kvt_unpack_ring(int i, const kvt_block_t3_64 * x) {
    return x->qs[i] | (x->qh[i % 8] >> (i < 8 ? 0 : 4) & 15) << 8;
}

static inline void kvt_pack_ring(int i, int bits, kvt_block_t4_64 * y) {
    y->qs[i] = (uint8_t) bits;
    y->qh[i] = (uint8_t) (bits >> 8);
}

static inline int kvt_unpack_ring(int i, const kvt_block_t4_64 * x) {
    return x->qs[i] | x->qh[i] << 8;
}

template <typename block, int k>
struct kvt_codec_t {
    static const int n = 64;
    typedef block    block_t;

    // as kvt_codec_levels: the scale that is stored is that with sum(x*x^) = sum(x*x), but for its rounding. What that takes from it or
    // gives to it is known before, as a rule, and the codes are chosen for it
    template <int T> KVT_FN kvt_half quantize(const float * x, uint8_t * c) {
        const int n_own = n / T;
        float     a[n_own], v[n_own];
        int16_t   q[n_own], m[n_own];
        kvt_abs<n_own>(x, a);
        const float all   = kvt_sum_sq<n_own, T>(a);
        const float sigma = sqrtf(all / n);
        const float d     = kvt_from_half(kvt_to_e5m3(sigma * (1.0f / 32.0f / kvt_ring<k>::kept()), 127.0f));
        const float most  = sigma > 1e-30f ? KVT_RING_SIGMA / sigma : 0.0f;
        const float inv   = d > 0.0f ? kvt_least(1.0f / (kvt_ring<k>::kept() * d), most) : most;
        for (int i = 0; i < n_own; i++) {
            const float r = (kvt_least(a[i] * inv, KVT_RING_MAX) + 12582912.0f) - 12582912.0f; // 1.5*2^23: to the nearest
            q[i]          = (int16_t) (x[i] < 0.0f ? -r : r);
        }
        kvt_ways<k, T>::find(q, c, m);
        for (int i = 0; i < n_own; i++) {
            v[i] = (x[i] < 0.0f ? -a[i] : a[i]) * m[i];
        }
        const float along = kvt_sum<n_own, T>(v);
        return kvt_to_e5m3(along > 0.0f ? all / along : d, 127.0f);
    }

    static void levels(const block * x, int8_t * l) {
        uint32_t before = kvt_unpack_ring(15, x);
        for (int i = 0; i < 16; i++) {
            const uint32_t bits = kvt_unpack_ring(i, x);
            for (int p = 0; p < 4; p++) {
                const int window = (before << 4 * k | bits) >> k * (3 - p) & 255;
                l[16 * p + i]    = (int8_t) (kvt_ring<k>::low[window & 15] + kvt_ring<k>::high[window >> 4]);
            }
            before = bits;
        }
    }

    static void pack(const uint8_t * c, block * y) {
        for (int i = 0; i < 16; i++) {
            kvt_pack_ring(i, c[i] << 3 * k | c[i + 16] << 2 * k | c[i + 32] << k | c[i + 48], y);
        }
    }
};

typedef kvt_codec_t<kvt_block_t2_64, 2> kvt_codec_t2_64;
typedef kvt_codec_t<kvt_block_t3_64, 3> kvt_codec_t3_64;
typedef kvt_codec_t<kvt_block_t4_64, 4> kvt_codec_t4_64;
