// Sums by column over rows that many blocks share out, in two steps and always in the same order:
// a block leaves a row of partial sums, partials [blocks, cols], and a second kernel adds those.
#pragma once

#include "common/cuda_launch.cuh"

namespace metro::cuda {

// The first step's end: sums[i] is this warp's sum of column `first` + lane · N + i. Adds the
// warps' in their order and writes the columns below `cols` to this block's partial sums.
template <int kWarps, int N>
__device__ inline void write_column_sums(const float (&sums)[N], float (&shared)[kWarps][kWarp * N],
                                         float* partials, int64_t first, int64_t cols) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
#pragma unroll
  for (int i = 0; i < N; ++i) shared[warp][lane * N + i] = sums[i];
  __syncthreads();
  for (int i = threadIdx.x; i < kWarp * N; i += kWarps * kWarp) {
    float sum = 0.0f;
    for (int w = 0; w < kWarps; ++w) sum += shared[w][i];
    if (first + i < cols) partials[first + i] = sum;
  }
}

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

namespace {

constexpr int kColumnSumWarps = 8;

__global__ void __launch_bounds__(kColumnSumWarps* kWarp)
    column_sum_kernel(const float* partials, float* out, int64_t blocks, int64_t cols, bool add) {
  __shared__ float shared[kColumnSumWarps][kWarp];
  const float sum = column_sum<kColumnSumWarps>(partials, blocks, cols, shared);
  const int64_t col = static_cast<int64_t>(blockIdx.x) * kWarp + threadIdx.x;
  if (threadIdx.x < kWarp && col < cols) out[col] = add ? out[col] + sum : sum;
}

// out [cols] = or += the sums of partials [blocks, cols].
inline cudaError_t launch_column_sum(const float* partials, float* out, int64_t blocks,
                                     int64_t cols, bool add, void* stream) {
  const dim3 grid(static_cast<unsigned>(ceil_div(cols, kWarp)));
  return launch(column_sum_kernel, grid, dim3(kColumnSumWarps * kWarp), 0, stream, partials, out,
                blocks, cols, add);
}

}  // namespace
}  // namespace metro::cuda
