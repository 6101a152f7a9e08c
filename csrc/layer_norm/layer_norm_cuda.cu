// Floor at R rows of H elements of s bytes: 4·R·H·s (x, residual in; sum, out out).
//
// A warp holds a row in registers, K vectors of N elements a lane.
//
// Rows that do not fit (or are not a multiple of 16 bytes) go through loops over a block's threads
// that read the row again from the cache.
#include "common/cuda_dtype.cuh"
#include "common/cuda_vector.cuh"
#include "layer_norm/layer_norm_cuda.cuh"

namespace metro {
namespace {

using cuda::ceil_div;
using cuda::from_float;
using cuda::kWarp;
using cuda::launch;
using cuda::load;
using cuda::store;
using cuda::to_float;
using cuda::warp_sum;
using norm::block_sum;
using norm::drop;
using norm::kThreads;
using norm::kWarps;

// z of N elements as it is stored, in float32 again.
template <int N, typename T>
__device__ inline void sum_vector(const LayerNormParams& p, uint64_t seed, int64_t at, int64_t col,
                                  float (&z)[N]) {
  load<N>(static_cast<const T*>(p.x) + at, z);
  float other[N];
  if (p.bias != nullptr) {
    load<N>(p.bias + col, other);
#pragma unroll
    for (int i = 0; i < N; ++i) z[i] += other[i];
  }
  if (p.seed != nullptr) {
    drop<N>(z, seed, at, p.dropout, counter_word(Purpose::kHiddenDropout, p.draw));
  }
  if (p.residual != nullptr) {
    load<N>(static_cast<const T*>(p.residual) + at, other);
#pragma unroll
    for (int i = 0; i < N; ++i) z[i] += other[i];
  }
  store<N>(static_cast<T*>(p.sum) + at, z);
#pragma unroll
  for (int i = 0; i < N; ++i) z[i] = to_float(from_float<T>(z[i]));
}

struct Statistics {
  float mean;
  float rstd;
};

// From the sums of the centred values and of their squares: the first corrects the rounded mean.
__device__ inline Statistics statistics(float rough, float errors, float squares, float cols,
                                        float eps) {
  const float error = errors / cols;
  const float variance = squares / cols - error * error;
  return {rough + error, 1.0f / sqrtf((variance < 0.0f ? 0.0f : variance) + eps)};
}

template <typename T, int N, int K>
__global__ void __launch_bounds__(kThreads) forward_kernel(LayerNormParams p) {
  const int lane = threadIdx.x % kWarp;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (row >= p.rows) return;
  const uint64_t seed = p.seed == nullptr ? 0 : static_cast<uint64_t>(*p.seed);
  const float cols = static_cast<float>(p.cols);
  float z[K][N];
  float total = 0.0f;
#pragma unroll
  for (int k = 0; k < K; ++k) {
    const int64_t col = (k * kWarp + lane) * N;
    if (col >= p.cols) continue;
    sum_vector<N, T>(p, seed, row * p.cols + col, col, z[k]);
#pragma unroll
    for (int i = 0; i < N; ++i) total += z[k][i];
  }
  const float rough = warp_sum(total) / cols;
  float errors = 0.0f, squares = 0.0f;
#pragma unroll
  for (int k = 0; k < K; ++k) {
    if ((k * kWarp + lane) * N >= p.cols) continue;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float centred = z[k][i] - rough;
      errors += centred;
      squares = fmaf(centred, centred, squares);
    }
  }
  const Statistics s = statistics(rough, warp_sum(errors), warp_sum(squares), cols, p.eps);
#pragma unroll
  for (int k = 0; k < K; ++k) {
    const int64_t col = (k * kWarp + lane) * N;
    if (col >= p.cols) continue;
    float weight[N], shift[N];
    load<N>(p.weight + col, weight);
    load<N>(p.shift + col, shift);
#pragma unroll
    for (int i = 0; i < N; ++i) z[k][i] = fmaf((z[k][i] - s.mean) * s.rstd, weight[i], shift[i]);
    store<N>(static_cast<T*>(p.out) + row * p.cols + col, z[k]);
  }
  if (lane == 0) {
    p.mean[row] = s.mean;
    p.rstd[row] = s.rstd;
  }
}

// A block a row; each thread reads again only what it wrote itself.
template <typename T>
__global__ void __launch_bounds__(kThreads) forward_loop_kernel(LayerNormParams p) {
  __shared__ float shared[kWarps];
  const int64_t row = blockIdx.x;
  const uint64_t seed = p.seed == nullptr ? 0 : static_cast<uint64_t>(*p.seed);
  const float cols = static_cast<float>(p.cols);
  const T* sum = static_cast<const T*>(p.sum) + row * p.cols;
  T* out = static_cast<T*>(p.out) + row * p.cols;
  float total = 0.0f;
  for (int64_t col = threadIdx.x; col < p.cols; col += kThreads) {
    float z[1];
    sum_vector<1, T>(p, seed, row * p.cols + col, col, z);
    total += z[0];
  }
  const float rough = block_sum(total, shared) / cols;
  float errors = 0.0f, squares = 0.0f;
  for (int64_t col = threadIdx.x; col < p.cols; col += kThreads) {
    const float centred = to_float(sum[col]) - rough;
    errors += centred;
    squares = fmaf(centred, centred, squares);
  }
  errors = block_sum(errors, shared);
  squares = block_sum(squares, shared);
  const Statistics s = statistics(rough, errors, squares, cols, p.eps);
  for (int64_t col = threadIdx.x; col < p.cols; col += kThreads) {
    const float x_hat = (to_float(sum[col]) - s.mean) * s.rstd;
    out[col] = from_float<T>(fmaf(x_hat, p.weight[col], p.shift[col]));
  }
  if (threadIdx.x == 0) {
    p.mean[row] = s.mean;
    p.rstd[row] = s.rstd;
  }
}

template <typename T>
cudaError_t forward(const LayerNormParams& p, void* stream) {
  constexpr int N = 16 / sizeof(T);
  const bool wide =
      cuda::vector_width<T>(p.cols, p.x, p.bias, p.residual, p.weight, p.shift, p.out, p.sum) == N;
  const int64_t vectors = wide ? ceil_div(p.cols, kWarp * N) : INT64_MAX;
  const dim3 rows(static_cast<unsigned>(ceil_div(p.rows, kWarps))), block(kThreads);
  if (vectors <= 1) return launch(forward_kernel<T, N, 1>, rows, block, 0, stream, p);
  if (vectors <= 2) return launch(forward_kernel<T, N, 2>, rows, block, 0, stream, p);
  if (vectors <= 3) return launch(forward_kernel<T, N, 3>, rows, block, 0, stream, p);
  if (vectors <= 4) return launch(forward_kernel<T, N, 4>, rows, block, 0, stream, p);
  if (vectors <= 8) return launch(forward_kernel<T, N, 8>, rows, block, 0, stream, p);
  const dim3 all(static_cast<unsigned>(p.rows));
  return launch(forward_loop_kernel<T>, all, block, 0, stream, p);
}

}  // namespace

int layer_norm_cuda(const LayerNormParams& p, void* stream) {
  return cuda::by_dtype(p.dtype, [&](auto type) { return forward<decltype(type)>(p, stream); });
}

}  // namespace metro
