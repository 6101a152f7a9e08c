#include "common/parallel.h"
#include "common/philox_simd.h"
#include "common/simd.h"
#include "layer_norm/layer_norm.h"

namespace metro::METRO_CPU_NS {
namespace {

// Below this many elements a second thread costs more than it saves.
constexpr int64_t kGrainElements = 16384;

// Sums run in this many independent chains, which hides the latency of the additions.
constexpr int kChains = 4;

// Elements whose dropout is drawn at a time, in as many chains.
constexpr int kBatch = 4 * kChains * kLanes;

#define METRO_INLINE __attribute__((always_inline))

// Calls body(col, left, chain) for the vectors of the columns begin..end; `left` elements of the
// vector, or kLanes if that is fewer, are to be read and written.
template <typename Body>
METRO_INLINE inline void each_vector(int64_t begin, int64_t end, const Body& body) {
  int64_t col = begin;
  for (; col + kChains * kLanes <= end; col += kChains * kLanes) {
#pragma GCC unroll 4
    for (int chain = 0; chain < kChains; ++chain) body(col + chain * kLanes, kLanes, chain);
  }
  for (; col < end; col += kLanes) body(col, end - col, 0);
}

METRO_INLINE inline float reduce_chains(const vf* sums) {
  return reduce_add((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// Calls body(col, left, chain, keep) for the vectors of a row, where keep(x) is x after dropout.
// One batch of random numbers serves kBatch elements; rows whose length is no multiple of 8 begin
// inside a Philox call, and their first batch is that much shorter.
template <typename Params, typename Body>
METRO_INLINE inline void each_vector_with_dropout(const Params& p, int64_t row, const Body& body) {
  if (p.seed == nullptr) {
    each_vector(0, p.cols, [&](int64_t col, int64_t left, int chain) METRO_INLINE {
      body(col, left, chain, [](vf x) METRO_INLINE { return x; });
    });
    return;
  }
  const vf scale = set(p.dropout.scale);
  const uint64_t seed = static_cast<uint64_t>(*p.seed);
  const uint32_t purpose = counter_word(Purpose::kHiddenDropout, p.draw);
  uint16_t numbers[kBatch + kLanes];
  memset(numbers + kBatch, 0, 2 * kLanes);  // a last partial vector reads past the batch
  for (int64_t begin = 0; begin < p.cols;) {
    const int64_t element = row * p.cols + begin;
    const int64_t offset = element % 8;
    const int64_t batch_end = begin + kBatch - offset;
    const int64_t end = batch_end < p.cols ? batch_end : p.cols;
    half_words<kChains>(seed, static_cast<uint64_t>(element / 8), 0, purpose, 0, numbers);
    each_vector(begin, end, [&](int64_t col, int64_t left, int chain) METRO_INLINE {
      const vi kept = at_least(numbers + offset + (col - begin), p.dropout.threshold);
      body(col, left, chain, [&](vf x) METRO_INLINE { return select(kept, x * scale, vf{}); });
    });
    begin = end;
  }
}

template <typename T>
void normalize_row(const LayerNormParams& p, int64_t row, float total) {
  const T* sum = static_cast<const T*>(p.sum) + row * p.cols;
  T* out = static_cast<T*>(p.out) + row * p.cols;
  const float cols = static_cast<float>(p.cols);
  const float rough_mean = total / cols;
  vf errors[kChains] = {}, squares[kChains] = {};
  each_vector(0, p.cols, [&](int64_t col, int64_t left, int chain) METRO_INLINE {
    const vf centred = load_upto(sum + col, left, rough_mean) - rough_mean;
    errors[chain] += centred;
    squares[chain] = fma(centred, centred, squares[chain]);
  });
  // What is left of the centred values' sum corrects the mean for the rounding of its long sum.
  const float error = reduce_chains(errors) / cols;
  const float mean = rough_mean + error;
  const float variance = reduce_chains(squares) / cols - error * error;
  const float rstd = 1.0f / __builtin_sqrtf((variance < 0.0f ? 0.0f : variance) + p.eps);
  each_vector(0, p.cols, [&](int64_t col, int64_t left, int) METRO_INLINE {
    const vf x_hat = (load_upto(sum + col, left) - mean) * rstd;
    const vf weight = load_upto(p.weight + col, left), shift = load_upto(p.shift + col, left);
    store_upto(out + col, fma(x_hat, weight, shift), left);
  });
  p.mean[row] = mean;
  p.rstd[row] = rstd;
}

template <typename T>
void forward_row(const LayerNormParams& p, int64_t row) {
  const T* x = static_cast<const T*>(p.x) + row * p.cols;
  const T* residual = static_cast<const T*>(p.residual) + row * p.cols;
  T* sum = static_cast<T*>(p.sum) + row * p.cols;
  vf totals[kChains] = {};
  each_vector_with_dropout(p, row,
                           [&](int64_t col, int64_t left, int chain, auto keep) METRO_INLINE {
                             vf z = load_upto(x + col, left);
                             if (p.bias != nullptr) z += load_upto(p.bias + col, left);
                             z = keep(z);
                             if (p.residual != nullptr) z += load_upto(residual + col, left);
                             store_upto(sum + col, z, left);
                             totals[chain] += load_upto(sum + col, left);
                           });
  normalize_row<T>(p, row, reduce_chains(totals));
}

template <typename T>
void forward(const LayerNormParams& p) {
  const int64_t grain = p.cols > 0 ? kGrainElements / p.cols + 1 : 1;
  parallel_for(0, p.rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) forward_row<T>(p, row);
  });
}

// Adds the row to the partial sums [3, cols] of its block.
template <typename T>
void backward_row(const LayerNormBackwardParams& p, int64_t row, float* sums) {
  const T* grad_out = static_cast<const T*>(p.grad_out) + row * p.cols;
  const T* sum = static_cast<const T*>(p.sum) + row * p.cols;
  T* grad_x = static_cast<T*>(p.grad_x) + row * p.cols;
  T* grad_residual = static_cast<T*>(p.grad_residual) + row * p.cols;
  float* weight_sums = sums;
  float* shift_sums = sums + p.cols;
  float* bias_sums = sums + 2 * p.cols;
  const float mean = p.mean[row], rstd = p.rstd[row];
  vf g_totals[kChains] = {}, gx_totals[kChains] = {};
  each_vector(0, p.cols, [&](int64_t col, int64_t left, int chain) METRO_INLINE {
    const vf grad = load_upto(grad_out + col, left);
    const vf x_hat = (load_upto(sum + col, left) - mean) * rstd;
    const vf g = grad * load_upto(p.weight + col, left);
    g_totals[chain] += g;
    gx_totals[chain] = fma(g, x_hat, gx_totals[chain]);
    store_upto(weight_sums + col, fma(grad, x_hat, load_upto(weight_sums + col, left)), left);
    store_upto(shift_sums + col, load_upto(shift_sums + col, left) + grad, left);
  });
  const float g_mean = reduce_chains(g_totals) / static_cast<float>(p.cols);
  const float gx_mean = reduce_chains(gx_totals) / static_cast<float>(p.cols);
  each_vector_with_dropout(p, row, [&](int64_t col, int64_t left, int, auto keep) METRO_INLINE {
    const vf x_hat = (load_upto(sum + col, left) - mean) * rstd;
    const vf g = load_upto(grad_out + col, left) * load_upto(p.weight + col, left);
    const vf grad_sum = rstd * (fma(x_hat, set(-gx_mean), g) - g_mean);
    if (p.grad_residual != nullptr) store_upto(grad_residual + col, grad_sum, left);
    const vf grad = keep(grad_sum);
    store_upto(grad_x + col, grad, left);
    store_upto(bias_sums + col, load_upto(bias_sums + col, left) + grad, left);
  });
}

// Adds up the blocks' partial sums in their order.
void column_sums(const LayerNormBackwardParams& p, int64_t blocks) {
  float* outputs[3] = {p.grad_weight, p.grad_shift, p.grad_bias};
  parallel_for(0, p.cols, 1024, [&](int64_t begin, int64_t end) {
    for (int which = 0; which < 3; ++which) {
      for (int64_t col = begin; col < end; ++col) outputs[which][col] = 0.0f;
      for (int64_t block = 0; block < blocks; ++block) {
        const float* sums = p.partials + (block * 3 + which) * p.cols;
        for (int64_t col = begin; col < end; ++col) outputs[which][col] += sums[col];
      }
    }
  });
}

template <typename T>
void backward(const LayerNormBackwardParams& p) {
  const int64_t blocks = layer_norm_row_blocks(p.rows, false);
  parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      float* sums = p.partials + block * 3 * p.cols;
      for (int64_t i = 0; i < 3 * p.cols; ++i) sums[i] = 0.0f;
      const int64_t last = p.rows * (block + 1) / blocks;
      for (int64_t row = p.rows * block / blocks; row < last; ++row) backward_row<T>(p, row, sums);
    }
  });
  column_sums(p, blocks);
}

}  // namespace

void layer_norm(const LayerNormParams& p) {
  p.dtype == DType::kFloat32 ? forward<float>(p) : forward<bf16>(p);
}

void layer_norm_backward(const LayerNormBackwardParams& p) {
  p.dtype == DType::kFloat32 ? backward<float>(p) : backward<bf16>(p);
}

}  // namespace metro::METRO_CPU_NS
