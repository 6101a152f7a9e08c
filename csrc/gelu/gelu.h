// GELU(x + bias), exact: y = z·Φ(z), z = x + bias, dy/dz = Φ(z) + z·φ(z).
//
// x, out, grad_out, grad_x: [rows, cols] in T (float32, bf16; float16 on CUDA), contiguous.
// bias, grad_bias: [cols] float32.
// Bytes: forward reads x once and writes out once; backward reads grad_out and x, writes grad_x,
// and recomputes z. The bias gradient is the column sum of grad_x before rounding, from float32
// partial sums over blocks of rows whose number depends on the shape alone: the same bits for any
// number of threads.
#pragma once

#include <cstdint>

#include "common/cpu_isa.h"
#include "common/types.h"

namespace metro {

struct BiasGeluParams {
  const void* x;
  const float* bias;
  void* out;
  int64_t rows;
  int64_t cols;
  DType dtype;
};

struct BiasGeluBackwardParams {
  const void* grad_out;
  const void* x;
  const float* bias;
  void* grad_x;
  float* grad_bias;
  float* partials;  // [bias_gelu_row_blocks(rows), cols] scratch
  int64_t rows;
  int64_t cols;
  DType dtype;
};

// Enough blocks to occupy any CPU or GPU, few enough that the partial sums cost no bandwidth.
inline int64_t bias_gelu_row_blocks(int64_t rows) { return rows < 64 ? (rows + 7) / 8 : 64; }

METRO_CPU_KERNEL(bias_gelu, BiasGeluParams)
METRO_CPU_KERNEL(bias_gelu_backward, BiasGeluBackwardParams)

// `stream` is a cudaStream_t; the result is a cudaError_t. rows = 0 is allowed.
int bias_gelu_cuda(const BiasGeluParams& p, void* stream);
int bias_gelu_backward_cuda(const BiasGeluBackwardParams& p, void* stream);

}  // namespace metro
