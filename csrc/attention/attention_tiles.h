// What the forward and the backward CPU kernel share: work items and scores.
#pragma once

#include "attention/attention.h"
#include "attention/attention_dropout.h"
#include "common/parallel.h"
#include "common/tile_gemm.h"

namespace metro::METRO_CPU_NS {

constexpr int64_t kTile = kAttentionTile;
constexpr int kTileVectors = kTile / kLanes;
static_assert(kAttentionPad % kLanes == 0 && kAttentionPad % kStripRows == 0 &&
              kTile % kAttentionPad == 0);
// Scores are kept in units of ln 2 (times log2 e), so that a probability is a power of two.
constexpr float kLog2E = 1.44269504f;
constexpr float kLn2 = 0.693147181f;

inline bool any(vi mask) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_ps((__m256)mask) != 0;
#else
  return (mask[0] | mask[1] | mask[2] | mask[3]) != 0;
#endif
}

// A (sequence, head) of the batch: where its rows lie.
struct Item {
  int64_t sequence;
  int64_t head;
  int64_t start;   // first token
  int64_t length;  // tokens
  int64_t padded;  // length rounded up to kAttentionPad
};

inline Item attention_item(const AttentionParams& p, int64_t index) {
  const int64_t sequence = p.order[index / p.heads];
  const int64_t start = p.cu_seqlens[sequence];
  const int64_t length = p.cu_seqlens[sequence + 1] - start;
  return {sequence, index % p.heads, start, length, attention_pad(length, kAttentionPad)};
}

// Runs body(item, scratch) for every (sequence, head), longest sequence first, each on the next
// free worker; no result depends on which one that is.
template <typename Body>
inline void for_each_item(const AttentionParams& p, bool backward, const Body& body) {
  const int64_t items = p.active * p.heads;
  const int64_t bytes = attention_scratch(p.longest, p.head_dim, backward);
  int64_t next = 0;
  parallel_for(0, p.workers, 1, [&](int64_t worker, int64_t) {
    char* scratch = static_cast<char*>(p.scratch) + worker * bytes;
    for (;;) {
      const int64_t index = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
      if (index >= items) return;
      body(attention_item(p, index), scratch);
    }
  });
}

template <typename T>
inline const T* qkv_rows(const AttentionParams& p, const Item& item, int part) {
  const int64_t row = (item.start * 3 + part) * p.heads + item.head;
  return static_cast<const T*>(p.qkv) + row * p.head_dim;
}

inline float score_scale(const AttentionParams& p) {
  return 1.0f / __builtin_sqrtf(static_cast<float>(p.head_dim));
}

// out[j - i + padded] = bias(j - i) · log2 e; zero where no pair of tokens lies.
inline void load_bias(const AttentionParams& p, const Item& item, float* out) {
  for (int64_t x = 0; x < 2 * item.padded + kAttentionPad; ++x) out[x] = 0.0f;
  if (p.bias == nullptr) return;
  const float* centre = p.bias + item.head * (2 * p.max_seqlen - 1) + p.max_seqlen - 1;
  for (int64_t x = 1 - item.length; x < item.length; ++x) out[x + item.padded] = centre[x] * kLog2E;
}

// Of the vector of columns from `begin` on, the lanes of columns below `end`.
inline vi lanes_below(int64_t begin, int64_t end) {
  return (vi)iota() < static_cast<int32_t>(end - begin);
}

}  // namespace metro::METRO_CPU_NS
