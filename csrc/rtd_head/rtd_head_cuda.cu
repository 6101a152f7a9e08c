// Floor at R rows of H elements of s bytes: forward R·H·s (hidden in), backward 2·R·H·s (hidden in,
// grad_hidden out).
//
// A block walks its share of the rows, a warp a row. Backward: a warp owns a strip of columns and
// keeps its weights and their gradient's sums in registers; the eight warps' sums are added in a
// fixed order, and a second kernel adds those of the blocks.
#include "common/cuda_columns.cuh"
#include "common/cuda_dtype.cuh"
#include "common/cuda_reduce.cuh"
#include "common/cuda_vector.cuh"
#include "rtd_head/rtd_head.h"

namespace metro {
namespace {

using cuda::ceil_div;
using cuda::kWarp;
using cuda::launch;
using cuda::load;
using cuda::store;
using cuda::warp_sum;

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;

// max() would lose a NaN; the comparison keeps it.
__device__ inline float softplus(float z) {
  return (z < 0.0f ? 0.0f : z) + log1pf(expf(-fabsf(z)));
}

__device__ inline float sigmoid(float z) { return 1.0f / (1.0f + expf(-z)); }

template <typename T, int N>
__global__ void __launch_bounds__(kThreads) forward_kernel(RtdHeadParams p) {
  __shared__ int shared[kWarps];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t begin = p.rows * blockIdx.x / gridDim.x;
  const int64_t end = p.rows * (blockIdx.x + 1) / gridDim.x;
  int hits = 0;
  for (int64_t row = begin + warp; row < end; row += kWarps) {
    const T* hidden = static_cast<const T*>(p.hidden) + row * p.cols;
    float dot = 0.0f;
#pragma unroll 4
    for (int64_t col = lane * N; col < p.cols; col += kWarp * N) {
      float x[N], weight[N];
      load<N>(hidden + col, x);
      load<N>(p.weight + col, weight);
#pragma unroll
      for (int i = 0; i < N; ++i) dot = fmaf(x[i], weight[i], dot);
    }
    const float logit = warp_sum(dot) + *p.bias;
    if (lane == 0) {
      const bool counted = p.label[row] <= 1, replaced = p.label[row] == 1;
      p.logit[row] = logit;
      p.loss[row] = counted ? softplus(replaced ? -logit : logit) : 0.0f;
      hits += counted && (logit > 0.0f) == replaced;
    }
  }
  if (lane == 0) shared[warp] = hits;
  __syncthreads();
  if (threadIdx.x == 0) {
    int64_t sum = 0;
    for (int w = 0; w < kWarps; ++w) sum += shared[w];
    p.partials[blockIdx.x] = sum;
  }
}

// One block.
__global__ void __launch_bounds__(kThreads)
    sum_hits_kernel(const int64_t* partials, int64_t* hits, int64_t blocks) {
  __shared__ int64_t shared[kWarps];
  int64_t sum = 0;
  for (int64_t block = threadIdx.x; block < blocks; block += kThreads) sum += partials[block];
  sum = warp_sum(sum);
  if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int w = 1; w < kWarps; ++w) sum += shared[w];
  *hits = sum;
}

// blockIdx.x: strip of columns; blockIdx.y: block of rows.
template <typename T, int N>
__global__ void __launch_bounds__(kThreads) backward_kernel(RtdHeadBackwardParams p) {
  __shared__ float shared[kWarps][kWarp * N];
  __shared__ float shared_bias[kWarps];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t col = (static_cast<int64_t>(blockIdx.x) * kWarp + lane) * N;
  const int64_t begin = p.rows * blockIdx.y / gridDim.y;
  const int64_t end = p.rows * (blockIdx.y + 1) / gridDim.y;
  float weight[N] = {}, sums[N] = {}, bias_sum = 0.0f;
  if (col < p.cols) load<N>(p.weight + col, weight);
#pragma unroll 4
  for (int64_t row = begin + warp; row < end; row += kWarps) {
    const float sign = p.label[row] == 1 ? -1.0f : 1.0f;
    const float slope = sign * sigmoid(sign * p.logit[row]) * p.grad_loss[row];
    const float grad = p.label[row] <= 1 ? slope : 0.0f;
    bias_sum += grad;
    if (col >= p.cols) continue;
    float x[N];
    load<N>(static_cast<const T*>(p.hidden) + row * p.cols + col, x);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      sums[i] = fmaf(grad, x[i], sums[i]);
      x[i] = grad * weight[i];
    }
    store<N>(static_cast<T*>(p.grad_hidden) + row * p.cols + col, x);
  }
  if (lane == 0) shared_bias[warp] = bias_sum;
  float* partials = p.partials + blockIdx.y * (p.cols + 1);
  cuda::write_column_sums<kWarps, N>(sums, shared, partials,
                                     static_cast<int64_t>(blockIdx.x) * kWarp * N, p.cols);
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    float sum = 0.0f;
    for (int w = 0; w < kWarps; ++w) sum += shared_bias[w];
    partials[p.cols] = sum;
  }
}

__global__ void __launch_bounds__(kThreads)
    column_sum_kernel(RtdHeadBackwardParams p, int64_t blocks) {
  __shared__ float shared[kWarps][kWarp];
  const float sum = cuda::column_sum<kWarps>(p.partials, blocks, p.cols + 1, shared);
  const int64_t col = static_cast<int64_t>(blockIdx.x) * kWarp + threadIdx.x;
  if (threadIdx.x >= kWarp || col > p.cols) return;
  *(col == p.cols ? p.grad_bias : p.grad_weight + col) = sum;
}

template <typename T, int N>
cudaError_t forward(const RtdHeadParams& p, void* stream) {
  const int64_t blocks = rtd_head_row_blocks(p.rows, true);
  const dim3 grid(static_cast<unsigned>(blocks));
  const cudaError_t error = launch(forward_kernel<T, N>, grid, dim3(kThreads), 0, stream, p);
  if (error != cudaSuccess) return error;
  return launch(sum_hits_kernel, dim3(1), dim3(kThreads), 0, stream,
                static_cast<const int64_t*>(p.partials), p.hits, blocks);
}

template <typename T, int N>
cudaError_t backward(const RtdHeadBackwardParams& p, void* stream) {
  const int64_t blocks = rtd_head_row_blocks(p.rows, true);
  const int64_t strips = p.cols > 0 ? ceil_div(p.cols, kWarp * N) : 1;  // the bias needs one
  const dim3 grid(static_cast<unsigned>(strips), static_cast<unsigned>(blocks));
  const cudaError_t error = launch(backward_kernel<T, N>, grid, dim3(kThreads), 0, stream, p);
  if (error != cudaSuccess) return error;
  const dim3 columns(static_cast<unsigned>(ceil_div(p.cols + 1, kWarp)));
  return launch(column_sum_kernel, columns, dim3(kThreads), 0, stream, p, blocks);
}

template <typename T>
cudaError_t any_width(const RtdHeadParams& p, void* stream) {
  constexpr int kWidth = 16 / sizeof(T);
  const bool wide = cuda::vector_width<T>(p.cols, p.hidden, p.weight) == kWidth;
  return wide ? forward<T, kWidth>(p, stream) : forward<T, 1>(p, stream);
}

template <typename T>
cudaError_t any_width(const RtdHeadBackwardParams& p, void* stream) {
  constexpr int kWidth = 16 / sizeof(T);
  const bool wide = cuda::vector_width<T>(p.cols, p.hidden, p.weight, p.grad_hidden) == kWidth;
  return wide ? backward<T, kWidth>(p, stream) : backward<T, 1>(p, stream);
}

template <typename Params>
cudaError_t any_type(const Params& p, void* stream) {
  return cuda::by_dtype(p.dtype, [&](auto type) { return any_width<decltype(type)>(p, stream); });
}

}  // namespace

int rtd_head_cuda(const RtdHeadParams& p, void* stream) { return any_type(p, stream); }
int rtd_head_backward_cuda(const RtdHeadBackwardParams& p, void* stream) {
  return any_type(p, stream);
}

}  // namespace metro
