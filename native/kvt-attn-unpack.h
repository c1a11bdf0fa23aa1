// What attention must know of a type: one struct with `n` values per step and load(), which turns them into vectors.
// A new type is a struct here and a row in kvt_attn_types; a type without a row goes through ggml's to_float.
#pragma once

#include "kvt-attn-simd.h"

#define GGML_COMMON_DECL_C
#include "ggml-common.h"

//
// floats
//

struct kvt_row_f32 {
    static const int n = KVT_VW;
    static KVT_INLINE void load(const char * row, int64_t i, vf * x) { x[0] = vf_load((const float *) row + i*n); }
};

struct kvt_row_f16 {
    static const int n = KVT_VW;
    static KVT_INLINE void load(const char * row, int64_t i, vf * x) { x[0] = vf_load_f16((const uint16_t *) row + i*n); }
};

struct kvt_row_bf16 {
    static const int n = KVT_VW;
    static KVT_INLINE void load(const char * row, int64_t i, vf * x) { x[0] = vf_load_bf16((const uint16_t *) row + i*n); }
};

//
// blocks of 32: values 0..15 in the low nibbles, 16..31 in the high ones
//

#if defined(KVT_AVX512)
#define KVT_BLOCKS

static KVT_INLINE vf vf_half(const ggml_half * h) {
    uint16_t bits;
    memcpy(&bits, h, sizeof(bits));
    return _mm512_cvtph_ps(_mm256_set1_epi16(bits));
}

static KVT_INLINE vf vf_iota() {
    return _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
}

// 4 bits look up their value in a register; vpermps takes the low 4 bits of an index
static KVT_INLINE void vf_lut(const uint8_t * qs, vf lut, vf * x) {
    const __m512i q = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *) qs));
    x[0] = _mm512_permutexvar_ps(q, lut);
    x[1] = _mm512_permutexvar_ps(_mm512_srli_epi32(q, 4), lut);
}

// the fifth bit adds 16 steps
static KVT_INLINE void vf_fifth(const uint8_t * qh, vf step, vf * x) {
    uint32_t h;
    memcpy(&h, qh, sizeof(h));
    x[0] = _mm512_mask_add_ps(x[0], (__mmask16) h,         x[0], step);
    x[1] = _mm512_mask_add_ps(x[1], (__mmask16) (h >> 16), x[1], step);
}

struct kvt_row_q8_0 {
    static const int n = QK8_0;
    static KVT_INLINE void load(const char * row, int64_t i, vf * x) {
        const block_q8_0 * b = (const block_q8_0 *) row + i;
        const vf d = vf_half(&b->d);
        x[0] = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *) (b->qs +  0)))), d);
        x[1] = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *) (b->qs + 16)))), d);
    }
};

struct kvt_row_q4_0 {
    static const int n = QK4_0;
    static KVT_INLINE void load(const char * row, int64_t i, vf * x) {
        const block_q4_0 * b = (const block_q4_0 *) row + i;
        vf_lut(b->qs, vf_mul(vf_sub(vf_iota(), vf_set1(8)), vf_half(&b->d)), x);
    }
};

struct kvt_row_q4_1 {
    static const int n = QK4_1;
    static KVT_INLINE void load(const char * row, int64_t i, vf * x) {
        const block_q4_1 * b = (const block_q4_1 *) row + i;
        vf_lut(b->qs, vf_fma(vf_iota(), vf_half(&b->d), vf_half(&b->m)), x);
    }
};

struct kvt_row_q5_0 {
    static const int n = QK5_0;
    static KVT_INLINE void load(const char * row, int64_t i, vf * x) {
        const block_q5_0 * b = (const block_q5_0 *) row + i;
        const vf d = vf_half(&b->d);
        vf_lut(b->qs, vf_mul(vf_sub(vf_iota(), vf_set1(16)), d), x);
        vf_fifth(b->qh, vf_mul(d, vf_set1(16)), x);
    }
};

struct kvt_row_q5_1 {
    static const int n = QK5_1;
    static KVT_INLINE void load(const char * row, int64_t i, vf * x) {
        const block_q5_1 * b = (const block_q5_1 *) row + i;
        const vf d = vf_half(&b->d);
        vf_lut(b->qs, vf_fma(vf_iota(), d, vf_half(&b->m)), x);
        vf_fifth(b->qh, vf_mul(d, vf_set1(16)), x);
    }
};

struct kvt_row_iq4_nl {
    static const int n = QK4_NL;
    static KVT_INLINE void load(const char * row, int64_t i, vf * x) {
        const block_iq4_nl * b = (const block_iq4_nl *) row + i;
        // kvalues_iq4nl
        const vf values = _mm512_setr_ps(-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113);
        vf_lut(b->qs, vf_mul(values, vf_half(&b->d)), x);
    }
};

#elif KVT_VW == 8 || (defined(__ARM_NEON) && defined(__aarch64__))
#define KVT_BLOCKS

// 16 bytes
#if KVT_VW == 8
typedef __m128i vb;
static KVT_INLINE vb vb_set1 (int8_t x)             { return _mm_set1_epi8(x); }
static KVT_INLINE vb vb_load (const void * p)       { return _mm_loadu_si128((const __m128i *) p); }
static KVT_INLINE vb vb_low  (vb a)                 { return _mm_and_si128(a, _mm_set1_epi8(15)); }
static KVT_INLINE vb vb_high (vb a)                 { return _mm_and_si128(_mm_srli_epi16(a, 4), _mm_set1_epi8(15)); }
static KVT_INLINE vb vb_or   (vb a, vb b)           { return _mm_or_si128(a, b); }
static KVT_INLINE vb vb_sub  (vb a, vb b)           { return _mm_sub_epi8(a, b); }
static KVT_INLINE vb vb_look (vb lut, vb i)         { return _mm_shuffle_epi8(lut, i); }
// 16 in each byte whose bit is set
static KVT_INLINE vb vb_bits (uint16_t h) {
    const __m128i bit = _mm_set1_epi64x((long long) 0x8040201008040201ull);
    const __m128i b   = _mm_shuffle_epi8(_mm_set1_epi16((short) h), _mm_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1));
    return _mm_and_si128(_mm_cmpeq_epi8(_mm_and_si128(b, bit), bit), _mm_set1_epi8(16));
}
// 16 signed bytes times d plus m
static KVT_INLINE void vb_floats(vb a, vf d, vf m, vf * x) {
    x[0] = vf_fma(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(a)), d, m);
    x[1] = vf_fma(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(a, 8))), d, m);
}
#else
typedef int8x16_t vb;
static KVT_INLINE vb vb_set1 (int8_t x)             { return vdupq_n_s8(x); }
static KVT_INLINE vb vb_load (const void * p)       { return vld1q_s8((const int8_t *) p); }
static KVT_INLINE vb vb_low  (vb a)                 { return vandq_s8(a, vdupq_n_s8(15)); }
static KVT_INLINE vb vb_high (vb a)                 { return vreinterpretq_s8_u8(vshrq_n_u8(vreinterpretq_u8_s8(a), 4)); }
static KVT_INLINE vb vb_or   (vb a, vb b)           { return vorrq_s8(a, b); }
static KVT_INLINE vb vb_sub  (vb a, vb b)           { return vsubq_s8(a, b); }
static KVT_INLINE vb vb_look (vb lut, vb i)         { return vqtbl1q_s8(lut, vreinterpretq_u8_s8(i)); }
static KVT_INLINE vb vb_bits (uint16_t h) {
    const uint8x16_t bit = vreinterpretq_u8_u64(vdupq_n_u64(0x8040201008040201ull));
    const uint8x16_t b   = vcombine_u8(vdup_n_u8((uint8_t) h), vdup_n_u8((uint8_t) (h >> 8)));
    return vreinterpretq_s8_u8(vandq_u8(vtstq_u8(b, bit), vdupq_n_u8(16)));
}
static KVT_INLINE void vb_floats(vb a, vf d, vf m, vf * x) {
    const int16x8_t lo = vmovl_s8(vget_low_s8(a)), hi = vmovl_s8(vget_high_s8(a));
    x[0] = vf_fma(vcvtq_f32_s32(vmovl_s16(vget_low_s16 (lo))), d, m);
    x[1] = vf_fma(vcvtq_f32_s32(vmovl_s16(vget_high_s16(lo))), d, m);
    x[2] = vf_fma(vcvtq_f32_s32(vmovl_s16(vget_low_s16 (hi))), d, m);
    x[3] = vf_fma(vcvtq_f32_s32(vmovl_s16(vget_high_s16(hi))), d, m);
}
#endif

static KVT_INLINE vf vf_half(const ggml_half * h) {
    return vf_set1(GGML_CPU_FP16_TO_FP32(*h));
}

static KVT_INLINE void vb_block(vb lo, vb hi, vf d, vf m, vf * x) {
    vb_floats(lo, d, m, x);
    vb_floats(hi, d, m, x + 16/KVT_VW);
}

static KVT_INLINE void vb_fifth(const uint8_t * qh, vb * lo, vb * hi) {
    uint32_t h;
    memcpy(&h, qh, sizeof(h));
    *lo = vb_or(*lo, vb_bits((uint16_t) h));
    *hi = vb_or(*hi, vb_bits((uint16_t) (h >> 16)));
}

struct kvt_row_q8_0 {
    static const int n = QK8_0;
    static KVT_INLINE void load(const char * row, int64_t i, vf * x) {
        const block_q8_0 * b = (const block_q8_0 *) row + i;
        vb_block(vb_load(b->qs), vb_load(b->qs + 16), vf_half(&b->d), vf_set1(0), x);
    }
};

struct kvt_row_q4_0 {
    static const int n = QK4_0;
    static KVT_INLINE void load(const char * row, int64_t i, vf * x) {
        const block_q4_0 * b = (const block_q4_0 *) row + i;
        const vb q = vb_load(b->qs), o = vb_set1(8);
        vb_block(vb_sub(vb_low(q), o), vb_sub(vb_high(q), o), vf_half(&b->d), vf_set1(0), x);
    }
};

struct kvt_row_q4_1 {
    static const int n = QK4_1;
    static KVT_INLINE void load(const char * row, int64_t i, vf * x) {
        const block_q4_1 * b = (const block_q4_1 *) row + i;
        const vb q = vb_load(b->qs);
        vb_block(vb_low(q), vb_high(q), vf_half(&b->d), vf_half(&b->m), x);
    }
};

struct kvt_row_q5_0 {
    static const int n = QK5_0;
    static KVT_INLINE void load(const char * row, int64_t i, vf * x) {
        const block_q5_0 * b = (const block_q5_0 *) row + i;
        const vb q = vb_load(b->qs), o = vb_set1(16);
        vb lo = vb_low(q), hi = vb_high(q);
        vb_fifth(b->qh, &lo, &hi);
        vb_block(vb_sub(lo, o), vb_sub(hi, o), vf_half(&b->d), vf_set1(0), x);
    }
};

struct kvt_row_q5_1 {
    static const int n = QK5_1;
    static KVT_INLINE void load(const char * row, int64_t i, vf * x) {
        const block_q5_1 * b = (const block_q5_1 *) row + i;
        const vb q = vb_load(b->qs);
        vb lo = vb_low(q), hi = vb_high(q);
        vb_fifth(b->qh, &lo, &hi);
        vb_block(lo, hi, vf_half(&b->d), vf_half(&b->m), x);
    }
};

struct kvt_row_iq4_nl {
    static const int n = QK4_NL;
    static KVT_INLINE void load(const char * row, int64_t i, vf * x) {
        static const int8_t values[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113}; // kvalues_iq4nl
        const block_iq4_nl * b = (const block_iq4_nl *) row + i;
        const vb q = vb_load(b->qs), lut = vb_load(values);
        vb_block(vb_look(lut, vb_low(q)), vb_look(lut, vb_high(q)), vf_half(&b->d), vf_set1(0), x);
    }
};

#endif

// n_rows rows of n values, nb bytes apart, to dst, ld floats apart
typedef void (*kvt_unpack_t)(const char * src, size_t nb, int n_rows, int64_t n, float * dst, int64_t ld);

template <typename T>
static void kvt_unpack(const char * src, size_t nb, int n_rows, int64_t n, float * dst, int64_t ld) {
    for (int r = 0; r < n_rows; r++) {
        const char * row = src + r*nb;
        for (int64_t i = 0; i < n/T::n; i++) {
            vf x[T::n/KVT_VW];
            T::load(row, i, x);
            for (int j = 0; j < T::n/KVT_VW; j++) {
                vf_store(dst + r*ld + i*T::n + j*KVT_VW, x[j]);
            }
        }
    }
}

struct kvt_attn_type {
    ggml_type    type;
    int          n;      // head sizes must be a multiple of it
    kvt_unpack_t unpack;
};

#define KVT_ROW(TYPE, ROW) { GGML_TYPE_##TYPE, ROW::n, kvt_unpack<ROW> }

static const kvt_attn_type kvt_attn_types[] = {
    KVT_ROW(F32,    kvt_row_f32),
    KVT_ROW(F16,    kvt_row_f16),
    KVT_ROW(BF16,   kvt_row_bf16),
#ifdef KVT_BLOCKS
    KVT_ROW(Q8_0,   kvt_row_q8_0),
    KVT_ROW(Q4_0,   kvt_row_q4_0),
    KVT_ROW(Q4_1,   kvt_row_q4_1),
    KVT_ROW(Q5_0,   kvt_row_q5_0),
    KVT_ROW(Q5_1,   kvt_row_q5_1),
    KVT_ROW(IQ4_NL, kvt_row_iq4_nl),
#endif
};
