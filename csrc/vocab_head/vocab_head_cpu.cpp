#include <cfloat>
#include <cmath>

#include "common/parallel.h"
#include "common/philox_simd.h"
#include "common/simd.h"
#include "vocab_head/vocab_head.h"

namespace metro::METRO_CPU_NS {
namespace {

// Below this many elements a second thread costs more than it saves.
constexpr int64_t kGrainElements = 16384;

// Sample tiles that are finished together: one a lane, so that their logarithms and random numbers
// come from vector code.
constexpr int64_t kGroup = kLanes * kSampleTile;

// A stretch of one row: logits without bias, the bias beside them, `n` columns from `column` on.
template <typename T>
struct Stretch {
  const T* logits;
  const float* bias;
  int64_t n;
  int64_t column;

  // The logits i .. i + kLanes - 1; -inf beyond the end.
  vf at(int64_t i) const {
    return load_upto(logits + i, n - i, -INFINITY) + load_upto(bias + i, n - i);
  }

  Stretch part(int64_t from, int64_t count) const {
    return {logits + from, bias + from, n - from < count ? n - from : count, column + from};
  }
};

// At least -FLT_MAX, so that `logit - max` is never inf - inf, even where all logits are -inf.
template <typename T>
float max_logit(const Stretch<T>& s) {
  vf highest = set(-FLT_MAX);
  for (int64_t i = 0; i < s.n; i += kLanes) highest = max(s.at(i), highest);
  return reduce_max(highest);
}

// Σ exp((logit - max) · scale) over a sample tile, in kSumLanes partial sums.
template <typename T>
float sum_exp(const Stretch<T>& s, float max, float scale) {
  vf sums[kSumLanes / kLanes] = {};
  for (int64_t i = 0; i < s.n; i += kSumLanes) {
    for (int64_t j = 0; j < kSumLanes / kLanes; ++j) {
      if (i + j * kLanes < s.n) sums[j] += exp((s.at(i + j * kLanes) - max) * scale);
    }
  }
  for (int64_t width = kSumLanes / kLanes / 2; width > 0; width /= 2) {
    for (int64_t j = 0; j < width; ++j) sums[j] += sums[j + width];
  }
  return reduce_add(sums[0]);
}

// The column of the first logit equal to `value`.
template <typename T>
int64_t find_first(const Stretch<T>& s, float value) {
  for (int64_t i = 0; i < s.n; i += kLanes) {
    float lanes[kLanes];
    store(lanes, s.at(i));
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      if (lanes[lane] == value) return s.column + i + lane;
    }
  }
  return s.column;  // only NaN
}

// Step 2 of the sampling scheme: one token of a tile by inverse CDF.
template <typename T>
int64_t draw_token(const Stretch<T>& tile, float scale, float u) {
  float weights[kSampleTile];
  const float max = max_logit(tile);
  for (int64_t i = 0; i < tile.n; i += kLanes) {
    store(weights + i, exp((tile.at(i) - max) * scale));
  }
  float total = 0.0f;
  for (int64_t i = 0; i < tile.n; ++i) total += weights[i];
  const float threshold = u * total;
  float running = 0.0f;
  for (int64_t i = 0; i < tile.n; ++i) {
    running += weights[i];
    // u < 1, but u · total may round up to total, which no running sum exceeds.
    if (running > threshold || running == total) return tile.column + i;
  }
  return tile.column;  // only NaN
}

// Step 1 for the tiles of a group; sums[t] = Σ exp((logit - highest[t]) · scale) over tile t.
template <typename T>
void sample_group(const VocabHeadTileParams& p, const Stretch<T>& group, int64_t row,
                  const float* highest, const float* sums, VocabRow* state) {
  const int64_t tiles = (group.n + kSampleTile - 1) / kSampleTile;
  const vu first = set_u(static_cast<uint32_t>(group.column / kSampleTile));
  const Philox4v random =
      philox(static_cast<uint64_t>(*p.seed), set_u(static_cast<uint32_t>(row)), first + iota(),
             set_u(counter_word(Purpose::kSample, p.draw)), vu{});
  uint32_t noise[kLanes], inside[kLanes];
  memcpy(noise, &random.word[0], sizeof(noise));
  memcpy(inside, &random.word[1], sizeof(inside));
  float value[kLanes];
  for (int t = 0; t < kLanes; ++t) {
    value[t] = highest[t] * p.inverse_temperature + natural_log(sums[t]) + gumbel(noise[t]);
  }
  int64_t winner = -1;
  for (int64_t t = 0; t < tiles; ++t) {
    if (value[t] > state->best) {
      state->best = value[t];
      winner = t;
    }
  }
  if (winner < 0) return;
  state->sample = draw_token(group.part(winner * kSampleTile, kSampleTile), p.inverse_temperature,
                             uniform(inside[winner]));
}

template <typename T>
void fold_group(const VocabHeadTileParams& p, const Stretch<T>& group, int64_t row,
                VocabRow* state) {
  const bool own_scale = p.seed != nullptr && p.inverse_temperature != 1.0f;
  float highest[kLanes], sums[kLanes] = {}, scaled[kLanes] = {};
  store(highest, set(-FLT_MAX));
  // Relative to the tile's own maximum, so that what a tile bids depends on its logits alone.
  for (int64_t t = 0; t * kSampleTile < group.n; ++t) {
    const Stretch<T> tile = group.part(t * kSampleTile, kSampleTile);
    highest[t] = max_logit(tile);
    sums[t] = sum_exp(tile, highest[t], 1.0f);
    if (own_scale) scaled[t] = sum_exp(tile, highest[t], p.inverse_temperature);
  }
  const float group_max = reduce_max(load(highest));
  if (group_max > state->max) {
    state->sum *= reduce_max(exp(set(state->max - group_max)));
    state->max = group_max;
    state->argmax = find_first(group, group_max);
  }
  state->sum += reduce_add(load(sums) * exp(load(highest) - state->max));
  if (p.seed) sample_group(p, group, row, highest, own_scale ? scaled : sums, state);
}

void finish_row(const VocabHeadTileParams& p, int64_t row, const VocabRow& state) {
  const bool ignored = p.target[row] == kIgnoredTarget;
  p.lse[row] = state.max + logf(state.sum);
  p.nll[row] = ignored ? 0.0f : p.lse[row] - state.target_logit;
  p.hit[row] = !ignored && state.argmax == p.target[row];
  if (p.seed) p.sample[row] = state.sample;
}

template <typename T>
void fold_row(const VocabHeadTileParams& p, int64_t row) {
  VocabRow state = p.begin == 0 ? VocabRow{-INFINITY, 0.0f, 0.0f, -INFINITY, 0, 0} : p.state[row];
  const Stretch<T> all{static_cast<const T*>(p.logits) + row * p.cols, p.bias + p.begin, p.cols,
                       p.begin};
  const int64_t at = p.target[row] - p.begin;
  if (at >= 0 && at < p.cols) state.target_logit = to_float(all.logits[at]) + all.bias[at];
  for (int64_t from = 0; from < p.cols; from += kGroup) {
    fold_group(p, all.part(from, kGroup), row, &state);
  }
  if (p.begin + p.cols == p.vocab) {
    finish_row(p, row, state);
  } else {
    p.state[row] = state;
  }
}

template <typename T>
void tile_pass(const VocabHeadTileParams& p) {
  parallel_for(0, p.rows, kGrainElements / p.cols + 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) fold_row<T>(p, row);
  });
}

// Threads share out columns, not rows: every column sum is then one thread's, in row order.
constexpr int64_t kGradColumns = 256;

template <typename T>
void grad_columns(const VocabHeadGradParams& p, int64_t begin, int64_t end) {
  float sums[kGradColumns] = {};
  const int64_t n = end - begin;
  const float* bias = p.bias + p.begin + begin;
  for (int64_t row = 0; row < p.rows; ++row) {
    T* logits = static_cast<T*>(p.logits) + row * p.cols + begin;
    const int64_t target = p.target[row];
    const float scale = target == kIgnoredTarget ? 0.0f : p.grad_nll[row];
    if (scale == 0.0f) {
      for (int64_t i = 0; i < n; ++i) from_float(logits + i, 0.0f);
      continue;
    }
    const float lse = p.lse[row];
    const int64_t at = target - p.begin - begin;
    const bool has_target = at >= 0 && at < n;
    const float target_logit = has_target ? to_float(logits[at]) + bias[at] : 0.0f;
    for (int64_t i = 0; i < n; i += kLanes) {
      const vf logit = load_upto(logits + i, n - i) + load_upto(bias + i, n - i);
      const vf grad = scale * exp(logit - lse);
      store_upto(logits + i, grad, n - i);
      store(sums + i, load(sums + i) + grad);
    }
    if (has_target) {
      const float softmax = exp(set(target_logit - lse))[0];
      from_float(logits + at, scale * (softmax - 1.0f));
      sums[at] -= scale;
    }
  }
  memcpy(p.grad_bias + p.begin + begin, sums, static_cast<size_t>(n) * sizeof(float));
}

template <typename T>
void grad_tile(const VocabHeadGradParams& p) {
  const int64_t blocks = (p.cols + kGradColumns - 1) / kGradColumns;
  parallel_for(0, blocks, 1, [&](int64_t first, int64_t last) {
    for (int64_t block = first; block < last; ++block) {
      const int64_t end = (block + 1) * kGradColumns;
      grad_columns<T>(p, block * kGradColumns, end < p.cols ? end : p.cols);
    }
  });
}

template <typename T>
void accumulate(const VocabHeadAccumulateParams& p) {
  const T* product = static_cast<const T*>(p.product);
  T* out = static_cast<T*>(p.out);
  const int64_t vectors = (p.count + kLanes - 1) / kLanes;
  parallel_for(0, vectors, kGrainElements / kLanes, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * kLanes; i < end * kLanes; i += kLanes) {
      const int64_t left = p.count - i;
      vf sum = load_upto(product + i, left);
      if (!p.first) sum += load_upto(p.sum + i, left);
      store_upto(p.sum + i, sum, left);
      if (p.last) store_upto(out + i, sum, left);
    }
  });
}

}  // namespace

void vocab_head_tile_pass(const VocabHeadTileParams& p) {
  p.dtype == DType::kFloat32 ? tile_pass<float>(p) : tile_pass<bf16>(p);
}

void vocab_head_grad_tile(const VocabHeadGradParams& p) {
  p.dtype == DType::kFloat32 ? grad_tile<float>(p) : grad_tile<bf16>(p);
}

void vocab_head_accumulate(const VocabHeadAccumulateParams& p) {
  p.dtype == DType::kFloat32 ? accumulate<float>(p) : accumulate<bf16>(p);
}

}  // namespace metro::METRO_CPU_NS
