// Which probabilities the dropout of attention keeps, as bits. CPU kernels only.
#pragma once

#include "attention/attention.h"
#include "common/philox_simd.h"
#include "common/tile_gemm.h"

namespace metro::METRO_CPU_NS {

struct AttentionDropout {
  bool on;
  uint32_t threshold;
  float scale;
  uint64_t seed;
  uint32_t purpose;
};

inline AttentionDropout attention_dropout(const AttentionParams& p) {
  const Dropout d = make_dropout(p.p);
  const bool on = d.threshold > 0;
  return {on, d.threshold, on ? d.scale : 1.0f, on ? static_cast<uint64_t>(*p.seed) : 0,
          counter_word(Purpose::kAttentionDropout, p.draw)};
}

// Of a strip of queries and a tile of keys: bit k of row[r] is set when the probability of query r
// and key k is kept.
struct KeptBits {
  uint64_t row[kStripRows];
};

// kept_keys: the strip whose first query is `token` (its packed index), the tile whose first key is
// `first_key` (from the start of its sequence, a multiple of 64).
#ifdef __AVX512BW__
// A call of Philox to each 64-bit lane, whose high half may hold anything between rounds: that is
// where the products come out, and the multiplication reads low halves only. The rows are
// independent chains.
inline KeptBits kept_keys(const AttentionDropout& d, int64_t first_key, int64_t token,
                          int64_t head) {
  const __m512i m0 = _mm512_set1_epi64(kPhiloxM0), m1 = _mm512_set1_epi64(kPhiloxM1);
  // Calls in the order that the unpacking at the end straightens.
  const __m512i order = _mm512_set_epi64(7, 3, 6, 2, 5, 1, 4, 0);
  __m512i c0[kStripRows], c1[kStripRows], c2[kStripRows], c3[kStripRows];
#pragma GCC unroll 4
  for (int r = 0; r < kStripRows; ++r) {
    c0[r] = _mm512_add_epi64(_mm512_set1_epi64(first_key / 8), order);
    c1[r] = _mm512_set1_epi64(token + r);
    c2[r] = _mm512_set1_epi64(d.purpose);
    c3[r] = _mm512_set1_epi64(head);
  }
  uint32_t k0 = static_cast<uint32_t>(d.seed), k1 = static_cast<uint32_t>(d.seed >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const __m512i key0 = _mm512_set1_epi64(k0), key1 = _mm512_set1_epi64(k1);
#pragma GCC unroll 4
    for (int r = 0; r < kStripRows; ++r) {
      const __m512i p0 = _mm512_mul_epu32(c0[r], m0), p1 = _mm512_mul_epu32(c2[r], m1);
      // 0x96: exclusive or of all three
      c0[r] = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p1, 32), c1[r], key0, 0x96);
      c2[r] = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p0, 32), c3[r], key1, 0x96);
      c1[r] = p1;
      c3[r] = p0;
    }
    k0 += kPhiloxW0;
    k1 += kPhiloxW1;
  }
  const __m512i threshold = _mm512_set1_epi16(static_cast<int16_t>(d.threshold));
  KeptBits kept;
#pragma GCC unroll 4
  for (int r = 0; r < kStripRows; ++r) {
    const __m512i a = _mm512_mask_blend_epi32(0xaaaa, c0[r], _mm512_slli_epi64(c1[r], 32));
    const __m512i b = _mm512_mask_blend_epi32(0xaaaa, c2[r], _mm512_slli_epi64(c3[r], 32));
    const uint64_t low = _mm512_cmpge_epu16_mask(_mm512_unpacklo_epi64(a, b), threshold);
    const uint64_t high = _mm512_cmpge_epu16_mask(_mm512_unpackhi_epi64(a, b), threshold);
    kept.row[r] = d.threshold > 0xffffu ? 0 : low | (high << 32);
  }
  return kept;
}

// x in the lanes of vector v that are kept, else 0.
inline vf keep(vf x, uint64_t bits, int v) {
  return (vf)_mm512_maskz_mov_ps(static_cast<__mmask16>(bits >> (v * kLanes)), (__m512)x);
}
#else
inline KeptBits kept_keys(const AttentionDropout& d, int64_t first_key, int64_t token,
                          int64_t head) {
  constexpr int kNumbers = 8 * kLanes;  // of a call of half_words
  KeptBits kept{};
  for (int64_t r = 0; r < kStripRows; ++r) {
    for (int at = 0; at < kAttentionTile; at += kNumbers) {
      uint16_t numbers[kNumbers];
      half_words(d.seed, static_cast<uint64_t>(first_key + at) / 8,
                 static_cast<uint32_t>(token + r), d.purpose, static_cast<uint32_t>(head), numbers,
                 false);
      for (int k = 0; k < kNumbers; ++k) {
        kept.row[r] |= static_cast<uint64_t>(numbers[k] >= d.threshold) << (at + k);
      }
    }
  }
  return kept;
}

inline vf keep(vf x, uint64_t bits, int v) {
  const vu word = set_u(static_cast<uint32_t>(bits >> (v * kLanes)));
  return select((vi)((word >> iota()) & 1u) != 0, x, vf{});
}
#endif

}  // namespace metro::METRO_CPU_NS
