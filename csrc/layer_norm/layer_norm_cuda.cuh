// What the two passes of layer_norm share: sums over a block and dropout.
#pragma once

#include "common/cuda_launch.cuh"
#include "common/cuda_reduce.cuh"
#include "layer_norm/layer_norm.h"

namespace metro::norm {

using cuda::kWarp;

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;

// The same sum in every thread; `shared` is free again when the next barrier is passed.
__device__ inline float block_sum(float x, float* shared) {
  x = cuda::warp_sum(x);
  __syncthreads();
  if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = x;
  __syncthreads();
  float sum = 0.0f;
  for (int w = 0; w < kWarps; ++w) sum += shared[w];
  return sum;
}

// Dropout of N elements from `element` on, a multiple of N; N divides 8.
template <int N>
__device__ inline void drop(float (&x)[N], uint64_t seed, int64_t element, Dropout dropout,
                            uint32_t purpose) {
  const uint64_t call = static_cast<uint64_t>(element) / 8;
  // By selection: a run-time index would put the words into local memory.
  const int first = N == 8 ? 0 : static_cast<int>(element % 8);
  const Philox4 r =
      philox(seed, static_cast<uint32_t>(call), static_cast<uint32_t>(call >> 32), purpose, 0);
  const uint32_t low = first & 4 ? r.word[2] : r.word[0], high = first & 4 ? r.word[3] : r.word[1];
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const int k = first % 4 + i;  // in low and high; a constant unless N = 1
    const uint32_t word = N == 8 ? r.word[i / 2] : (k & 2) ? high : low;
    const uint32_t number = word >> ((k & 1) * 16) & 0xffffu;
    x[i] = number >= dropout.threshold ? x[i] * dropout.scale : 0.0f;
  }
}

}  // namespace metro::norm
