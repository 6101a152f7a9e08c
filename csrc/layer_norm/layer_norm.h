// y = LayerNorm(z)·weight + shift with z = residual + dropout(x + bias).
//
// x, residual, out, sum (z) and their gradients: [rows, cols] in T (float32, bf16; float16 on
// CUDA), contiguous. bias, weight, shift and their gradients: [cols] float32; mean, rstd: [rows]
// float32. bias and residual may be null.
// Statistics are those of z as stored, in float32: the mean, then the mean of centred squares,
// corrected for the rounding of the mean (Chan, Golub & LeVeque 1983); so out is exactly the norm
// of the sum that backward reads. Dropout: element i = row·cols + col takes the (i mod 8)-th 16-bit
// number of the Philox call {i / 8, Purpose::kHiddenDropout + draw}; backward draws the same
// numbers again.
//
//   x̂ = (z - mean)·rstd,  g = grad_out·weight
//   grad_residual = grad_z = rstd·(g - mean(g) - x̂·mean(g·x̂)),  grad_x = dropout(grad_z)
//   grad_weight = Σ grad_out·x̂,  grad_shift = Σ grad_out,  grad_bias = Σ grad_x (unrounded), by
//   rows
//
// Bytes: forward reads x and residual and writes sum and out once; backward reads grad_out and sum
// and writes grad_x and, with dropout, grad_residual. The column sums are taken from float32
// partial sums over blocks of rows whose number depends on the shape alone: the same bits for any
// number of threads.
#pragma once

#include <cstdint>

#include "common/cpu_isa.h"
#include "common/philox.h"
#include "common/types.h"

namespace metro {

struct LayerNormParams {
  const void* x;
  const float* bias;     // null: none
  const void* residual;  // null: none
  const float* weight;
  const float* shift;
  const int64_t* seed;  // on the device of the data; null: no dropout
  void* out;
  void* sum;
  float* mean;
  float* rstd;
  int64_t rows;
  int64_t cols;
  float eps;
  Dropout dropout;
  uint32_t draw;
  DType dtype;
};

struct LayerNormBackwardParams {
  const void* grad_out;
  const void* sum;
  const float* mean;
  const float* rstd;
  const float* weight;
  const int64_t* seed;  // null: no dropout
  void* grad_x;
  void* grad_residual;  // null without dropout: grad_x holds its values
  float* grad_bias;
  float* grad_weight;
  float* grad_shift;
  float* partials;  // [layer_norm_row_blocks(rows, cuda), 3, cols] scratch: weight, shift, bias
  int64_t rows;
  int64_t cols;
  Dropout dropout;
  uint32_t draw;
  DType dtype;
};

// Enough blocks to occupy any CPU, or three for each multiprocessor of an H200 (the same on every
// GPU, so that all give the same bits); few enough that the partial sums cost little bandwidth.
inline int64_t layer_norm_row_blocks(int64_t rows, bool cuda) {
  constexpr int64_t kCudaBlocks = 396;
  if (!cuda) return rows < 64 ? (rows + 7) / 8 : 64;
  return rows < 8 * kCudaBlocks ? (rows + 7) / 8 : kCudaBlocks;
}

METRO_CPU_KERNEL(layer_norm, LayerNormParams)
METRO_CPU_KERNEL(layer_norm_backward, LayerNormBackwardParams)

// `stream` is a cudaStream_t; the result is a cudaError_t. rows = 0 is allowed.
int layer_norm_cuda(const LayerNormParams& p, void* stream);
int layer_norm_backward_cuda(const LayerNormBackwardParams& p, void* stream);

}  // namespace metro
