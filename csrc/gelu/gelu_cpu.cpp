#include "common/gaussian.h"
#include "common/parallel.h"
#include "common/simd.h"
#include "gelu/gelu.h"

namespace metro::METRO_CPU_NS {
namespace {

// Below this many elements a second thread costs more than it saves.
constexpr int64_t kGrainElements = 16384;

int64_t grain_rows(int64_t cols) { return cols > 0 ? kGrainElements / cols + 1 : 1; }

// Vectors that are worked on together: their polynomials are chains of twenty dependent
// instructions, of which two can begin in a cycle. Six still fit the registers of AVX-512.
constexpr int kGroup = kLanes == 16 ? 6 : 2;

template <typename T, int N>
inline Group<N> load_sum(const T* x, const float* bias) {
  return each<N>([&](int i) { return load(x + i * kLanes) + load(bias + i * kLanes); });
}

template <typename T, int N>
inline void forward_vectors(const T* x, const float* bias, T* out) {
  const Group<N> y = gelu<T>(load_sum<T, N>(x, bias));
  for (int i = 0; i < N; ++i) store(out + i * kLanes, y.v[i]);
}

// x and out are rows of `cols` elements.
template <typename T>
void forward_row(const T* x, const float* bias, T* out, int64_t cols) {
  int64_t col = 0;
  for (; col + kGroup * kLanes <= cols; col += kGroup * kLanes) {
    forward_vectors<T, kGroup>(x + col, bias + col, out + col);
  }
  for (; col + kLanes <= cols; col += kLanes) {
    forward_vectors<T, 1>(x + col, bias + col, out + col);
  }
  if (col < cols) {
    const int64_t left = cols - col;
    const vf z = load_partial(x + col, left) + load_partial(bias + col, left);
    store_partial(out + col, gelu<T>(Group<1>{{z}}).v[0], left);
  }
}

template <typename T>
void forward(const BiasGeluParams& p) {
  const T* x = static_cast<const T*>(p.x);
  T* out = static_cast<T*>(p.out);
  parallel_for(0, p.rows, grain_rows(p.cols), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      forward_row(x + row * p.cols, p.bias, out + row * p.cols, p.cols);
    }
  });
}

template <typename T, int N>
inline void backward_vectors(const T* grad_out, const T* x, const float* bias, T* grad_x,
                             float* sums) {
  const Group<N> slope = gelu_slope<T>(load_sum<T, N>(x, bias));
  for (int i = 0; i < N; ++i) {
    const int at = i * kLanes;
    const vf grad = load(grad_out + at) * slope.v[i];
    store(grad_x + at, grad);
    store(sums + at, load(sums + at) + grad);
  }
}

// Adds the row of grad_x, unrounded, to `sums`.
template <typename T>
void backward_row(const T* grad_out, const T* x, const float* bias, T* grad_x, float* sums,
                  int64_t cols) {
  int64_t col = 0;
  for (; col + kGroup * kLanes <= cols; col += kGroup * kLanes) {
    backward_vectors<T, kGroup>(grad_out + col, x + col, bias + col, grad_x + col, sums + col);
  }
  for (; col + kLanes <= cols; col += kLanes) {
    backward_vectors<T, 1>(grad_out + col, x + col, bias + col, grad_x + col, sums + col);
  }
  if (col < cols) {
    const int64_t left = cols - col;
    const vf z = load_partial(x + col, left) + load_partial(bias + col, left);
    const vf grad = load_partial(grad_out + col, left) * gelu_slope<T>(Group<1>{{z}}).v[0];
    store_partial(grad_x + col, grad, left);
    store_partial(sums + col, load_partial(sums + col, left) + grad, left);
  }
}

template <typename T>
void backward_rows(const BiasGeluBackwardParams& p, int64_t begin, int64_t end, float* sums) {
  const T* grad_out = static_cast<const T*>(p.grad_out);
  const T* x = static_cast<const T*>(p.x);
  T* grad_x = static_cast<T*>(p.grad_x);
  for (int64_t row = begin; row < end; ++row) {
    const int64_t at = row * p.cols;
    backward_row(grad_out + at, x + at, p.bias, grad_x + at, sums, p.cols);
  }
}

template <typename T>
void backward(const BiasGeluBackwardParams& p) {
  const int64_t blocks = bias_gelu_row_blocks(p.rows);
  parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      float* sums = p.partials + block * p.cols;
      for (int64_t col = 0; col < p.cols; ++col) sums[col] = 0.0f;
      backward_rows<T>(p, p.rows * block / blocks, p.rows * (block + 1) / blocks, sums);
    }
  });
  parallel_for(0, p.cols, 1024, [&](int64_t begin, int64_t end) {
    for (int64_t col = begin; col < end; ++col) p.grad_bias[col] = 0.0f;
    for (int64_t block = 0; block < blocks; ++block) {
      for (int64_t col = begin; col < end; ++col) {
        p.grad_bias[col] += p.partials[block * p.cols + col];
      }
    }
  });
}

}  // namespace

void bias_gelu(const BiasGeluParams& p) {
  p.dtype == DType::kFloat32 ? forward<float>(p) : forward<bf16>(p);
}

void bias_gelu_backward(const BiasGeluBackwardParams& p) {
  p.dtype == DType::kFloat32 ? backward<float>(p) : backward<bf16>(p);
}

}  // namespace metro::METRO_CPU_NS
