// Counter-based random numbers: Philox4x32-10 (Salmon et al., SC 2011).
//
// key = the 64-bit seed; counter = {index low, index high, purpose and draw, extra}. What is drawn
// depends on nothing else, so CPU, CUDA, any number of threads and any number of ranks agree.
// Compiles as host C++ and as CUDA C++; multiplications that feed additions are explicit fused
// multiply-adds, so that both give the same bits.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define METRO_HD __host__ __device__
#else
#define METRO_HD
#endif

// CUDA sources, also those that the CPU emulation of the tests compiles.
#if defined(__CUDACC__) || defined(METRO_EMULATE_CUDA)
#define METRO_CUDA_SOURCE
#endif

#ifndef METRO_CPU_NS
#define METRO_CPU_NS cpu_portable
#endif

namespace metro {

// What a number is drawn for: the top byte of the third counter word, above the caller's `draw`.
enum class Purpose : uint32_t {
  kHiddenDropout = 1,     // index = element / 8: eight 16-bit numbers a call
  kAttentionDropout = 2,  // index = {key / 8, query token}, extra = head; key counts from the
                          // start of its sequence
  kMask = 3,              // index = token; words: order of selection, kind, random token
  kSample = 4,            // index = {row, tile}; words: Gumbel noise of the tile, token inside it
};

// Draws share a seed and differ in `draw` < 2^24.
METRO_HD inline uint32_t counter_word(Purpose purpose, uint32_t draw) {
  return (static_cast<uint32_t>(purpose) << 24) | (draw & 0xffffffu);
}

struct Philox4 {
  uint32_t word[4];
};

constexpr uint32_t kPhiloxM0 = 0xD2511F53u, kPhiloxM1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxW0 = 0x9E3779B9u, kPhiloxW1 = 0xBB67AE85u;
constexpr int kPhiloxRounds = 10;

// Dropout drops an element when its 16-bit number is below this threshold. The probability is
// rounded to a multiple of 2^-16, and the scale is the exact reciprocal of the share kept.
struct Dropout {
  uint32_t threshold;
  float scale;
};

METRO_HD inline Dropout make_dropout(double p) {
  const uint32_t threshold = static_cast<uint32_t>(p * 65536.0 + 0.5);
  return {threshold,
          threshold >= 65536u ? 0.0f : 65536.0f / (65536.0f - static_cast<float>(threshold))};
}

// The functions below differ in machine code between the instruction sets of the CPU kernels.
#ifndef METRO_CUDA_SOURCE
namespace METRO_CPU_NS {
#endif

METRO_HD inline Philox4 philox(uint64_t seed, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(kPhiloxM0) * c0;
    const uint64_t p1 = static_cast<uint64_t>(kPhiloxM1) * c2;
    const uint32_t n0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    const uint32_t n2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(p1);
    c3 = static_cast<uint32_t>(p0);
    c0 = n0;
    c2 = n2;
    k0 += kPhiloxW0;
    k1 += kPhiloxW1;
  }
  return {{c0, c1, c2, c3}};
}

// The k-th (0..7) 16-bit number of a call.
METRO_HD inline uint32_t half_word(const Philox4& r, int k) {
  return (r.word[k >> 1] >> ((k & 1) * 16)) & 0xffffu;
}

// Uniform on (0, 1): the midpoints of 2^23 equal cells, exact in float32, never 0 or 1.
METRO_HD inline float uniform(uint32_t word) {
  return (static_cast<float>(word >> 9) + 0.5f) * 1.1920928955078125e-7f;
}

METRO_HD inline float fused(float a, float b, float c) { return fmaf(a, b, c); }

// ln x for normal x > 0, relative error below 1e-7: x = m·2^e, m in [√½, √2), and a minimax
// polynomial for (ln m - t + t²/2) / t³, t = m - 1.
METRO_HD inline float natural_log(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  const uint32_t shifted = bits - 0x3f3504f3u;  // the bits of √½
  const float e = static_cast<float>(static_cast<int32_t>(shifted) >> 23);
  const uint32_t m_bits = (shifted & 0x007fffffu) + 0x3f3504f3u;
  float m;
  memcpy(&m, &m_bits, 4);
  const float t = m - 1.0f;
  float poly = -0.0763463398f;
  poly = fused(poly, t, 0.127618208f);
  poly = fused(poly, t, -0.131602476f);
  poly = fused(poly, t, 0.142017308f);
  poly = fused(poly, t, -0.166233484f);
  poly = fused(poly, t, 0.200012277f);
  poly = fused(poly, t, -0.250008213f);
  poly = fused(poly, t, 0.333333317f);
  const float tail = fused(poly, t, -0.5f) * t;
  return fused(e, 0.693147181f, fused(tail, t, t));
}

// A standard Gumbel number, -ln(-ln u).
METRO_HD inline float gumbel(uint32_t word) { return -natural_log(-natural_log(uniform(word))); }

#ifndef METRO_CUDA_SOURCE
}  // namespace METRO_CPU_NS
#endif

}  // namespace metro
