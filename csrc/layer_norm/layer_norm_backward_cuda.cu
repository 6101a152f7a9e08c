// Floor at R rows of H elements of s bytes: 3·R·H·s, or 4·R·H·s with dropout. The partial sums, at
// most 396 · 3 · H floats, are written and read again within L2: 2.4 % of that each way at 32768
// rows in bf16.
//
// A lane holds one vector of N columns of a row, as many warps as that takes share the
// row, and a block of up to eight warps takes as many rows at a time as fit. Weights and column
// sums then cost 4 N registers instead of 4 K N: three blocks of 256 threads fit on a
// multiprocessor, where a warp with a row of 1024 columns of its own would take 230 registers a
// thread, and one block of eight warps would fill it: too few to work while others wait for memory.
// The price is a barrier for each round of rows, for the two sums over a row; the loads of the next
// round are under way before it. The block adds up its rows' column sums in a fixed order and
// writes one row of partial sums; a second kernel adds those.
//
// Rows that do not fit (or are not a multiple of 16 bytes) go through loops over a block's threads
// that read the row again from the cache.
#include "common/cuda_columns.cuh"
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

constexpr int kBackwardBlocks = 3;  // on a multiprocessor, by registers

// A lane's share of a row.
template <typename T, int N>
struct Fetched {
  cuda::Pack<T, N> sum, grad_out;
  float mean, rstd;
};

template <typename T, int N>
__device__ inline Fetched<T, N> fetch(const LayerNormBackwardParams& p, int64_t row, int64_t col) {
  const int64_t at = row * p.cols + col;
  return {*reinterpret_cast<const cuda::Pack<T, N>*>(static_cast<const T*>(p.sum) + at),
          *reinterpret_cast<const cuda::Pack<T, N>*>(static_cast<const T*>(p.grad_out) + at),
          p.mean[row], p.rstd[row]};
}

// The block's column sums, its rows in their order, to `shared` [3, cols] and from there to
// partials. `own_row` of `rows` is this warp's, `col` this lane's first column.
template <int N>
__device__ inline void write_partials(const LayerNormBackwardParams& p, const float (&sums)[3][N],
                                      int own_row, int rows, int64_t col, float* shared) {
  for (int row = 0; row < rows; ++row) {
    if (row == own_row && col < p.cols) {
#pragma unroll
      for (int which = 0; which < 3; ++which) {
#pragma unroll
        for (int i = 0; i < N; ++i) {
          float* to = shared + which * p.cols + col + i;
          *to = row == 0 ? sums[which][i] : *to + sums[which][i];
        }
      }
    }
    __syncthreads();
  }
  for (int64_t i = threadIdx.x; i < 3 * p.cols; i += blockDim.x) {
    p.partials[blockIdx.x * 3 * p.cols + i] = shared[i];
  }
}

// blockDim.x is a multiple of the warps that share a row.
template <typename T, int N>
__global__ void __launch_bounds__(kThreads, kBackwardBlocks)
    backward_kernel(LayerNormBackwardParams p) {
  __shared__ float totals[2][2][kWarps];  // of two rounds, so that one barrier a round is enough
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int row_warps = static_cast<int>((p.cols + kWarp * N - 1) / (kWarp * N));
  const int rows = blockDim.x / kWarp / row_warps, own_row = warp / row_warps;
  const int64_t col = (warp % row_warps * kWarp + lane) * N;
  const bool inside = col < p.cols;
  const int64_t begin = p.rows * blockIdx.x / gridDim.x;
  const int64_t end = p.rows * (blockIdx.x + 1) / gridDim.x;
  const uint64_t seed = p.seed == nullptr ? 0 : static_cast<uint64_t>(*p.seed);
  const uint32_t purpose = counter_word(Purpose::kHiddenDropout, p.draw);
  const float inverse_cols = 1.0f / static_cast<float>(p.cols);
  float weight[N] = {}, sums[3][N] = {};
  Fetched<T, N> next = {};
  if (inside) {
    load<N>(p.weight + col, weight);
    if (begin + own_row < end) next = fetch<T, N>(p, begin + own_row, col);
  }
  int buffer = 0;
  for (int64_t first = begin; first < end; first += rows, buffer ^= 1) {
    const int64_t row = first + own_row;
    const bool valid = inside && row < end;
    const Fetched<T, N> now = next;
    if (inside && row + rows < end) next = fetch<T, N>(p, row + rows, col);
    float g_total = 0.0f, gx_total = 0.0f;
    if (valid) {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const float x_hat = (to_float(now.sum.items[i]) - now.mean) * now.rstd;
        const float grad = to_float(now.grad_out.items[i]), g = grad * weight[i];
        sums[0][i] = fmaf(grad, x_hat, sums[0][i]);
        sums[1][i] += grad;
        g_total += g;
        gx_total = fmaf(g, x_hat, gx_total);
      }
    }
    g_total = warp_sum(g_total);
    gx_total = warp_sum(gx_total);
    if (lane == 0) {
      totals[buffer][0][warp] = g_total;
      totals[buffer][1][warp] = gx_total;
    }
    __syncthreads();
    float g_mean = 0.0f, gx_mean = 0.0f;
    for (int w = own_row * row_warps; w < (own_row + 1) * row_warps; ++w) {
      g_mean += totals[buffer][0][w];
      gx_mean += totals[buffer][1][w];
    }
    g_mean *= inverse_cols;
    gx_mean *= inverse_cols;
    if (!valid) continue;
    const int64_t at = row * p.cols + col;
    float g[N];
#pragma unroll
    for (int i = 0; i < N; ++i) {  // made again: in registers they would cost the third block
      const float x_hat = (to_float(now.sum.items[i]) - now.mean) * now.rstd;
      g[i] = to_float(now.grad_out.items[i]) * weight[i];
      g[i] = now.rstd * (fmaf(x_hat, -gx_mean, g[i]) - g_mean);
    }
    if (p.seed != nullptr) {
      store<N>(static_cast<T*>(p.grad_residual) + at, g);
      drop<N>(g, seed, at, p.dropout, purpose);
    }
    store<N>(static_cast<T*>(p.grad_x) + at, g);
#pragma unroll
    for (int i = 0; i < N; ++i) sums[2][i] += g[i];
  }
  write_partials<N>(p, sums, own_row, rows, col, cuda::dynamic_shared<float>());
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

__global__ void __launch_bounds__(kThreads)
    column_sum_kernel(LayerNormBackwardParams p, int64_t blocks) {
  __shared__ float shared[kWarps][kWarp];
  const float sum = cuda::column_sum<kWarps>(p.partials, blocks, 3 * p.cols, shared);
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kWarp + threadIdx.x;
  if (threadIdx.x >= kWarp || i >= 3 * p.cols) return;
  float* to = i < p.cols ? p.grad_weight : i < 2 * p.cols ? p.grad_shift : p.grad_bias;
  to[i % p.cols] = sum;
}

template <typename T>
cudaError_t backward(const LayerNormBackwardParams& p, void* stream) {
  constexpr int N = 16 / sizeof(T);
  const bool wide =
      cuda::vector_width<T>(p.cols, p.grad_out, p.sum, p.weight, p.grad_x, p.grad_residual) == N;
  const int64_t blocks = layer_norm_row_blocks(p.rows, true);
  const dim3 grid(static_cast<unsigned>(blocks));
  const int64_t row_warps = ceil_div(p.cols, kWarp * N);
  cudaError_t error;
  if (wide && row_warps <= kWarps && row_warps > 0) {
    const dim3 block(static_cast<unsigned>(kWarps / row_warps * row_warps * kWarp));
    const size_t shared = static_cast<size_t>(3 * p.cols) * sizeof(float);
    error = launch(backward_kernel<T, N>, grid, block, shared, stream, p);
  } else {
    error = launch(backward_loop_kernel<T>, grid, dim3(kThreads), 0, stream, p);
  }
  if (error != cudaSuccess) return error;
  const dim3 columns(static_cast<unsigned>(ceil_div(3 * p.cols, kWarp)));
  return launch(column_sum_kernel, columns, dim3(kThreads), 0, stream, p, blocks);
}

}  // namespace

int layer_norm_backward_cuda(const LayerNormBackwardParams& p, void* stream) {
  return cuda::by_dtype(p.dtype, [&](auto type) { return backward<decltype(type)>(p, stream); });
}

}  // namespace metro
