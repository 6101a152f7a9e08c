// Sums and maxima over a warp, the same in every lane and the same bits every time.
#pragma once

#include "common/cuda_launch.cuh"

namespace metro::cuda {

constexpr unsigned kAllLanes = 0xffffffffu;

template <typename T>
__device__ inline T warp_sum(T x) {
#pragma unroll
  for (int bit = kWarp / 2; bit > 0; bit /= 2) x += __shfl_xor_sync(kAllLanes, x, bit);
  return x;
}

__device__ inline float warp_max(float x) {
#pragma unroll
  for (int bit = kWarp / 2; bit > 0; bit /= 2) x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, bit));
  return x;
}

}  // namespace metro::cuda
