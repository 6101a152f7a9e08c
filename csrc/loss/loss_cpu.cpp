#include "common/parallel.h"
#include "loss/loss.h"

#ifndef METRO_CPU_NS
#define METRO_CPU_NS cpu_portable
#endif

namespace metro::METRO_CPU_NS {
namespace {

// Blocks (of about a thousand rows) below which a second thread costs more than it saves.
constexpr int64_t kGrainBlocks = 16;

// The first, and (of the next block) one past the last row of a block.
int64_t block_row(int64_t rows, int64_t block, int64_t blocks) { return rows * block / blocks; }

// sums: nll, hits, count.
void add_tokens(const TokenPart& part, int64_t block, int64_t blocks, double* sums) {
  const int64_t end = block_row(part.rows, block + 1, blocks);
  for (int64_t row = block_row(part.rows, block, blocks); row < end; ++row) {
    if (part.target[row] == kIgnoredTarget) continue;
    sums[0] += static_cast<double>(part.nll[row]);
    sums[1] += part.hit[row] != 0;
    sums[2] += 1;
  }
}

void add_rtd(const RtdPart& part, int64_t block, int64_t blocks, double* sums) {
  const int64_t end = block_row(part.rows, block + 1, blocks);
  for (int64_t row = block_row(part.rows, block, blocks); row < end; ++row) {
    if (part.label[row] > 1) continue;
    const bool replaced = part.label[row] == 1;
    const bool predicted = part.logit[row] > 0.0f;
    sums[kReplacedCount] += replaced;
    sums[kRtdLossSum] += static_cast<double>(part.loss[row]);
    sums[kRtdHits] += replaced == predicted;
    sums[kRtdCount] += 1;
    sums[kRtdPredictedReplaced] += predicted;
    sums[kRtdTruePositive] += replaced && predicted;
  }
}

int64_t longest(const PretrainLossParams& p) {
  const int64_t rows = p.mlm.rows > p.rtd.rows ? p.mlm.rows : p.rtd.rows;
  return rows > p.clm.rows ? rows : p.clm.rows;
}

double share(double weight, double sum, double denominator) {
  return denominator == 0.0 ? 0.0 : weight * sum / denominator;
}

// The gradient of every row that counts.
float row_gradient(const PretrainLossBackwardParams& p, float weight, int part, Metric count) {
  const float denominator = p.denominators != nullptr ? p.denominators[part] : p.metrics[count];
  return static_cast<float>(share(weight, *p.grad_loss, denominator));
}

}  // namespace

void pretrain_loss(const PretrainLossParams& p) {
  const int64_t blocks = pretrain_loss_blocks(longest(p));
  parallel_for(0, blocks, kGrainBlocks, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      double* sums = p.partials + block * kMetrics;
      for (int i = 0; i < kMetrics; ++i) sums[i] = 0.0;
      add_tokens(p.mlm, block, blocks, sums + kMlmNllSum);
      add_rtd(p.rtd, block, blocks, sums);
      add_tokens(p.clm, block, blocks, sums + kClmNllSum);
    }
  });
  double total[kMetrics] = {};
  for (int64_t block = 0; block < blocks; ++block) {
    for (int i = 0; i < kMetrics; ++i) total[i] += p.partials[block * kMetrics + i];
  }
  for (int i = 0; i < kMetrics; ++i) p.metrics[i] = static_cast<float>(total[i]);
  const float* d = p.denominators;
  *p.loss = static_cast<float>(
      share(p.weights.mlm, total[kMlmNllSum], d != nullptr ? d[0] : total[kMlmCount]) +
      share(p.weights.rtd, total[kRtdLossSum], d != nullptr ? d[1] : total[kRtdCount]) +
      share(p.weights.clm, total[kClmNllSum], d != nullptr ? d[2] : total[kClmCount]));
}

void pretrain_loss_backward(const PretrainLossBackwardParams& p) {
  const float mlm = row_gradient(p, p.weights.mlm, 0, kMlmCount);
  const float rtd = row_gradient(p, p.weights.rtd, 1, kRtdCount);
  const float clm = row_gradient(p, p.weights.clm, 2, kClmCount);
  for (int64_t row = 0; row < p.mlm_rows; ++row) {
    p.grad_mlm[row] = p.mlm_target[row] == kIgnoredTarget ? 0.0f : mlm;
  }
  for (int64_t row = 0; row < p.rtd_rows; ++row) p.grad_rtd[row] = p.label[row] > 1 ? 0.0f : rtd;
  for (int64_t row = 0; row < p.clm_rows; ++row) {
    p.grad_clm[row] = p.clm_target[row] == kIgnoredTarget ? 0.0f : clm;
  }
}

}  // namespace metro::METRO_CPU_NS
