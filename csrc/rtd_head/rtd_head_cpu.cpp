#include "common/parallel.h"
#include "common/simd.h"
#include "rtd_head/rtd_head.h"

namespace metro::METRO_CPU_NS {
namespace {

// ln(1 + e) for e in [0, 1]: 2·artanh(s) with s = e / (2 + e) ≤ 1/3, whose series to s^17 is within
// 1e-10. Small e keep their relative precision.
inline vf log1p_of_exp(vf e) {
  const vf s = e / (e + 2.0f);
  const vf s2 = s * s;
  vf series = set(1.0f / 17.0f);
  series = fma(series, s2, set(1.0f / 15.0f));
  series = fma(series, s2, set(1.0f / 13.0f));
  series = fma(series, s2, set(1.0f / 11.0f));
  series = fma(series, s2, set(1.0f / 9.0f));
  series = fma(series, s2, set(1.0f / 7.0f));
  series = fma(series, s2, set(1.0f / 5.0f));
  series = fma(series, s2, set(1.0f / 3.0f));
  series = fma(series, s2, set(1.0f));
  return 2.0f * s * series;
}

// The operand that may be NaN stands second in max(), which then returns it.
inline vf softplus(vf z) { return max(vf{}, z) + log1p_of_exp(exp(-max(-z, z))); }

inline vf sigmoid(vf z) { return 1.0f / (1.0f + exp(-z)); }

// The signs and weights of up to kLanes labels as vectors.
struct Labels {
  vf sign;     // -1 where replaced
  vi counted;  // not ignored
};

inline Labels load_labels(const uint8_t* label, int64_t n) {
  Labels out{set(1.0f), vi{}};
  for (int64_t i = 0; i < n && i < kLanes; ++i) {
    out.sign[i] = label[i] == 1 ? -1.0f : 1.0f;
    out.counted[i] = label[i] <= 1 ? -1 : 0;
  }
  return out;
}

template <typename T>
float dot(const T* x, const float* weight, int64_t cols) {
  vf sums[4] = {};
  int64_t col = 0;
  for (; col + 4 * kLanes <= cols; col += 4 * kLanes) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const int64_t at = col + i * kLanes;
      sums[i] = fma(load(x + at), load(weight + at), sums[i]);
    }
  }
  for (; col < cols; col += kLanes) {
    sums[0] = fma(load_upto(x + col, cols - col), load_upto(weight + col, cols - col), sums[0]);
  }
  return reduce_add((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

template <typename T>
int64_t forward_block(const RtdHeadParams& p, int64_t begin, int64_t end) {
  const T* hidden = static_cast<const T*>(p.hidden);
  for (int64_t row = begin; row < end; ++row) {
    p.logit[row] = dot(hidden + row * p.cols, p.weight, p.cols) + *p.bias;
  }
  for (int64_t row = begin; row < end; row += kLanes) {
    const int64_t left = end - row;
    const Labels labels = load_labels(p.label + row, left);
    const vf loss = softplus(load_upto(p.logit + row, left) * labels.sign);
    store_upto(p.loss + row, select(labels.counted, loss, vf{}), left);
  }
  int64_t hits = 0;
  for (int64_t row = begin; row < end; ++row) {
    hits += p.label[row] <= 1 && (p.logit[row] > 0.0f) == (p.label[row] == 1);
  }
  return hits;
}

template <typename T>
void forward(const RtdHeadParams& p) {
  const int64_t blocks = rtd_head_row_blocks(p.rows, false);
  parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      p.partials[block] =
          forward_block<T>(p, p.rows * block / blocks, p.rows * (block + 1) / blocks);
    }
  });
  *p.hits = 0;
  for (int64_t block = 0; block < blocks; ++block) *p.hits += p.partials[block];
}

template <typename T>
void backward_row(const RtdHeadBackwardParams& p, int64_t row, float grad_logit, float* sums) {
  const T* hidden = static_cast<const T*>(p.hidden) + row * p.cols;
  T* grad_hidden = static_cast<T*>(p.grad_hidden) + row * p.cols;
  for (int64_t col = 0; col < p.cols; col += kLanes) {
    const int64_t left = p.cols - col;
    const vf grad = set(grad_logit);
    const vf sum = fma(grad, load_upto(hidden + col, left), load_upto(sums + col, left));
    store_upto(sums + col, sum, left);
    store_upto(grad_hidden + col, grad * load_upto(p.weight + col, left), left);
  }
}

// Leaves the sums of grad_weight and, behind them, of grad_bias.
template <typename T>
void backward_block(const RtdHeadBackwardParams& p, int64_t begin, int64_t end, float* sums) {
  for (int64_t i = 0; i <= p.cols; ++i) sums[i] = 0.0f;
  for (int64_t row = begin; row < end; row += kLanes) {
    const int64_t left = end - row;
    const Labels labels = load_labels(p.label + row, left);
    const vf slope = labels.sign * sigmoid(load_upto(p.logit + row, left) * labels.sign);
    const vf grad = select(labels.counted, slope * load_upto(p.grad_loss + row, left), vf{});
    for (int64_t i = 0; i < left && i < kLanes; ++i) {
      backward_row<T>(p, row + i, grad[i], sums);
      sums[p.cols] += grad[i];
    }
  }
}

template <typename T>
void backward(const RtdHeadBackwardParams& p) {
  const int64_t blocks = rtd_head_row_blocks(p.rows, false);
  const int64_t width = p.cols + 1;
  parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      backward_block<T>(p, p.rows * block / blocks, p.rows * (block + 1) / blocks,
                        p.partials + block * width);
    }
  });
  for (int64_t col = 0; col < p.cols; ++col) p.grad_weight[col] = 0.0f;
  *p.grad_bias = 0.0f;
  for (int64_t block = 0; block < blocks; ++block) {
    const float* sums = p.partials + block * width;
    for (int64_t col = 0; col < p.cols; ++col) p.grad_weight[col] += sums[col];
    *p.grad_bias += sums[p.cols];
  }
}

}  // namespace

void rtd_head(const RtdHeadParams& p) {
  p.dtype == DType::kFloat32 ? forward<float>(p) : forward<bf16>(p);
}

void rtd_head_backward(const RtdHeadBackwardParams& p) {
  p.dtype == DType::kFloat32 ? backward<float>(p) : backward<bf16>(p);
}

}  // namespace metro::METRO_CPU_NS
