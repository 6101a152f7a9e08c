// The objective: mlm_weight·Σ mlm_nll / d0 + rtd_weight·Σ rtd_loss / d1 + clm_weight·Σ clm_nll /
// d2, and its figures as sums and counts, so that micro-batches and ranks can be added up.
//
// Each sum runs over the rows that count: target != kIgnoredTarget, or label 0 or 1. d are the
// given denominators or this batch's own counts; a part whose denominator is 0 is 0. The gradient
// of a row that counts is grad_loss·weight / d, of any other 0. Sums are float64, over blocks of
// rows whose number depends on the shapes alone: the same bits for any number of threads. They
// leave as float32, in which counts are exact up to 2^24.
#pragma once

#include <cstdint>

#include "common/cpu_isa.h"

namespace metro {

constexpr int64_t kIgnoredTarget = -100;  // torch.nn.functional.cross_entropy's ignore_index

// The order of metro_ext.ops.loss.METRICS.
enum Metric {
  kMlmNllSum,
  kMlmHits,
  kMlmCount,
  kReplacedCount,  // label 1
  kRtdLossSum,
  kRtdHits,               // (logit > 0) == label
  kRtdCount,              // label 0 or 1
  kRtdPredictedReplaced,  // logit > 0
  kRtdTruePositive,       // logit > 0 and label 1
  kClmNllSum,
  kClmHits,
  kClmCount,
  kMetrics,
};

// An absent part has no rows.
struct TokenPart {
  const float* nll;       // [rows]
  const uint8_t* hit;     // [rows]
  const int64_t* target;  // [rows]
  int64_t rows;
};

struct RtdPart {
  const float* loss;     // [rows]
  const float* logit;    // [rows]
  const uint8_t* label;  // [rows]
  int64_t rows;
};

struct LossWeights {
  float mlm;
  float rtd;
  float clm;
};

struct PretrainLossParams {
  TokenPart mlm;
  RtdPart rtd;
  TokenPart clm;
  const float* denominators;  // [3] mlm, rtd, clm; null: this batch's counts
  LossWeights weights;
  float* loss;       // [1]
  float* metrics;    // [kMetrics]
  double* partials;  // [pretrain_loss_blocks(longest part), kMetrics] scratch, CPU only
};

struct PretrainLossBackwardParams {
  const float* grad_loss;     // [1]
  const float* metrics;       // [kMetrics]
  const int64_t* mlm_target;  // [mlm_rows]
  const uint8_t* label;       // [rtd_rows]
  const int64_t* clm_target;  // [clm_rows]
  const float* denominators;  // [3]; null: the counts among the metrics
  LossWeights weights;
  float* grad_mlm;  // [mlm_rows]
  float* grad_rtd;  // [rtd_rows]
  float* grad_clm;  // [clm_rows]
  int64_t mlm_rows;
  int64_t rtd_rows;
  int64_t clm_rows;
};

inline int64_t pretrain_loss_blocks(int64_t rows) {
  return rows < 64 * 1024 ? (rows + 1023) / 1024 : 64;
}

METRO_CPU_KERNEL(pretrain_loss, PretrainLossParams)
METRO_CPU_KERNEL(pretrain_loss_backward, PretrainLossBackwardParams)

// `stream` is a cudaStream_t; the result is a cudaError_t. No rows are allowed.
int pretrain_loss_cuda(const PretrainLossParams& p, void* stream);
int pretrain_loss_backward_cuda(const PretrainLossBackwardParams& p, void* stream);

}  // namespace metro
