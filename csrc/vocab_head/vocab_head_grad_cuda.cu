// The logits' gradient in place, and its column sums: a block owns a strip of columns and a block
// of rows, as in gelu_cuda.cu. It reads and writes the logits once; see vocab_head_rows_cuda.cu.
#include "common/cuda_columns.cuh"
#include "common/cuda_launch.cuh"
#include "vocab_head/vocab_head_cuda.cuh"

namespace metro {
namespace {

using cuda::kWarp;
using vocab::kItems;
using vocab::load_logits;

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;

template <typename T, bool kWide>
__global__ void __launch_bounds__(kThreads) grad_kernel(VocabHeadGradParams p) {
  __shared__ float shared[kWarps][kSampleTile];
  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kSampleTile;
  const int64_t column = first + lane * kItems;
  const int64_t left = p.vocab - column;
  const int64_t begin = p.rows * blockIdx.y / gridDim.y;
  const int64_t end = p.rows * (blockIdx.y + 1) / gridDim.y;
  const float weight = *p.scale;
  float sums[kItems] = {};
  for (int64_t row = begin + warp; row < end && left > 0; row += kWarps) {
    T* logits = static_cast<T*>(p.logits) + row * p.vocab + column;
    const int64_t target = p.target[row];
    const float scale = target == kIgnoredTarget ? 0.0f : weight;
    float grad[kItems] = {};
    if (scale != 0.0f) {
      load_logits<T, kWide>(logits, p.bias + column, left, grad);
      const float lse = p.lse[row];
      const int64_t at = target - column;
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        grad[i] = scale * (__expf(grad[i] - lse) - (at == i ? 1.0f : 0.0f));
        sums[i] += grad[i];
      }
    }
    if (kWide) {
      cuda::store<kItems>(logits, grad);
    } else {
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        if (i < left) logits[i] = cuda::from_float<T>(grad[i]);
      }
    }
  }
  cuda::write_column_sums<kWarps, kItems>(sums, shared, p.partials + blockIdx.y * p.vocab, first,
                                          p.vocab);
}

template <typename T>
cudaError_t run(const VocabHeadGradParams& p, void* stream) {
  const bool wide = vocab::loads_wide<T>(p.vocab, p.logits, p.bias);
  const unsigned strips = static_cast<unsigned>(cuda::ceil_div(p.vocab, kSampleTile));
  const int64_t blocks = vocab_head_row_blocks(p.rows);
  const cudaError_t error =
      cuda::launch(wide ? grad_kernel<T, true> : grad_kernel<T, false>,
                   dim3(strips, static_cast<unsigned>(blocks)), dim3(kThreads), 0, stream, p);
  if (error != cudaSuccess) return error;
  return cuda::launch_column_sum(p.partials, p.grad_bias, blocks, p.vocab, p.accumulate, stream);
}

}  // namespace

int vocab_head_grad_cuda(const VocabHeadGradParams& p, void* stream) {
  return cuda::by_dtype(p.dtype, [&](auto type) { return run<decltype(type)>(p, stream); });
}

}  // namespace metro
