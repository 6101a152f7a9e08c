// Forward: one block reads every part once (45 bytes a masked row and 9 a token at most: 0.7 MB at
// 64K tokens, some ten microseconds), so that one launch does without a counter of finished blocks
// that somebody would have to clear. Each thread adds its rows in float64 in their order, then
// warps by shuffles, then the warps in theirs: the same bits every time. Backward: one launch, a
// thread a row, a row of blocks a part.
#include "common/cuda_launch.cuh"
#include "loss/loss.h"

namespace metro {
namespace {

using cuda::ceil_div;
using cuda::kWarp;
using cuda::launch;

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / kWarp;
constexpr int kBackwardThreads = 256;

// Counts are integers until the rows are over: float64 runs at a 64th of float32's rate on many
// devices, and one multiprocessor does it all.
__device__ inline void add_tokens(const TokenPart& part, double* sums) {
  int hits = 0, counted = 0;
#pragma unroll 4
  for (int64_t row = threadIdx.x; row < part.rows; row += kThreads) {
    const bool counts = part.target[row] != kIgnoredTarget;
    if (counts) sums[0] += static_cast<double>(part.nll[row]);
    hits += counts && part.hit[row] != 0;
    counted += counts;
  }
  sums[1] = hits;
  sums[2] = counted;
}

__device__ inline void add_rtd(const RtdPart& part, double* sums) {
  int counted = 0, replaced = 0, predicted = 0, hits = 0, found = 0;
#pragma unroll 4
  for (int64_t row = threadIdx.x; row < part.rows; row += kThreads) {
    const uint8_t label = part.label[row];
    const bool counts = label <= 1, positive = part.logit[row] > 0.0f;
    const float loss = part.loss[row];
    if (counts) sums[kRtdLossSum] += static_cast<double>(loss);
    counted += counts;
    replaced += label == 1;
    predicted += counts && positive;
    hits += counts && (label == 1) == positive;
    found += label == 1 && positive;
  }
  sums[kReplacedCount] = replaced;
  sums[kRtdHits] = hits;
  sums[kRtdCount] = counted;
  sums[kRtdPredictedReplaced] = predicted;
  sums[kRtdTruePositive] = found;
}

__device__ inline double share(double weight, double sum, double denominator) {
  return denominator == 0.0 ? 0.0 : weight * sum / denominator;
}

__global__ void __launch_bounds__(kThreads) forward_kernel(PretrainLossParams p) {
  __shared__ double shared[kMetrics][kWarps];
  __shared__ double total[kMetrics];
  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;
  double sums[kMetrics] = {};
  add_tokens(p.mlm, sums + kMlmNllSum);
  add_rtd(p.rtd, sums);
  add_tokens(p.clm, sums + kClmNllSum);
#pragma unroll
  for (int i = 0; i < kMetrics; ++i) {
    for (int mask = kWarp / 2; mask > 0; mask /= 2) {
      sums[i] += __shfl_xor_sync(0xffffffffu, sums[i], mask);
    }
    if (lane == 0) shared[i][warp] = sums[i];
  }
  __syncthreads();
  if (threadIdx.x < kMetrics) {
    double sum = 0.0;
    for (int w = 0; w < kWarps; ++w) sum += shared[threadIdx.x][w];
    total[threadIdx.x] = sum;
    p.metrics[threadIdx.x] = static_cast<float>(sum);
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    const float* d = p.denominators;
    *p.loss = static_cast<float>(
        share(p.weights.mlm, total[kMlmNllSum], d != nullptr ? d[0] : total[kMlmCount]) +
        share(p.weights.rtd, total[kRtdLossSum], d != nullptr ? d[1] : total[kRtdCount]) +
        share(p.weights.clm, total[kClmNllSum], d != nullptr ? d[2] : total[kClmCount]));
  }
}

__global__ void __launch_bounds__(kBackwardThreads) backward_kernel(PretrainLossBackwardParams p) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kBackwardThreads + threadIdx.x;
  const int part = blockIdx.y;
  const Metric count = part == 0 ? kMlmCount : part == 1 ? kRtdCount : kClmCount;
  const float weight = part == 0 ? p.weights.mlm : part == 1 ? p.weights.rtd : p.weights.clm;
  const float denominator = p.denominators != nullptr ? p.denominators[part] : p.metrics[count];
  const float gradient = static_cast<float>(share(weight, *p.grad_loss, denominator));
  if (part == 0 && row < p.mlm_rows) {
    p.grad_mlm[row] = p.mlm_target[row] == kIgnoredTarget ? 0.0f : gradient;
  } else if (part == 1 && row < p.rtd_rows) {
    p.grad_rtd[row] = p.label[row] > 1 ? 0.0f : gradient;
  } else if (part == 2 && row < p.clm_rows) {
    p.grad_clm[row] = p.clm_target[row] == kIgnoredTarget ? 0.0f : gradient;
  }
}

}  // namespace

int pretrain_loss_cuda(const PretrainLossParams& p, void* stream) {
  return launch(forward_kernel, dim3(1), dim3(kThreads), 0, stream, p);
}

int pretrain_loss_backward_cuda(const PretrainLossBackwardParams& p, void* stream) {
  int64_t rows = p.mlm_rows > p.rtd_rows ? p.mlm_rows : p.rtd_rows;
  rows = rows > p.clm_rows ? rows : p.clm_rows;
  const dim3 grid(static_cast<unsigned>(ceil_div(rows, kBackwardThreads)), 3);
  return launch(backward_kernel, grid, dim3(kBackwardThreads), 0, stream, p);
}

}  // namespace metro
