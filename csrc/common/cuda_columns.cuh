// The sum of what blocks left by column: partials [blocks, cols], a row of partial sums a block.
#pragma once

#include "common/cuda_launch.cuh"

namespace metro::cuda {

// Column blockIdx.x · kWarp + lane, added up by kWarps warps, each taking every kWarps-th block,
// and then in the order of the warps: the same bits every time, and no thread waits for a long
// chain of loads. Called by all threads; every warp gets the sums.
template <int kWarps>
__device__ inline float column_sum(const float* partials, int64_t blocks, int64_t cols,
                                   float (&shared)[kWarps][kWarp]) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t col = static_cast<int64_t>(blockIdx.x) * kWarp + lane;
  float sum = 0.0f;
  if (col < cols) {
#pragma unroll 4
    for (int64_t block = warp; block < blocks; block += kWarps) sum += partials[block * cols + col];
  }
  shared[warp][lane] = sum;
  __syncthreads();
  sum = 0.0f;
  for (int w = 0; w < kWarps; ++w) sum += shared[w][lane];
  return sum;
}

}  // namespace metro::cuda
