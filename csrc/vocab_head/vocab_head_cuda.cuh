// What the kernels of the vocabulary head share: a lane's stretch of a row of logits.
#pragma once

#include "common/cuda_dtype.cuh"
#include "common/cuda_reduce.cuh"
#include "common/cuda_vector.cuh"
#include "vocab_head/vocab_head.h"

namespace metro::vocab {

constexpr int kItems = 8;  // logits a lane: a warp covers a sample tile
static_assert(kItems * cuda::kWarp == kSampleTile);

// Logits of a lane: `left` columns of the row are left from its first on; -inf beyond.
template <typename T, bool kWide>
__device__ inline void load_logits(const T* logits, const float* bias, int64_t left,
                                   float (&z)[kItems]) {
  float b[kItems];
  if (kWide) {
#pragma unroll
    for (int i = 0; i < kItems; ++i) z[i] = -INFINITY;
    if (left <= 0) return;
    cuda::load<kItems>(logits, z);
    cuda::load<kItems>(bias, b);
#pragma unroll
    for (int i = 0; i < kItems; ++i) z[i] += b[i];
  } else {
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      z[i] = i < left ? cuda::to_float(logits[i]) + bias[i] : -INFINITY;
    }
  }
}

// Whether lanes may load their logits and biases whole.
template <typename T>
inline bool loads_wide(int64_t vocab, const void* logits, const float* bias) {
  return vocab % kItems == 0 && cuda::vector_width<T>(vocab, logits, bias) > 1;
}

}  // namespace metro::vocab
