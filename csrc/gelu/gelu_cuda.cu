// Forward: one thread per 16 bytes of x. Backward: a block owns a strip of columns and a block of
// rows; its eight warps walk the rows, keep the columns' sums in registers, add them up in shared
// memory in a fixed order and write one row of partial sums; a second kernel adds those.
#include "common/cuda_columns.cuh"
#include "common/cuda_dtype.cuh"
#include "common/cuda_launch.cuh"
#include "common/cuda_vector.cuh"
#include "gelu/gelu.h"

namespace metro {
namespace {

using cuda::ceil_div;
using cuda::kWarp;
using cuda::launch;
using cuda::load;
using cuda::store;

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;

struct Gaussian {
  float cdf;
  float pdf;
};

// The polynomial of common/gaussian.h.
__device__ inline Gaussian gaussian(float x) {
  const float a = fabsf(x);
  const float e = expf(-0.5f * a * a);
  const float t = 1.0f / fmaf(0.35f, a, 1.0f);
  float poly = -0.029094132f;
  poly = fmaf(poly, t, 0.14371519f);
  poly = fmaf(poly, t, -0.2551739f);
  poly = fmaf(poly, t, 0.1585435f);
  poly = fmaf(poly, t, -0.02266518f);
  poly = fmaf(poly, t, 0.10531471f);
  poly = fmaf(poly, t, 0.119883284f);
  poly = fmaf(poly, t, 0.13985468f);
  poly = fmaf(poly, t, 0.13962184f);
  const float tail = poly * t * e;
  return {x < 0.0f ? tail : 1.0f - tail, 0.398942280f * e};
}

template <typename T, int N>
__global__ void __launch_bounds__(kThreads)
    forward_kernel(const T* x, const float* bias, T* out, int64_t elements, int64_t cols) {
  const int64_t at = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * N;
  if (at >= elements) return;
  float z[N], b[N];
  load<N>(x + at, z);
  load<N>(bias + at % cols, b);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    z[i] += b[i];
    z[i] *= gaussian(z[i]).cdf;
  }
  store<N>(out + at, z);
}

template <typename T, int N>
__global__ void __launch_bounds__(kThreads)
    backward_kernel(const T* grad_out, const T* x, const float* bias, T* grad_x, float* partials,
                    int64_t rows, int64_t cols) {
  __shared__ float shared[kWarps][kWarp * N];
  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;
  const int64_t col = (static_cast<int64_t>(blockIdx.x) * kWarp + lane) * N;
  const int64_t begin = rows * blockIdx.y / gridDim.y;
  const int64_t end = rows * (blockIdx.y + 1) / gridDim.y;
  float sums[N] = {};
  if (col < cols) {
    float b[N];
    load<N>(bias + col, b);
    for (int64_t row = begin + warp; row < end; row += kWarps) {
      float grad[N], z[N];
      load<N>(grad_out + row * cols + col, grad);
      load<N>(x + row * cols + col, z);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        z[i] += b[i];
        const Gaussian g = gaussian(z[i]);
        grad[i] *= fmaf(z[i], g.pdf, g.cdf);
        sums[i] += grad[i];
      }
      store<N>(grad_x + row * cols + col, grad);
    }
  }
  cuda::write_column_sums<kWarps, N>(sums, shared, partials + blockIdx.y * cols,
                                     static_cast<int64_t>(blockIdx.x) * kWarp * N, cols);
}

template <typename T, int N>
cudaError_t forward(const BiasGeluParams& p, void* stream) {
  const int64_t elements = p.rows * p.cols;
  const dim3 grid(static_cast<unsigned>(ceil_div(elements, static_cast<int64_t>(kThreads) * N)));
  return launch(forward_kernel<T, N>, grid, dim3(kThreads), 0, stream, static_cast<const T*>(p.x),
                p.bias, static_cast<T*>(p.out), elements, p.cols);
}

template <typename T>
cudaError_t forward_any_width(const BiasGeluParams& p, void* stream) {
  constexpr int kWidth = 16 / sizeof(T);
  const bool wide = cuda::vector_width<T>(p.cols, p.x, p.bias, p.out) == kWidth;
  return wide ? forward<T, kWidth>(p, stream) : forward<T, 1>(p, stream);
}

template <typename T, int N>
cudaError_t backward(const BiasGeluBackwardParams& p, void* stream) {
  const int64_t blocks = bias_gelu_row_blocks(p.rows);
  const dim3 grid(static_cast<unsigned>(ceil_div(p.cols, kWarp * N)),
                  static_cast<unsigned>(blocks));
  const cudaError_t error = launch(backward_kernel<T, N>, grid, dim3(kThreads), 0, stream,
                                   static_cast<const T*>(p.grad_out), static_cast<const T*>(p.x),
                                   p.bias, static_cast<T*>(p.grad_x), p.partials, p.rows, p.cols);
  if (error != cudaSuccess) return error;
  return cuda::launch_column_sum(p.partials, p.grad_bias, blocks, p.cols, false, stream);
}

template <typename T>
cudaError_t backward_any_width(const BiasGeluBackwardParams& p, void* stream) {
  constexpr int kWidth = 16 / sizeof(T);
  const bool wide = cuda::vector_width<T>(p.cols, p.grad_out, p.x, p.bias, p.grad_x) == kWidth;
  return wide ? backward<T, kWidth>(p, stream) : backward<T, 1>(p, stream);
}

}  // namespace

int bias_gelu_cuda(const BiasGeluParams& p, void* stream) {
  return cuda::by_dtype(p.dtype,
                        [&](auto type) { return forward_any_width<decltype(type)>(p, stream); });
}

int bias_gelu_backward_cuda(const BiasGeluBackwardParams& p, void* stream) {
  return cuda::by_dtype(p.dtype,
                        [&](auto type) { return backward_any_width<decltype(type)>(p, stream); });
}

}  // namespace metro
