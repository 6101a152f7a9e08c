// Floor at R rows of H elements of s bytes: forward 4·R·H·s (x, residual in; sum, out out),
// backward 3·R·H·s, or 4·R·H·s with dropout; everything else is below a hundredth of that.
//
// A warp holds a row in registers: K vectors of N elements a lane. Backward: a block walks its
// share of the rows with the column sums in registers, adds up its warps' sums in a fixed order and
// writes one row of partial sums; a second kernel adds those. Rows that do not fit (or are not a
// multiple of 16 bytes) go through loops over a block's threads that read the row again from the
// cache.
#include "common/cuda_launch.cuh"
#include "common/cuda_vector.cuh"
#include "layer_norm/layer_norm.h"

namespace metro {
namespace {

using cuda::ceil_div;
using cuda::from_float;
using cuda::kWarp;
using cuda::launch;
using cuda::load;
using cuda::store;
using cuda::to_float;

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;

__device__ inline float warp_sum(float x) {
#pragma unroll
  for (int bit = kWarp / 2; bit > 0; bit /= 2) x += __shfl_xor_sync(0xffffffffu, x, bit);
  return x;
}

// The same sum in every thread; `shared` is free again when the next barrier is passed.
__device__ inline float block_sum(float x, float* shared) {
  x = warp_sum(x);
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

template <typename T, int N, int K>
__global__ void __launch_bounds__(kThreads, 1) backward_kernel(LayerNormBackwardParams p) {
  float* shared = cuda::dynamic_shared<float>();  // [3, cols]
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t begin = p.rows * blockIdx.x / gridDim.x;
  const int64_t end = p.rows * (blockIdx.x + 1) / gridDim.x;
  const uint64_t seed = p.seed == nullptr ? 0 : static_cast<uint64_t>(*p.seed);
  const uint32_t purpose = counter_word(Purpose::kHiddenDropout, p.draw);
  const float inverse_cols = 1.0f / static_cast<float>(p.cols);
  float sums[3][K][N] = {};
  for (int64_t row = begin + warp; row < end; row += kWarps) {
    const float mean = p.mean[row], rstd = p.rstd[row];
    float x_hat[K][N], g[K][N];
    float g_total = 0.0f, gx_total = 0.0f;
#pragma unroll
    for (int k = 0; k < K; ++k) {
      const int64_t col = (k * kWarp + lane) * N;
      if (col >= p.cols) continue;
      load<N>(static_cast<const T*>(p.sum) + row * p.cols + col, x_hat[k]);
      load<N>(static_cast<const T*>(p.grad_out) + row * p.cols + col, g[k]);
    }
#pragma unroll
    for (int k = 0; k < K; ++k) {
      const int64_t col = (k * kWarp + lane) * N;
      if (col >= p.cols) continue;
      float weight[N];
      load<N>(p.weight + col, weight);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        x_hat[k][i] = (x_hat[k][i] - mean) * rstd;
        sums[0][k][i] = fmaf(g[k][i], x_hat[k][i], sums[0][k][i]);
        sums[1][k][i] += g[k][i];
        g[k][i] *= weight[i];
        g_total += g[k][i];
        gx_total = fmaf(g[k][i], x_hat[k][i], gx_total);
      }
    }
    const float g_mean = warp_sum(g_total) * inverse_cols;
    const float gx_mean = warp_sum(gx_total) * inverse_cols;
#pragma unroll
    for (int k = 0; k < K; ++k) {
      const int64_t col = (k * kWarp + lane) * N, at = row * p.cols + col;
      if (col >= p.cols) continue;
#pragma unroll
      for (int i = 0; i < N; ++i) {
        g[k][i] = rstd * (fmaf(x_hat[k][i], -gx_mean, g[k][i]) - g_mean);
      }
      if (p.seed != nullptr) {
        store<N>(static_cast<T*>(p.grad_residual) + at, g[k]);
        drop<N>(g[k], seed, at, p.dropout, purpose);
      }
      store<N>(static_cast<T*>(p.grad_x) + at, g[k]);
#pragma unroll
      for (int i = 0; i < N; ++i) sums[2][k][i] += g[k][i];
    }
  }
  for (int w = 0; w < kWarps; ++w) {
    if (w == warp) {
#pragma unroll
      for (int k = 0; k < K; ++k) {
        const int64_t col = (k * kWarp + lane) * N;
        if (col >= p.cols) continue;
#pragma unroll
        for (int which = 0; which < 3; ++which) {
#pragma unroll
          for (int i = 0; i < N; ++i) {
            float* to = shared + which * p.cols + col + i;
            *to = w == 0 ? sums[which][k][i] : *to + sums[which][k][i];
          }
        }
      }
    }
    __syncthreads();
  }
  for (int64_t i = threadIdx.x; i < 3 * p.cols; i += kThreads) {
    p.partials[blockIdx.x * 3 * p.cols + i] = shared[i];
  }
}

// A block walks its rows; a thread owns the columns threadIdx.x + i·kThreads of the partial sums.
template <typename T>
__global__ void __launch_bounds__(kThreads) backward_loop_kernel(LayerNormBackwardParams p) {
  __shared__ float shared[kWarps];
  const int64_t begin = p.rows * blockIdx.x / gridDim.x;
  const int64_t end = p.rows * (blockIdx.x + 1) / gridDim.x;
  const uint64_t seed = p.seed == nullptr ? 0 : static_cast<uint64_t>(*p.seed);
  const uint32_t purpose = counter_word(Purpose::kHiddenDropout, p.draw);
  const float inverse_cols = 1.0f / static_cast<float>(p.cols);
  float* weight_sums = p.partials + blockIdx.x * 3 * p.cols;
  float* shift_sums = weight_sums + p.cols;
  float* bias_sums = shift_sums + p.cols;
  for (int64_t col = threadIdx.x; col < p.cols; col += kThreads) {
    weight_sums[col] = shift_sums[col] = bias_sums[col] = 0.0f;
  }
  for (int64_t row = begin; row < end; ++row) {
    const T* sum = static_cast<const T*>(p.sum) + row * p.cols;
    const T* grad_out = static_cast<const T*>(p.grad_out) + row * p.cols;
    const float mean = p.mean[row], rstd = p.rstd[row];
    float g_total = 0.0f, gx_total = 0.0f;
    for (int64_t col = threadIdx.x; col < p.cols; col += kThreads) {
      const float x_hat = (to_float(sum[col]) - mean) * rstd, grad = to_float(grad_out[col]);
      weight_sums[col] = fmaf(grad, x_hat, weight_sums[col]);
      shift_sums[col] += grad;
      g_total += grad * p.weight[col];
      gx_total = fmaf(grad * p.weight[col], x_hat, gx_total);
    }
    const float g_mean = block_sum(g_total, shared) * inverse_cols;
    const float gx_mean = block_sum(gx_total, shared) * inverse_cols;
    for (int64_t col = threadIdx.x; col < p.cols; col += kThreads) {
      const float x_hat = (to_float(sum[col]) - mean) * rstd;
      const float g = to_float(grad_out[col]) * p.weight[col];
      float grad[1] = {rstd * (fmaf(x_hat, -gx_mean, g) - g_mean)};
      const int64_t at = row * p.cols + col;
      if (p.seed != nullptr) {
        static_cast<T*>(p.grad_residual)[at] = from_float<T>(grad[0]);
        drop<1>(grad, seed, at, p.dropout, purpose);
      }
      static_cast<T*>(p.grad_x)[at] = from_float<T>(grad[0]);
      bias_sums[col] += grad[0];
    }
  }
}

// Adds up the blocks' partial sums in their order.
__global__ void __launch_bounds__(kThreads)
    column_sum_kernel(LayerNormBackwardParams p, int64_t blocks) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= 3 * p.cols) return;
  float sum = 0.0f;
  for (int64_t block = 0; block < blocks; ++block) sum += p.partials[block * 3 * p.cols + i];
  float* outputs[3] = {p.grad_weight, p.grad_shift, p.grad_bias};
  outputs[i / p.cols][i % p.cols] = sum;
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

template <typename T>
cudaError_t backward(const LayerNormBackwardParams& p, void* stream) {
  constexpr int N = 16 / sizeof(T);
  const bool wide =
      cuda::vector_width<T>(p.cols, p.grad_out, p.sum, p.weight, p.grad_x, p.grad_residual) == N;
  const int64_t vectors = wide ? ceil_div(p.cols, kWarp * N) : INT64_MAX;
  const int64_t blocks = layer_norm_row_blocks(p.rows, true);
  const dim3 grid(static_cast<unsigned>(blocks)), block(kThreads);
  const size_t shared = static_cast<size_t>(3 * p.cols) * sizeof(float);
  cudaError_t error;
  if (vectors <= 1) {
    error = launch(backward_kernel<T, N, 1>, grid, block, shared, stream, p);
  } else if (vectors <= 2) {
    error = launch(backward_kernel<T, N, 2>, grid, block, shared, stream, p);
  } else if (vectors <= 3) {
    error = launch(backward_kernel<T, N, 3>, grid, block, shared, stream, p);
  } else if (vectors <= 4) {
    error = launch(backward_kernel<T, N, 4>, grid, block, shared, stream, p);
  } else {
    error = launch(backward_loop_kernel<T>, grid, block, 0, stream, p);
  }
  if (error != cudaSuccess) return error;
  const dim3 columns(static_cast<unsigned>(ceil_div(3 * p.cols, kThreads)));
  return launch(column_sum_kernel, columns, block, 0, stream, p, blocks);
}

}  // namespace

int layer_norm_cuda(const LayerNormParams& p, void* stream) {
  switch (p.dtype) {
    case DType::kFloat32:
      return forward<float>(p, stream);
    case DType::kBFloat16:
      return forward<__nv_bfloat16>(p, stream);
    case DType::kFloat16:
      return forward<__half>(p, stream);
  }
  return cudaErrorInvalidValue;
}

int layer_norm_backward_cuda(const LayerNormBackwardParams& p, void* stream) {
  switch (p.dtype) {
    case DType::kFloat32:
      return backward<float>(p, stream);
    case DType::kBFloat16:
      return backward<__nv_bfloat16>(p, stream);
    case DType::kFloat16:
      return backward<__half>(p, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace metro
