#include "common/cuda_glue.h"
#include "common/tensor_checks.h"
#include "gelu/gelu.h"

namespace metro {
namespace {

struct Shape {
  int64_t rows;
  int64_t cols;
};

Shape check(const char* op, const Tensor& x, const Tensor& bias) {
  check_floating(op, "x", x);
  METRO_CHECK(x.dim() >= 1, op, "x must have at least one dimension, found a scalar");
  const int64_t cols = x.sizes()[x.dim() - 1];
  check_shape(op, "bias", bias, {cols});
  check_dtype(op, "bias", bias, ScalarType::Float);
  check_same_device(op, "bias", bias, x, "x");
  return {cols == 0 ? 0 : x.numel() / cols, cols};
}

Tensor bias_gelu(const Tensor& x_any, const Tensor& bias_any) {
  const char* op = "bias_gelu";
  const Shape shape = check(op, x_any, bias_any);
  const Tensor x = torch::stable::contiguous(x_any);
  const Tensor bias = torch::stable::contiguous(bias_any);
  const Tensor out = torch::stable::empty_like(x);
  const BiasGeluParams p{x.const_data_ptr(), data<float>(bias), out.mutable_data_ptr(),
                         shape.rows,         shape.cols,        dtype_of(x)};
  METRO_RUN(op, x, bias_gelu, p);
  return out;
}

// grad_x may be grad_out, which an elementwise kernel reads before it writes.
Tensor backward_into(const char* op, const Tensor& grad_x, const Tensor& grad_out,
                     const Tensor& x_any, const Tensor& bias_any, const Shape& shape) {
  const Tensor x = torch::stable::contiguous(x_any);
  const Tensor bias = torch::stable::contiguous(bias_any);
  const Tensor grad_bias = empty_on(x, {shape.cols}, ScalarType::Float);
  const Tensor partials =
      empty_on(x, {bias_gelu_row_blocks(shape.rows), shape.cols}, ScalarType::Float);
  const BiasGeluBackwardParams p{grad_out.const_data_ptr(),
                                 x.const_data_ptr(),
                                 data<float>(bias),
                                 grad_x.mutable_data_ptr(),
                                 mutable_data<float>(grad_bias),
                                 mutable_data<float>(partials),
                                 shape.rows,
                                 shape.cols,
                                 dtype_of(x)};
  METRO_RUN(op, x, bias_gelu_backward, p);
  return grad_bias;
}

Shape check_backward(const char* op, const Tensor& grad, const Tensor& x, const Tensor& bias) {
  const Shape shape = check(op, x, bias);
  check_same_shape(op, "grad_out", grad, x, "x");
  check_dtype(op, "grad_out", grad, x.scalar_type());
  check_same_device(op, "grad_out", grad, x, "x");
  return shape;
}

std::tuple<Tensor, Tensor> bias_gelu_backward(const Tensor& grad_any, const Tensor& x,
                                              const Tensor& bias) {
  const char* op = "bias_gelu_backward";
  const Shape shape = check_backward(op, grad_any, x, bias);
  const Tensor grad_out = torch::stable::contiguous(grad_any);
  const Tensor grad_x = torch::stable::empty_like(grad_out);
  return {grad_x, backward_into(op, grad_x, grad_out, x, bias, shape)};
}

Tensor bias_gelu_backward_inplace(const Tensor& grad_out, const Tensor& x, const Tensor& bias) {
  const char* op = "bias_gelu_backward_";
  const Shape shape = check_backward(op, grad_out, x, bias);
  METRO_CHECK(grad_out.is_contiguous(), op, "grad_out must be contiguous, as it is overwritten");
  return backward_into(op, grad_out, grad_out, x, bias, shape);
}

void register_ops(torch::stable::detail::StableLibrary& m) {
  m.impl("bias_gelu", TORCH_BOX(&bias_gelu));
  m.impl("bias_gelu_backward", TORCH_BOX(&bias_gelu_backward));
  m.impl("bias_gelu_backward_", TORCH_BOX(&bias_gelu_backward_inplace));
}

}  // namespace
}  // namespace metro

METRO_REGISTER(metro::register_ops)
