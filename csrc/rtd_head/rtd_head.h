// Replaced token detection: logit = hidden·weight + bias, and its binary cross-entropy.
//
// hidden, grad_hidden: [rows, cols] in T (float32, bf16; float16 on CUDA), contiguous. weight,
// grad_weight: [cols] float32; bias, grad_bias: [1] float32. label: [rows] uint8: 0 original,
// 1 replaced, anything else ignored (the glue lets only 255 through).
//
//   z = label ? -logit : logit
//   loss = ln(1 + e^z) = max(z, 0) + ln(1 + e^-|z|)      (0 where ignored)
//   grad_logit = (label ? -1 : 1)·σ(z)·grad_loss         (= (σ(logit) - label)·grad_loss)
//   grad_hidden = grad_logit·weight,  grad_weight = Σ grad_logit·hidden,  grad_bias = Σ grad_logit
//
// Written in z, loss and gradient keep their relative precision in both tails. `hits` counts the
// rows whose logit lies on the right side of zero (a logit of 0 says original).
// Bytes: forward reads hidden once; backward reads hidden and writes grad_hidden. Sums run over
// blocks of rows whose number depends on the shape alone: the same bits for any number of threads.
#pragma once

#include <cstdint>

#include "common/cpu_isa.h"
#include "common/types.h"

namespace metro {

struct RtdHeadParams {
  const void* hidden;
  const float* weight;
  const float* bias;
  const uint8_t* label;
  float* loss;
  float* logit;
  int64_t* hits;
  int64_t* partials;  // [rtd_head_row_blocks(rows, cuda)] scratch
  int64_t rows;
  int64_t cols;
  DType dtype;
};

struct RtdHeadBackwardParams {
  const float* grad_loss;
  const float* logit;
  const void* hidden;
  const float* weight;
  const uint8_t* label;
  void* grad_hidden;
  float* grad_weight;
  float* grad_bias;
  float* partials;  // [rtd_head_row_blocks(rows, cuda), cols + 1] scratch: weight, bias
  int64_t rows;
  int64_t cols;
  DType dtype;
};

// Enough blocks to occupy any CPU, or eight for each multiprocessor of an H200 (the same on every
// GPU, so that all give the same bits), at least 32 rows each.
inline int64_t rtd_head_row_blocks(int64_t rows, bool cuda) {
  if (!cuda) return rows < 64 ? (rows + 7) / 8 : 64;
  constexpr int64_t kCudaBlocks = 1056;
  return rows < 32 * kCudaBlocks ? (rows + 31) / 32 : kCudaBlocks;
}

METRO_CPU_KERNEL(rtd_head, RtdHeadParams)
METRO_CPU_KERNEL(rtd_head_backward, RtdHeadBackwardParams)

// `stream` is a cudaStream_t; the result is a cudaError_t. rows = 0 is allowed.
int rtd_head_cuda(const RtdHeadParams& p, void* stream);
int rtd_head_backward_cuda(const RtdHeadBackwardParams& p, void* stream);

}  // namespace metro
