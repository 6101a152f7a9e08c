// philox.h for kLanes counters at a time. CPU kernels only.
#pragma once

#include "common/philox.h"
#include "common/simd.h"

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

// The 16-bit numbers of kLanes consecutive calls, c0 = first, first + 1, ...: what decides over
// dropout for 8·kLanes consecutive elements, in their order.
inline void half_words(uint64_t seed, uint64_t first, uint32_t c1, uint32_t c2, uint32_t c3,
                       uint16_t* out, bool index_is_64_bit = true) {
  const vu low = set_u(static_cast<uint32_t>(first)) + iota();
  vu high = set_u(c1);
  if (index_is_64_bit) {
    const vu carry = (vu)(low < set_u(static_cast<uint32_t>(first)));
    high = set_u(static_cast<uint32_t>(first >> 32)) - carry;
  }
  const Philox4v r = philox(seed, low, high, set_u(c2), set_u(c3));
  uint32_t words[4][kLanes];
  for (int w = 0; w < 4; ++w) memcpy(words[w], &r.word[w], sizeof(vu));
  uint32_t interleaved[kLanes * 4];
  for (int lane = 0; lane < kLanes; ++lane) {
    for (int w = 0; w < 4; ++w) interleaved[lane * 4 + w] = words[w][lane];
  }
  memcpy(out, interleaved, sizeof(interleaved));
}

}  // namespace metro::METRO_CPU_NS
