// kvt-attn-simd.h - vectors of floats, as wide as the instruction set that this file is compiled for.
// ggml-cpu is compiled once per instruction set, so all choices are made here, by macros.
//
// A table, in columns: an operation in each instruction set.
//
//   vf  KVT_VW floats
//   vb  KVT_VW/4 lanes of 16 bytes, each of another row (KVT_BLOCKS: there are some)
//   vi  KVT_VW int32, with products of pairs of int16 (KVT_DOT: there are some) or of four bytes (KVT_BYTES: there are some, and no pairs), or, beside
//       these, of matrices of 2 by 8 bytes (KVT_MATRICES)
//
// Codes are bytes without a sign, around a type's ZERO (KVT_AROUND), where instructions multiply such by signed ones.
#pragma once

// clang-format off

#include "ggml.h"
#include "ggml-cpu-impl.h"
#include "simd-mappings.h"

#include <cstdint>
#include <cstring>

#if defined(__GNUC__)
#define KVT_INLINE inline __attribute__((always_inline))
#define KVT_NOINLINE __attribute__((noinline))
#define KVT_LAMBDA __attribute__((always_inline))
#define KVT_UNROLL _Pragma("GCC unroll 4")
#define kvt_prefetch(p) __builtin_prefetch(p, 0, 2) // to the L2 cache: what a tile needs is more than the L1 cache holds
#if defined(__x86_64__) || defined(__i386__)
#define KVT_KEEP(v) __asm__("" : "+v"(v)) // in a register: it is used more than once
#elif defined(__aarch64__)
#define KVT_KEEP(v) __asm__("" : "+w"(v))
#else
#define KVT_KEEP(v) GGML_UNUSED(v)
#endif
#define KVT_OPAQUE(x) __asm__("" : "+r"(x)) // its multiples are not worth a register each
#elif defined(_MSC_VER) && (defined(_M_X64) || defined(_M_IX86))
#define KVT_INLINE __forceinline
#define KVT_NOINLINE __declspec(noinline)
#define KVT_LAMBDA
#define KVT_UNROLL
#define kvt_prefetch(p) _mm_prefetch((const char *) (p), _MM_HINT_T1)
#define KVT_KEEP(v) GGML_UNUSED(v)
#define KVT_OPAQUE(x) GGML_UNUSED(x)
#else
#define KVT_INLINE inline
#define KVT_NOINLINE
#define KVT_LAMBDA
#define KVT_UNROLL
#define kvt_prefetch(p) GGML_UNUSED(p)
#define KVT_KEEP(v) GGML_UNUSED(v)
#define KVT_OPAQUE(x) GGML_UNUSED(x)
#endif

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)

#define KVT_AVX512
#define KVT_VW 16
typedef __m512 vf;

static KVT_INLINE vf   vf_set1 (float x)               { return _mm512_set1_ps(x); }
static KVT_INLINE vf   vf_load (const float * p)       { return _mm512_loadu_ps(p); }
static KVT_INLINE void vf_store(float * p, vf a)       { _mm512_storeu_ps(p, a); }
static KVT_INLINE vf   vf_add  (vf a, vf b)            { return _mm512_add_ps(a, b); }
static KVT_INLINE vf   vf_sub  (vf a, vf b)            { return _mm512_sub_ps(a, b); }
static KVT_INLINE vf   vf_mul  (vf a, vf b)            { return _mm512_mul_ps(a, b); }
static KVT_INLINE vf   vf_div  (vf a, vf b)            { return _mm512_div_ps(a, b); }
static KVT_INLINE vf   vf_max  (vf a, vf b)            { return _mm512_max_ps(a, b); }
static KVT_INLINE vf   vf_min  (vf a, vf b)            { return _mm512_min_ps(a, b); }
static KVT_INLINE vf   vf_fma  (vf a, vf b, vf c)      { return _mm512_fmadd_ps(a, b, c); }
static KVT_INLINE vf   vf_abs  (vf a)                  { return _mm512_abs_ps(a); }
static KVT_INLINE float vf_hmax(vf a)                  { return _mm512_reduce_max_ps(a); }
static KVT_INLINE float vf_hsum(vf a)                  { return _mm512_reduce_add_ps(a); }
static KVT_INLINE vf   vf_load_f16 (const uint16_t * p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *) p)); }
static KVT_INLINE vf   vf_load_bf16(const uint16_t * p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *) p)), 16));
}
static KVT_INLINE bool vf_any_nan (vf a)               { return _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q) != 0; }
// a where x > lim, else 0
static KVT_INLINE vf   vf_where_gt(vf a, vf x, vf lim) { return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, lim, _CMP_GT_OQ), a); }
// a * 2^n where x > lim, else 0; z = n + 1.5*2^23
static KVT_INLINE vf   vf_scale2(vf a, vf n, vf, vf x, vf lim) { return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(x, lim, _CMP_GT_OQ), a, n); }

static KVT_INLINE void vf_transpose(const float * src, int64_t lds, float * dst, int64_t ldd) {
    __m512 a[16], b[16];
    for (int i = 0; i < 16; i++) {
        a[i] = _mm512_loadu_ps(src + i*lds);
    }
    for (int i = 0; i < 16; i += 2) {
        b[i + 0] = _mm512_unpacklo_ps(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        a[i + 0] = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(b[i + 0]), _mm512_castps_pd(b[i + 2])));
        a[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(b[i + 0]), _mm512_castps_pd(b[i + 2])));
        a[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(b[i + 1]), _mm512_castps_pd(b[i + 3])));
        a[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(b[i + 1]), _mm512_castps_pd(b[i + 3])));
    }
    for (int i = 0; i < 4; i++) {
        b[i +  0] = _mm512_shuffle_f32x4(a[i +  0], a[i +  4], 0x88);
        b[i +  4] = _mm512_shuffle_f32x4(a[i +  0], a[i +  4], 0xdd);
        b[i +  8] = _mm512_shuffle_f32x4(a[i +  8], a[i + 12], 0x88);
        b[i + 12] = _mm512_shuffle_f32x4(a[i +  8], a[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; i++) {
        _mm512_storeu_ps(dst + (i +  0)*ldd, _mm512_shuffle_f32x4(b[i + 0], b[i +  8], 0x88));
        _mm512_storeu_ps(dst + (i +  4)*ldd, _mm512_shuffle_f32x4(b[i + 4], b[i + 12], 0x88));
        _mm512_storeu_ps(dst + (i +  8)*ldd, _mm512_shuffle_f32x4(b[i + 0], b[i +  8], 0xdd));
        _mm512_storeu_ps(dst + (i + 12)*ldd, _mm512_shuffle_f32x4(b[i + 4], b[i + 12], 0xdd));
    }
}

#define KVT_DOT
typedef __m512i vi;

static KVT_INLINE vi   vi_set1 (int32_t x)             { return _mm512_set1_epi32(x); }
static KVT_INLINE vi   vi_load (const int32_t * p)     { return _mm512_loadu_si512(p); }
static KVT_INLINE vf   vi_float(vi a)                  { return _mm512_cvtepi32_ps(a); }
static KVT_INLINE vi   vi_add  (vi a, vi b)            { return _mm512_add_epi32(a, b); }
static KVT_INLINE vi   vi_shl8 (vi a)                  { return _mm512_slli_epi32(a, 8); }
static KVT_INLINE vi   vi_round(vf a)                  { return _mm512_cvtps_epi32(a); }
static KVT_INLINE int32_t vi_hsum(vi a)                { return _mm512_reduce_add_epi32(a); }
#ifdef __AVX512VNNI__
#define KVT_BYTES
static KVT_INLINE vi   vi_dot4 (vi a, vi b, vi c)      { return _mm512_dpbusd_epi32(c, b, a); }
#ifdef __AVX512VBMI__
#define KVT_ROUND_BIAS (0x4b400000 + 128)
// a*b rounded, + KVT_ROUND_BIAS: bits of a float whose last is 1
static KVT_INLINE vi   vi_round_product(vf a, vf b)    { return _mm512_castps_si512(vf_fma(a, b, vf_set1(12582912.0f + 128.0f))); }
// 256*hi + lo + KVT_ROUND_BIAS: four bytes hi, n further four bytes lo, and so on; n is 4
static KVT_INLINE void vi_store_planes(int8_t * p, int, vi a) {
    alignas(64) static const int8_t order[64] = { 1, 5, 9, 13, 0, 4, 8, 12, 17, 21, 25, 29, 16, 20, 24, 28, 33, 37, 41, 45, 32, 36, 40, 44, 49, 53, 57, 61, 48, 52, 56, 60 };
    const __m512i x = _mm512_permutexvar_epi8(_mm512_load_si512(order), _mm512_xor_si512(a, _mm512_set1_epi32(128)));
    _mm256_storeu_si256((__m256i *) p, _mm512_castsi512_si256(x));
}
#else
// 256*hi + lo: four bytes hi, n further four bytes lo, and so on; n is 4
static KVT_INLINE void vi_store_planes(int8_t * p, int, vi a) {
    const __m256i x = _mm256_add_epi16(_mm512_cvtepi32_epi16(a), _mm256_set1_epi16(128)); // bytes lo + 128, hi
    const __m256i order = _mm256_broadcastsi128_si256(_mm_setr_epi8(1, 3, 5, 7, 0, 2, 4, 6, 9, 11, 13, 15, 8, 10, 12, 14));
    _mm256_storeu_si256((__m256i *) p, _mm256_shuffle_epi8(_mm256_xor_si256(x, _mm256_set1_epi16(128)), order));
}
#endif
#else
static KVT_INLINE vi   vi_dot  (vi a, vi b, vi c)      { return _mm512_add_epi32(c, _mm512_madd_epi16(a, b)); }
#endif
static KVT_INLINE vi   vi_even (vi a)                  { return _mm512_and_si512(a, _mm512_set1_epi16(255)); }
static KVT_INLINE vi   vi_odd  (vi a)                  { return _mm512_srli_epi16(a, 8); }
static KVT_INLINE void vi_store_i16(int16_t * p, vi a) { _mm256_storeu_si256((__m256i *) p, _mm512_cvtsepi32_epi16(a)); }
// of each four the first and the third, then the others
static KVT_INLINE void vi_store_pairs(int16_t * p, vi a) { vi_store_i16(p, _mm512_shuffle_epi32(a, _MM_PERM_DBCA)); }

#define KVT_BLOCKS
typedef __m512i vb;

static KVT_INLINE vb   vb_set1 (int8_t x)              { return _mm512_set1_epi8(x); }
static KVT_INLINE vb   vb_lut  (const int8_t * p)      { return _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *) p)); }
static KVT_INLINE void vb_store(int32_t * p, vb a)     { _mm512_storeu_si512(p, a); }
static KVT_INLINE vb   vb_and  (vb a, vb b)            { return _mm512_and_si512(a, b); }
static KVT_INLINE vb   vb_or   (vb a, vb b)            { return _mm512_or_si512(a, b); }
static KVT_INLINE vb   vb_add  (vb a, vb b)            { return _mm512_add_epi8(a, b); }
static KVT_INLINE vb   vb_sub  (vb a, vb b)            { return _mm512_sub_epi8(a, b); }
static KVT_INLINE vb   vb_shl16(vb a, int n)           { return _mm512_slli_epi16(a, n); }
static KVT_INLINE vb   vb_shr16(vb a, int n)           { return _mm512_srli_epi16(a, n); }
static KVT_INLINE vb   vb_look (vb lut, vb i)          { return _mm512_shuffle_epi8(lut, i); }
static KVT_INLINE vb   vb_test (vb a, vb bits, vb x)   { return _mm512_maskz_mov_epi8(_mm512_test_epi8_mask(a, bits), x); }
// 16, 8 or 4 bytes of each lane's row, nb bytes apart; the 8 or 4 fill their lane
static KVT_INLINE vb   vb_load (const char * p, size_t nb) {
    __m512i a = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i *) p));
    a = _mm512_mask_broadcast_i32x4(a, 0x00f0, _mm_loadu_si128((const __m128i *) (p +   nb)));
    a = _mm512_mask_broadcast_i32x4(a, 0x0f00, _mm_loadu_si128((const __m128i *) (p + 2*nb)));
    a = _mm512_mask_broadcast_i32x4(a, 0xf000, _mm_loadu_si128((const __m128i *) (p + 3*nb)));
    return a;
}
static KVT_INLINE vb   vb_load4(const char * p, size_t nb) {
    int32_t x[4];
    for (int i = 0; i < 4; i++) {
        memcpy(x + i, p + i*nb, sizeof(*x));
    }
    __m512i a = _mm512_set1_epi32(x[0]);
    a = _mm512_mask_set1_epi32(a, 0x00f0, x[1]);
    a = _mm512_mask_set1_epi32(a, 0x0f00, x[2]);
    return _mm512_mask_set1_epi32(a, 0xf000, x[3]);
}
static KVT_INLINE vb   vb_load8(const char * p, size_t nb) {
    int64_t x[4];
    for (int i = 0; i < 4; i++) {
        memcpy(x + i, p + i*nb, sizeof(*x));
    }
    return _mm512_setr_epi64(x[0], x[0], x[1], x[1], x[2], x[2], x[3], x[3]);
}
// lane l is of row l: to fours of the rows, 16 of them
static KVT_INLINE void vb_across_rows(const vb * a, vb * c) {
#ifdef __AVX512VBMI__
    alignas(64) static const int8_t order[64] = {
        0, 16, 32, 48, 1, 17, 33, 49, 2, 18, 34, 50, 3, 19, 35, 51, 4, 20, 36, 52, 5, 21, 37, 53, 6, 22, 38, 54, 7, 23, 39, 55,
        8, 24, 40, 56, 9, 25, 41, 57, 10, 26, 42, 58, 11, 27, 43, 59, 12, 28, 44, 60, 13, 29, 45, 61, 14, 30, 46, 62, 15, 31, 47, 63 };
    c[0] = _mm512_permutexvar_epi8(_mm512_load_si512(order), a[0]);
#else
    const __m512i x = _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), a[0]);
    c[0] = _mm512_shuffle_epi8(x, _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15)));
#endif
}
// lane l of a[i] is of row 4*l + i: to 4 bytes of each row in turn
static KVT_INLINE void vb_transpose(const vb * a, vb * x) {
    const __m512i b0 = _mm512_unpacklo_epi32(a[0], a[1]), b1 = _mm512_unpackhi_epi32(a[0], a[1]);
    const __m512i b2 = _mm512_unpacklo_epi32(a[2], a[3]), b3 = _mm512_unpackhi_epi32(a[2], a[3]);
    x[0] = _mm512_unpacklo_epi64(b0, b2);
    x[1] = _mm512_unpackhi_epi64(b0, b2);
    x[2] = _mm512_unpacklo_epi64(b1, b3);
    x[3] = _mm512_unpackhi_epi64(b1, b3);
}

#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

#define KVT_VW 8
typedef __m256 vf;

static KVT_INLINE vf   vf_set1 (float x)               { return _mm256_set1_ps(x); }
static KVT_INLINE vf   vf_load (const float * p)       { return _mm256_loadu_ps(p); }
static KVT_INLINE void vf_store(float * p, vf a)       { _mm256_storeu_ps(p, a); }
static KVT_INLINE vf   vf_add  (vf a, vf b)            { return _mm256_add_ps(a, b); }
static KVT_INLINE vf   vf_sub  (vf a, vf b)            { return _mm256_sub_ps(a, b); }
static KVT_INLINE vf   vf_mul  (vf a, vf b)            { return _mm256_mul_ps(a, b); }
static KVT_INLINE vf   vf_div  (vf a, vf b)            { return _mm256_div_ps(a, b); }
static KVT_INLINE vf   vf_max  (vf a, vf b)            { return _mm256_max_ps(a, b); }
static KVT_INLINE vf   vf_min  (vf a, vf b)            { return _mm256_min_ps(a, b); }
static KVT_INLINE vf   vf_fma  (vf a, vf b, vf c)      { return _mm256_fmadd_ps(a, b, c); }
static KVT_INLINE vf   vf_abs  (vf a)                  { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
static KVT_INLINE float vf_hmax(vf a) {
    __m128 x = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}
static KVT_INLINE float vf_hsum(vf a) {
    __m128 x = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}
static KVT_INLINE vf   vf_load_f16 (const uint16_t * p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) p)); }
static KVT_INLINE vf   vf_load_bf16(const uint16_t * p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *) p)), 16));
}
static KVT_INLINE bool vf_any_nan (vf a)               { return _mm256_movemask_ps(_mm256_cmp_ps(a, a, _CMP_UNORD_Q)) != 0; }
static KVT_INLINE vf   vf_where_gt(vf a, vf x, vf lim) { return _mm256_and_ps(_mm256_cmp_ps(x, lim, _CMP_GT_OQ), a); }
static KVT_INLINE vf   vf_scale2(vf a, vf, vf z, vf x, vf lim) {
    const __m256i y = _mm256_add_epi32(_mm256_castps_si256(a), _mm256_slli_epi32(_mm256_castps_si256(z), 23));
    return vf_where_gt(_mm256_castsi256_ps(y), x, lim);
}

static KVT_INLINE void vf_transpose(const float * src, int64_t lds, float * dst, int64_t ldd) {
    __m256 a[8], b[8];
    for (int i = 0; i < 8; i++) {
        a[i] = _mm256_loadu_ps(src + i*lds);
    }
    for (int i = 0; i < 8; i += 2) {
        b[i + 0] = _mm256_unpacklo_ps(a[i], a[i + 1]);
        b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
        a[i + 0] = _mm256_shuffle_ps(b[i + 0], b[i + 2], 0x44);
        a[i + 1] = _mm256_shuffle_ps(b[i + 0], b[i + 2], 0xee);
        a[i + 2] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0x44);
        a[i + 3] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0xee);
    }
    for (int i = 0; i < 4; i++) {
        _mm256_storeu_ps(dst + (i + 0)*ldd, _mm256_permute2f128_ps(a[i], a[i + 4], 0x20));
        _mm256_storeu_ps(dst + (i + 4)*ldd, _mm256_permute2f128_ps(a[i], a[i + 4], 0x31));
    }
}

#define KVT_DOT
typedef __m256i vi;

static KVT_INLINE vi   vi_set1 (int32_t x)             { return _mm256_set1_epi32(x); }
static KVT_INLINE vi   vi_load (const int32_t * p)     { return _mm256_loadu_si256((const __m256i *) p); }
static KVT_INLINE vf   vi_float(vi a)                  { return _mm256_cvtepi32_ps(a); }
static KVT_INLINE vi   vi_add  (vi a, vi b)            { return _mm256_add_epi32(a, b); }
static KVT_INLINE vi   vi_shl8 (vi a)                  { return _mm256_slli_epi32(a, 8); }
static KVT_INLINE vi   vi_round(vf a)                  { return _mm256_cvtps_epi32(a); }
static KVT_INLINE int32_t vi_hsum(vi a) {
    __m128i x = _mm_add_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
    x = _mm_add_epi32(x, _mm_shuffle_epi32(x, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(x, _mm_shuffle_epi32(x, 0xb1)));
}
#ifdef __AVXVNNI__
#define KVT_BYTES
static KVT_INLINE vi   vi_dot4 (vi a, vi b, vi c)      { return _mm256_dpbusd_avx_epi32(c, b, a); }
static KVT_INLINE void vi_store_planes(int8_t * p, int, vi a) {
    const __m128i x     = _mm_packs_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
    const __m128i order = _mm_setr_epi8(1, 3, 5, 7, 0, 2, 4, 6, 9, 11, 13, 15, 8, 10, 12, 14);
    const __m128i bytes = _mm_xor_si128(_mm_add_epi16(x, _mm_set1_epi16(128)), _mm_set1_epi16(128)); // lo, hi
    _mm_storeu_si128((__m128i *) p, _mm_shuffle_epi8(bytes, order));
}
#else
static KVT_INLINE vi   vi_dot  (vi a, vi b, vi c)      { return _mm256_add_epi32(c, _mm256_madd_epi16(a, b)); }
#endif
static KVT_INLINE vi   vi_even (vi a)                  { return _mm256_and_si256(a, _mm256_set1_epi16(255)); }
static KVT_INLINE vi   vi_odd  (vi a)                  { return _mm256_srli_epi16(a, 8); }
static KVT_INLINE void vi_store_i16(int16_t * p, vi a) {
    _mm_storeu_si128((__m128i *) p, _mm_packs_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1)));
}
static KVT_INLINE void vi_store_pairs(int16_t * p, vi a) { vi_store_i16(p, _mm256_shuffle_epi32(a, 0xd8)); }

#define KVT_BLOCKS
typedef __m256i vb;

static KVT_INLINE vb   vb_set1 (int8_t x)              { return _mm256_set1_epi8(x); }
static KVT_INLINE vb   vb_lut  (const int8_t * p)      { return _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *) p)); }
static KVT_INLINE void vb_store(int32_t * p, vb a)     { _mm256_storeu_si256((__m256i *) p, a); }
static KVT_INLINE vb   vb_and  (vb a, vb b)            { return _mm256_and_si256(a, b); }
static KVT_INLINE vb   vb_or   (vb a, vb b)            { return _mm256_or_si256(a, b); }
static KVT_INLINE vb   vb_add  (vb a, vb b)            { return _mm256_add_epi8(a, b); }
static KVT_INLINE vb   vb_sub  (vb a, vb b)            { return _mm256_sub_epi8(a, b); }
static KVT_INLINE vb   vb_shl16(vb a, int n)           { return _mm256_slli_epi16(a, n); }
static KVT_INLINE vb   vb_shr16(vb a, int n)           { return _mm256_srli_epi16(a, n); }
static KVT_INLINE vb   vb_look (vb lut, vb i)          { return _mm256_shuffle_epi8(lut, i); }
static KVT_INLINE vb   vb_test (vb a, vb bits, vb x)   { return _mm256_and_si256(_mm256_cmpeq_epi8(_mm256_and_si256(a, bits), bits), x); }
static KVT_INLINE vb   vb_load (const char * p, size_t nb) {
    return _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128((const __m128i *) p)), _mm_loadu_si128((const __m128i *) (p + nb)), 1);
}
static KVT_INLINE vb   vb_load4(const char * p, size_t nb) {
    int32_t x[2];
    memcpy(x,     p,        sizeof(*x));
    memcpy(x + 1, p + nb, sizeof(*x));
    return _mm256_inserti128_si256(_mm256_set1_epi32(x[0]), _mm_set1_epi32(x[1]), 1);
}
static KVT_INLINE vb   vb_load8(const char * p, size_t nb) {
    int64_t x[2];
    memcpy(x,     p,        sizeof(*x));
    memcpy(x + 1, p + nb, sizeof(*x));
    return _mm256_setr_epi64x(x[0], x[0], x[1], x[1]);
}
static KVT_INLINE void vb_transpose(const vb * a, vb * x) {
    const __m256i b0 = _mm256_unpacklo_epi32(a[0], a[1]), b1 = _mm256_unpackhi_epi32(a[0], a[1]);
    const __m256i b2 = _mm256_unpacklo_epi32(a[2], a[3]), b3 = _mm256_unpackhi_epi32(a[2], a[3]);
    x[0] = _mm256_unpacklo_epi64(b0, b2);
    x[1] = _mm256_unpackhi_epi64(b0, b2);
    x[2] = _mm256_unpacklo_epi64(b1, b3);
    x[3] = _mm256_unpackhi_epi64(b1, b3);
}
// lane l of a[i] is of row 2*l + i: to fours of the rows, 8 of them in a vector
static KVT_INLINE void vb_across_rows(const vb * a, vb * c) {
    const __m256i order = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    c[0] = _mm256_shuffle_epi8(_mm256_permute4x64_epi64(_mm256_unpacklo_epi32(a[0], a[1]), 0xd8), order);
    c[1] = _mm256_shuffle_epi8(_mm256_permute4x64_epi64(_mm256_unpackhi_epi32(a[0], a[1]), 0xd8), order);
}

#elif defined(__ARM_NEON) && defined(__aarch64__)

#define KVT_VW 4
typedef float32x4_t vf;

static KVT_INLINE vf   vf_set1 (float x)               { return vdupq_n_f32(x); }
static KVT_INLINE vf   vf_load (const float * p)       { return vld1q_f32(p); }
static KVT_INLINE void vf_store(float * p, vf a)       { vst1q_f32(p, a); }
static KVT_INLINE vf   vf_add  (vf a, vf b)            { return vaddq_f32(a, b); }
static KVT_INLINE vf   vf_sub  (vf a, vf b)            { return vsubq_f32(a, b); }
static KVT_INLINE vf   vf_mul  (vf a, vf b)            { return vmulq_f32(a, b); }
static KVT_INLINE vf   vf_div  (vf a, vf b)            { return vdivq_f32(a, b); }
static KVT_INLINE vf   vf_max  (vf a, vf b)            { return vmaxnmq_f32(a, b); }
static KVT_INLINE vf   vf_min  (vf a, vf b)            { return vminq_f32(a, b); }
static KVT_INLINE vf   vf_fma  (vf a, vf b, vf c)      { return vfmaq_f32(c, a, b); }
static KVT_INLINE vf   vf_abs  (vf a)                  { return vabsq_f32(a); }
static KVT_INLINE float vf_hmax(vf a)                  { return vmaxnmvq_f32(a); }
static KVT_INLINE float vf_hsum(vf a)                  { return vaddvq_f32(a); }
static KVT_INLINE vf   vf_load_f16 (const uint16_t * p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
static KVT_INLINE vf   vf_load_bf16(const uint16_t * p) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16)); }
static KVT_INLINE bool vf_any_nan (vf a)               { return vminvq_u32(vceqq_f32(a, a)) == 0; }
static KVT_INLINE vf   vf_where_gt(vf a, vf x, vf lim) {
    return vreinterpretq_f32_u32(vandq_u32(vcgtq_f32(x, lim), vreinterpretq_u32_f32(a)));
}
static KVT_INLINE vf   vf_scale2(vf a, vf, vf z, vf x, vf lim) {
    return vf_where_gt(vreinterpretq_f32_u32(vaddq_u32(vreinterpretq_u32_f32(a), vshlq_n_u32(vreinterpretq_u32_f32(z), 23))), x, lim);
}

static KVT_INLINE void vf_transpose(const float * src, int64_t lds, float * dst, int64_t ldd) {
    const float32x4_t a = vld1q_f32(src), b = vld1q_f32(src + lds), c = vld1q_f32(src + 2*lds), d = vld1q_f32(src + 3*lds);
    const float64x2_t ab0 = vreinterpretq_f64_f32(vtrn1q_f32(a, b)), ab1 = vreinterpretq_f64_f32(vtrn2q_f32(a, b));
    const float64x2_t cd0 = vreinterpretq_f64_f32(vtrn1q_f32(c, d)), cd1 = vreinterpretq_f64_f32(vtrn2q_f32(c, d));
    vst1q_f32(dst,         vreinterpretq_f32_f64(vtrn1q_f64(ab0, cd0)));
    vst1q_f32(dst +   ldd, vreinterpretq_f32_f64(vtrn1q_f64(ab1, cd1)));
    vst1q_f32(dst + 2*ldd, vreinterpretq_f32_f64(vtrn2q_f64(ab0, cd0)));
    vst1q_f32(dst + 3*ldd, vreinterpretq_f32_f64(vtrn2q_f64(ab1, cd1)));
}

#define KVT_BLOCKS
typedef int8x16_t vb;

static KVT_INLINE vb   vb_set1 (int8_t x)              { return vdupq_n_s8(x); }
static KVT_INLINE vb   vb_lut  (const int8_t * p)      { return vld1q_s8(p); }
static KVT_INLINE vb   vb_and  (vb a, vb b)            { return vandq_s8(a, b); }
static KVT_INLINE vb   vb_or   (vb a, vb b)            { return vorrq_s8(a, b); }
static KVT_INLINE vb   vb_add  (vb a, vb b)            { return vaddq_s8(a, b); }
static KVT_INLINE vb   vb_sub  (vb a, vb b)            { return vsubq_s8(a, b); }
static KVT_INLINE vb   vb_shl16(vb a, int n)           { return vreinterpretq_s8_u16(vshlq_u16(vreinterpretq_u16_s8(a), vdupq_n_s16((int16_t) n))); }
static KVT_INLINE vb   vb_shr16(vb a, int n)           { return vreinterpretq_s8_u16(vshlq_u16(vreinterpretq_u16_s8(a), vdupq_n_s16((int16_t) -n))); }
static KVT_INLINE vb   vb_look (vb lut, vb i)          { return vqtbl1q_s8(lut, vreinterpretq_u8_s8(i)); }
static KVT_INLINE vb   vb_test (vb a, vb bits, vb x)   { return vandq_s8(vreinterpretq_s8_u8(vtstq_s8(a, bits)), x); }
static KVT_INLINE vb   vb_load (const char * p, size_t) { return vld1q_s8((const int8_t *) p); }
static KVT_INLINE vb   vb_load4(const char * p, size_t) {
    int32_t x;
    memcpy(&x, p, sizeof(x));
    return vreinterpretq_s8_s32(vdupq_n_s32(x));
}
static KVT_INLINE vb   vb_load8(const char * p, size_t) { return vcombine_s8(vld1_s8((const int8_t *) p), vld1_s8((const int8_t *) p)); }
#ifdef __ARM_FEATURE_DOTPROD

#define KVT_DOT
#define KVT_BYTES
typedef int32x4_t vi;

static KVT_INLINE vi   vi_set1 (int32_t x)             { return vdupq_n_s32(x); }
static KVT_INLINE vi   vi_load (const int32_t * p)     { return vld1q_s32(p); }
static KVT_INLINE vf   vi_float(vi a)                  { return vcvtq_f32_s32(a); }
static KVT_INLINE vi   vi_add  (vi a, vi b)            { return vaddq_s32(a, b); }
static KVT_INLINE vi   vi_shl8 (vi a)                  { return vshlq_n_s32(a, 8); }
static KVT_INLINE vi   vi_round(vf a)                  { return vcvtnq_s32_f32(a); }
static KVT_INLINE int32_t vi_hsum(vi a)                { return vaddvq_s32(a); }
static KVT_INLINE vi   vi_dot4 (vi a, vi b, vi c)      { return vdotq_s32(c, vreinterpretq_s8_s32(b), vreinterpretq_s8_s32(a)); }
static KVT_INLINE void vi_store_planes(int8_t * p, int n, vi a) {
    const int16x4_t lo = vmovn_s32(a), hi = vshr_n_s16(vadd_s16(lo, vdup_n_s16(128)), 8);
    const int32x2_t x  = vreinterpret_s32_s8(vmovn_s16(vcombine_s16(hi, lo)));
    vst1_lane_s32((int32_t *) p, x, 0);
    vst1_lane_s32((int32_t *) (p + n), x, 1);
}
#ifdef __ARM_FEATURE_MATMUL_INT8
#define KVT_MATRICES
// c + a b: a is two rows of eight bytes, b two columns, c and what it gives two rows of two
static KVT_INLINE vi   vi_matrix(vi a, vi b, vi c)     { return vmmlaq_s32(c, vreinterpretq_s8_s32(a), vreinterpretq_s8_s32(b)); }
// of a and b, in turns, the first or the second half
static KVT_INLINE vi   vi_zip  (vi a, vi b, int half)  { return half == 0 ? vzip1q_s32(a, b) : vzip2q_s32(a, b); }
// the first or the second halves of a and b
static KVT_INLINE vi   vi_halves(vi a, vi b, int half) {
    const int64x2_t x = vreinterpretq_s64_s32(a), y = vreinterpretq_s64_s32(b);
    return vreinterpretq_s32_s64(half == 0 ? vzip1q_s64(x, y) : vzip2q_s64(x, y));
}
#endif
static KVT_INLINE void vi_store_i16(int16_t * p, vi a) { vst1_s16(p, vqmovn_s32(a)); }
static KVT_INLINE void vb_transpose(const vb * a, vb * x) {
    const int32x4x2_t b = vzipq_s32(vreinterpretq_s32_s8(a[0]), vreinterpretq_s32_s8(a[2]));
    const int32x4x2_t c = vzipq_s32(vreinterpretq_s32_s8(a[1]), vreinterpretq_s32_s8(a[3]));
    x[0] = vreinterpretq_s8_s32(vzip1q_s32(b.val[0], c.val[0]));
    x[1] = vreinterpretq_s8_s32(vzip2q_s32(b.val[0], c.val[0]));
    x[2] = vreinterpretq_s8_s32(vzip1q_s32(b.val[1], c.val[1]));
    x[3] = vreinterpretq_s8_s32(vzip2q_s32(b.val[1], c.val[1]));
}
static KVT_INLINE void vb_store(int32_t * p, vb a)     { vst1q_s32(p, vreinterpretq_s32_s8(a)); }
// a[i] is of row i: to fours of the rows, 4 of them in a vector
static KVT_INLINE void vb_across_rows(const vb * a, vb * c) {
    const int8x16x2_t x = vzipq_s8(a[0], a[2]), y = vzipq_s8(a[1], a[3]);
    for (int i = 0; i < 2; i++) {
        c[2*i + 0] = vzip1q_s8(x.val[i], y.val[i]);
        c[2*i + 1] = vzip2q_s8(x.val[i], y.val[i]);
    }
}

#endif

// 16 floats of the 16 bytes
static KVT_INLINE void vb_floats(vb a, vf * x) {
    const int16x8_t lo = vmovl_s8(vget_low_s8(a)), hi = vmovl_s8(vget_high_s8(a));
    x[0] = vcvtq_f32_s32(vmovl_s16(vget_low_s16 (lo)));
    x[1] = vcvtq_f32_s32(vmovl_s16(vget_high_s16(lo)));
    x[2] = vcvtq_f32_s32(vmovl_s16(vget_low_s16 (hi)));
    x[3] = vcvtq_f32_s32(vmovl_s16(vget_high_s16(hi)));
}

#elif defined(__GNUC__)

#define KVT_VW 4
typedef float    vf __attribute__((vector_size(16)));
typedef int32_t  vi __attribute__((vector_size(16)));

static KVT_INLINE vf   vf_set1 (float x)               { return vf{x, x, x, x}; }
static KVT_INLINE vf   vf_load (const float * p)       { vf a; memcpy(&a, p, sizeof(a)); return a; }
static KVT_INLINE void vf_store(float * p, vf a)       { memcpy(p, &a, sizeof(a)); }
static KVT_INLINE vf   vf_add  (vf a, vf b)            { return a + b; }
static KVT_INLINE vf   vf_sub  (vf a, vf b)            { return a - b; }
static KVT_INLINE vf   vf_mul  (vf a, vf b)            { return a*b; }
static KVT_INLINE vf   vf_div  (vf a, vf b)            { return a/b; }
static KVT_INLINE vf   vf_max  (vf a, vf b)            { const vi m = a > b; return (vf) ((m & (vi) a) | (~m & (vi) b)); }
static KVT_INLINE vf   vf_min  (vf a, vf b)            { const vi m = a < b; return (vf) ((m & (vi) a) | (~m & (vi) b)); }
static KVT_INLINE vf   vf_fma  (vf a, vf b, vf c)      { return a*b + c; }
static KVT_INLINE vf   vf_abs  (vf a)                  { return vf_max(a, -a); }
static KVT_INLINE float vf_hmax(vf a)                  { return MAX(MAX(a[0], a[1]), MAX(a[2], a[3])); }
static KVT_INLINE float vf_hsum(vf a)                  { return (a[0] + a[1]) + (a[2] + a[3]); }
static KVT_INLINE vf   vf_load_f16 (const uint16_t * p) {
    return vf{GGML_CPU_FP16_TO_FP32(p[0]), GGML_CPU_FP16_TO_FP32(p[1]), GGML_CPU_FP16_TO_FP32(p[2]), GGML_CPU_FP16_TO_FP32(p[3])};
}
static KVT_INLINE vf   vf_load_bf16(const uint16_t * p) {
    return (vf) (vi{p[0], p[1], p[2], p[3]} << 16);
}
static KVT_INLINE bool vf_any_nan (vf a)               { return a[0] != a[0] || a[1] != a[1] || a[2] != a[2] || a[3] != a[3]; }
static KVT_INLINE vf   vf_where_gt(vf a, vf x, vf lim) { return (vf) ((x > lim) & (vi) a); }
static KVT_INLINE vf   vf_scale2(vf a, vf, vf z, vf x, vf lim) { return vf_where_gt((vf) ((vi) a + ((vi) z << 23)), x, lim); }

static KVT_INLINE void vf_transpose(const float * src, int64_t lds, float * dst, int64_t ldd) {
    for (int i = 0; i < 4; i++) {
        for (int j = 0; j < 4; j++) {
            dst[j*ldd + i] = src[i*lds + j];
        }
    }
}

#endif

#if defined(KVT_DOT) && !defined(KVT_ROUND_BIAS)
#define KVT_ROUND_BIAS 0
static KVT_INLINE vi   vi_round_product(vf a, vf b)    { return vi_round(vf_mul(a, b)); }
#endif

#if defined(KVT_DOT) && !defined(__aarch64__)
#define KVT_FEW // rows of Q are multiplied straight from the codes
#define KVT_AROUND(zero) (zero)
#else
#define KVT_AROUND(zero) 0
#endif
