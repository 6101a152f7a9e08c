#include "common/cuda_glue.h"
#include "common/tensor_checks.h"
#include "layer_norm/layer_norm.h"

namespace metro {
namespace {

using OptionalTensor = std::optional<Tensor>;

struct Shape {
  int64_t rows;
  int64_t cols;
};

Shape shape_of(const char* op, const char* name, const Tensor& x) {
  check_floating(op, name, x);
  METRO_CHECK(x.dim() >= 1, op, name, " must have at least one dimension, found a scalar");
  const int64_t cols = x.sizes()[x.dim() - 1];
  return {cols == 0 ? 0 : x.numel() / cols, cols};
}

void check_vector(const char* op, const char* name, const Tensor& t, int64_t size,
                  const Tensor& x) {
  check_shape(op, name, t, {size});
  check_dtype(op, name, t, ScalarType::Float);
  check_same_device(op, name, t, x, "the activations");
}

void check_like(const char* op, const char* name, const Tensor& t, const Tensor& x,
                const char* x_name) {
  check_same_shape(op, name, t, x, x_name);
  check_dtype(op, name, t, x.scalar_type());
  check_same_device(op, name, t, x, x_name);
}

// Without dropout the seed is not looked at.
OptionalTensor check_dropout(const char* op, const OptionalTensor& seed, double p, int64_t draw,
                             const Tensor& x) {
  METRO_CHECK(p >= 0.0 && p <= 1.0, op, "p must lie in [0, 1], found ", p);
  METRO_CHECK(draw >= 0 && draw < (1 << 24), op, "draw must lie in [0, 2^24), found ", draw);
  if (p == 0.0) return std::nullopt;
  METRO_CHECK(seed.has_value(), op, "p = ", p, " needs a seed (one int64), found None");
  check_seed(op, *seed, x);
  return torch::stable::contiguous(*seed);
}

OptionalTensor contiguous(const OptionalTensor& t) {
  if (!t.has_value()) return std::nullopt;
  return torch::stable::contiguous(*t);
}

template <typename T>
const T* data_or_null(const OptionalTensor& t) {
  return t.has_value() ? data<T>(*t) : nullptr;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> layer_norm(
    const Tensor& x_any, const OptionalTensor& bias_any, const OptionalTensor& residual_any,
    const Tensor& weight_any, const Tensor& shift_any, const OptionalTensor& seed_any,
    double p_drop, int64_t draw, double eps) {
  const char* op = "layer_norm";
  const Shape shape = shape_of(op, "x", x_any);
  if (bias_any.has_value()) check_vector(op, "bias", *bias_any, shape.cols, x_any);
  if (residual_any.has_value()) check_like(op, "residual", *residual_any, x_any, "x");
  check_vector(op, "weight", weight_any, shape.cols, x_any);
  check_vector(op, "shift", shift_any, shape.cols, x_any);
  METRO_CHECK(eps >= 0.0, op, "eps must not be negative, found ", eps);
  const OptionalTensor seed = check_dropout(op, seed_any, p_drop, draw, x_any);
  const Tensor x = torch::stable::contiguous(x_any);
  const OptionalTensor bias = contiguous(bias_any);
  const OptionalTensor residual = contiguous(residual_any);
  const Tensor weight = torch::stable::contiguous(weight_any);
  const Tensor shift = torch::stable::contiguous(shift_any);
  const Tensor out = torch::stable::empty_like(x);
  const Tensor sum = torch::stable::empty_like(x);
  const Tensor mean = empty_on(x, {shape.rows}, ScalarType::Float);
  const Tensor rstd = empty_on(x, {shape.rows}, ScalarType::Float);
  const LayerNormParams p{x.const_data_ptr(),
                          data_or_null<float>(bias),
                          data_or_null<void>(residual),
                          data<float>(weight),
                          data<float>(shift),
                          data_or_null<int64_t>(seed),
                          out.mutable_data_ptr(),
                          sum.mutable_data_ptr(),
                          mutable_data<float>(mean),
                          mutable_data<float>(rstd),
                          shape.rows,
                          shape.cols,
                          static_cast<float>(eps),
                          make_dropout(p_drop),
                          static_cast<uint32_t>(draw),
                          dtype_of(x)};
  METRO_RUN(op, x, layer_norm, p);
  return {out, sum, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> layer_norm_backward(
    const Tensor& grad_any, const Tensor& sum_any, const Tensor& mean_any, const Tensor& rstd_any,
    const Tensor& weight_any, const OptionalTensor& seed_any, double p_drop, int64_t draw) {
  const char* op = "layer_norm_backward";
  const Shape shape = shape_of(op, "sum", sum_any);
  check_like(op, "grad_out", grad_any, sum_any, "sum");
  check_vector(op, "mean", mean_any, shape.rows, sum_any);
  check_vector(op, "rstd", rstd_any, shape.rows, sum_any);
  check_vector(op, "weight", weight_any, shape.cols, sum_any);
  const OptionalTensor seed = check_dropout(op, seed_any, p_drop, draw, sum_any);
  const Tensor grad_out = torch::stable::contiguous(grad_any);
  const Tensor sum = torch::stable::contiguous(sum_any);
  const Tensor mean = torch::stable::contiguous(mean_any);
  const Tensor rstd = torch::stable::contiguous(rstd_any);
  const Tensor weight = torch::stable::contiguous(weight_any);
  const Tensor grad_x = torch::stable::empty_like(sum);
  const Tensor grad_residual =
      seed.has_value() ? torch::stable::empty_like(sum) : empty_on(sum, {0}, sum.scalar_type());
  const Tensor grad_bias = empty_on(sum, {shape.cols}, ScalarType::Float);
  const Tensor grad_weight = empty_on(sum, {shape.cols}, ScalarType::Float);
  const Tensor grad_shift = empty_on(sum, {shape.cols}, ScalarType::Float);
  const Tensor partials = empty_on(
      sum, {layer_norm_row_blocks(shape.rows, sum.is_cuda()), 3, shape.cols}, ScalarType::Float);
  const LayerNormBackwardParams p{grad_out.const_data_ptr(),
                                  sum.const_data_ptr(),
                                  data<float>(mean),
                                  data<float>(rstd),
                                  data<float>(weight),
                                  data_or_null<int64_t>(seed),
                                  grad_x.mutable_data_ptr(),
                                  seed.has_value() ? grad_residual.mutable_data_ptr() : nullptr,
                                  mutable_data<float>(grad_bias),
                                  mutable_data<float>(grad_weight),
                                  mutable_data<float>(grad_shift),
                                  mutable_data<float>(partials),
                                  shape.rows,
                                  shape.cols,
                                  make_dropout(p_drop),
                                  static_cast<uint32_t>(draw),
                                  dtype_of(sum)};
  METRO_RUN(op, sum, layer_norm_backward, p);
  return {grad_x, grad_residual, grad_bias, grad_weight, grad_shift};
}

void register_ops(torch::stable::detail::StableLibrary& m) {
  m.impl("layer_norm", TORCH_BOX(&layer_norm));
  m.impl("layer_norm_backward", TORCH_BOX(&layer_norm_backward));
}

}  // namespace
}  // namespace metro

METRO_REGISTER(metro::register_ops)
