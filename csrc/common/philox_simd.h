// philox.h for kLanes counters at a time. CPU kernels only.
#pragma once

#include "common/philox.h"
#include "common/simd.h"

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // inside GCC 12's own AVX-512 header
#endif

namespace metro::METRO_CPU_NS {

struct Philox4v {
  vu word[4];
};

// The high and low halves of the 64-bit products a[i] · m.
inline void multiply_wide(vu a, uint32_t m, vu* high, vu* low) {
  *low = a * m;
#if defined(__AVX512F__)
  const __m512i factor = _mm512_set1_epi32(static_cast<int>(m));
  const __m512i even = _mm512_mul_epu32((__m512i)a, factor);
  const __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64((__m512i)a, 32), factor);
  *high = (vu)_mm512_mask_blend_epi32(0xaaaa, _mm512_srli_epi64(even, 32), odd);
#elif defined(__AVX2__)
  const __m256i factor = _mm256_set1_epi32(static_cast<int>(m));
  const __m256i even = _mm256_mul_epu32((__m256i)a, factor);
  const __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64((__m256i)a, 32), factor);
  *high = (vu)_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
#else
  for (int i = 0; i < kLanes; ++i) {
    (*high)[i] = static_cast<uint32_t>((static_cast<uint64_t>(a[i]) * m) >> 32);
  }
#endif
}

inline Philox4v philox(uint64_t seed, vu c0, vu c1, vu c2, vu c3) {
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round) {
    vu high0, low0, high1, low1;
    multiply_wide(c0, kPhiloxM0, &high0, &low0);
    multiply_wide(c2, kPhiloxM1, &high1, &low1);
    c0 = high1 ^ c1 ^ k0;
    c1 = low1;
    c2 = high0 ^ c3 ^ k1;
    c3 = low0;
    k0 += kPhiloxW0;
    k1 += kPhiloxW1;
  }
  return {{c0, c1, c2, c3}};
}

inline vu iota() {
  vu lanes{};
  for (int i = 0; i < kLanes; ++i) lanes[i] = static_cast<uint32_t>(i);
  return lanes;
}

// Counters in 64-bit lanes: a 32 × 32 → 64 bit multiplication gives both halves of a product at
// once, and a word is whatever stands in the lower half of its lane.
typedef uint64_t vu64 __attribute__((vector_size(kLanes * 4)));

inline vu64 multiply_lower(vu64 a, uint64_t m) {
#if defined(__AVX512F__)
  return (vu64)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(static_cast<int64_t>(m)));
#elif defined(__AVX2__)
  return (vu64)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(static_cast<int64_t>(m)));
#else
  return (a & 0xffffffffu) * m;
#endif
}

inline vu64 exclusive_or(vu64 a, vu64 b, uint64_t c) {
#if defined(__AVX512F__)
  return (vu64)_mm512_ternarylogic_epi64((__m512i)a, (__m512i)b,
                                         _mm512_set1_epi64(static_cast<int64_t>(c)), 0x96);
#else
  return a ^ b ^ c;
#endif
}

// Pairs of words as they are drawn, into the order of the calls: see half_words.
inline void store_in_order(vu64 ab, vu64 cd, uint16_t* out) {
#if defined(__AVX512F__)
  const __m512i halves[2] = {_mm512_unpacklo_epi64((__m512i)ab, (__m512i)cd),
                             _mm512_unpackhi_epi64((__m512i)ab, (__m512i)cd)};
  memcpy(out, halves, sizeof(halves));
#elif defined(__AVX2__)
  const __m256i halves[2] = {_mm256_unpacklo_epi64((__m256i)ab, (__m256i)cd),
                             _mm256_unpackhi_epi64((__m256i)ab, (__m256i)cd)};
  memcpy(out, halves, sizeof(halves));
#else
  const uint64_t words[4] = {ab[0], cd[0], ab[1], cd[1]};
  memcpy(out, words, sizeof(words));
#endif
}

// The 16-bit numbers of the calls c0 = first, first + 1, ..., first + kChains · kLanes / 2 - 1:
// what decides over dropout for 4 · kChains · kLanes consecutive elements, in their order. With a
// 64-bit index, its upper half is the second counter word in place of c1. The rounds of a call
// depend on each other; several chains hide their latency.
template <int kChains = 2>
inline void half_words(uint64_t seed, uint64_t first, uint32_t c1, uint32_t c2, uint32_t c3,
                       uint16_t* out, bool index_is_64_bit = true) {
  // Even lanes hold the first half of the calls, odd lanes the second: interleaving the finished
  // pairs of words within 128 bits then puts the calls in order.
  uint64_t places[kLanes / 2];
#pragma GCC unroll 8
  for (int i = 0; i < kLanes / 2; ++i) {
    places[i] = static_cast<uint64_t>(i / 2 + (i & 1) * (kLanes / 4));
  }
  vu64 index;
  memcpy(&index, places, sizeof(index));
  index += first;
  vu64 a[kChains], b[kChains], c[kChains], d[kChains];
#pragma GCC unroll 4
  for (int k = 0; k < kChains; ++k) {
    a[k] = index + static_cast<uint64_t>(k * kLanes / 2);
    b[k] = index_is_64_bit ? a[k] >> 32 : vu64{} + c1;
    c[k] = vu64{} + c2;
    d[k] = vu64{} + c3;
  }
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#pragma GCC unroll 1  // else the round keys fill the registers
  for (int round = 0; round < kPhiloxRounds; ++round) {
#pragma GCC unroll 4
    for (int k = 0; k < kChains; ++k) {
      const vu64 p0 = multiply_lower(a[k], kPhiloxM0), p1 = multiply_lower(c[k], kPhiloxM1);
      a[k] = exclusive_or(p1 >> 32, b[k], k0);
      c[k] = exclusive_or(p0 >> 32, d[k], k1);
      b[k] = p1;
      d[k] = p0;
    }
    k0 += kPhiloxW0;
    k1 += kPhiloxW1;
  }
#pragma GCC unroll 4
  for (int k = 0; k < kChains; ++k) {
    store_in_order((b[k] << 32) | (a[k] & 0xffffffffu), (d[k] << 32) | (c[k] & 0xffffffffu),
                   out + k * 4 * kLanes);
  }
}

// Where the 16-bit numbers are at least `threshold`: the elements that dropout keeps.
inline vi at_least(const uint16_t* numbers, uint32_t threshold) {
  vu16 half;
  memcpy(&half, numbers, sizeof(half));
#if defined(__AVX512F__)
  const vu wide = (vu)_mm512_cvtepu16_epi32((__m256i)half);
#else
  const vu wide = __builtin_convertvector(half, vu);
#endif
  return (vi)(wide >= set_u(threshold));
}

}  // namespace metro::METRO_CPU_NS

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif
