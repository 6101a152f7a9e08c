#include "common/gaussian.h"
#include "common/parallel.h"
#include "common/simd.h"
#include "gelu/gelu.h"

namespace metro::METRO_CPU_NS {
namespace {

// Below this many elements a second thread costs more than it saves.
constexpr int64_t kGrainElements = 16384;

int64_t grain_rows(int64_t cols) { return cols > 0 ? kGrainElements / cols + 1 : 1; }

template <typename T>
void forward(const BiasGeluParams& p) {
  const T* x = static_cast<const T*>(p.x);
  T* out = static_cast<T*>(p.out);
  parallel_for(0, p.rows, grain_rows(p.cols), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      for (int64_t col = 0; col < p.cols; col += kLanes) {
        const int64_t at = row * p.cols + col;
        const int64_t left = p.cols - col;
        const vf z = load_upto(x + at, left) + load_upto(p.bias + col, left);
        store_upto(out + at, z * gaussian(z).cdf, left);
      }
    }
  });
}

template <typename T>
void backward_rows(const BiasGeluBackwardParams& p, int64_t begin, int64_t end, float* sums) {
  const T* grad_out = static_cast<const T*>(p.grad_out);
  const T* x = static_cast<const T*>(p.x);
  T* grad_x = static_cast<T*>(p.grad_x);
  for (int64_t row = begin; row < end; ++row) {
    for (int64_t col = 0; col < p.cols; col += kLanes) {
      const int64_t at = row * p.cols + col;
      const int64_t left = p.cols - col;
      const vf z = load_upto(x + at, left) + load_upto(p.bias + col, left);
      const Gaussian g = gaussian(z);
      const vf grad = load_upto(grad_out + at, left) * fma(z, g.pdf, g.cdf);
      store_upto(grad_x + at, grad, left);
      store_upto(sums + col, load_upto(sums + col, left) + grad, left);
    }
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
