#include "common/cuda_glue.h"
#include "common/tensor_checks.h"
#include "rtd_head/rtd_head.h"

namespace metro {
namespace {

constexpr uint8_t kIgnored = 255;

void check(const char* op, const Tensor& hidden, const Tensor& weight, const Tensor& label) {
  check_floating(op, "hidden", hidden);
  check_shape(op, "hidden", hidden, {-1, -1});
  check_shape(op, "weight", weight, {hidden.sizes()[1]});
  check_dtype(op, "weight", weight, ScalarType::Float);
  check_same_device(op, "weight", weight, hidden, "hidden");
  check_shape(op, "label", label, {hidden.sizes()[0]});
  check_dtype(op, "label", label, ScalarType::Byte);
  check_same_device(op, "label", label, hidden, "hidden");
}

// On a GPU reading the labels would mean waiting for it: there they are ignored.
void check_labels(const char* op, const Tensor& label) {
  if (!label.is_cpu()) return;
  const uint8_t* values = data<uint8_t>(label);
  for (int64_t row = 0; row < label.numel(); ++row) {
    METRO_CHECK(values[row] <= 1 || values[row] == kIgnored, op,
                "label must hold 0 (original), 1 (replaced) or 255 (ignored), found ",
                static_cast<int>(values[row]), " at ", row);
  }
}

std::tuple<Tensor, Tensor, Tensor> rtd_head(const Tensor& hidden_any, const Tensor& weight_any,
                                            const Tensor& bias, const Tensor& label_any) {
  const char* op = "rtd_head";
  check(op, hidden_any, weight_any, label_any);
  check_shape(op, "bias", bias, {1});
  check_dtype(op, "bias", bias, ScalarType::Float);
  check_same_device(op, "bias", bias, hidden_any, "hidden");
  const Tensor hidden = torch::stable::contiguous(hidden_any);
  const Tensor weight = torch::stable::contiguous(weight_any);
  const Tensor label = torch::stable::contiguous(label_any);
  check_labels(op, label);
  const int64_t rows = hidden.sizes()[0];
  const Tensor loss = empty_on(hidden, {rows}, ScalarType::Float);
  const Tensor logit = empty_on(hidden, {rows}, ScalarType::Float);
  const Tensor hits = empty_on(hidden, {}, ScalarType::Long);
  const Tensor partials =
      empty_on(hidden, {rtd_head_row_blocks(rows, hidden.is_cuda())}, ScalarType::Long);
  const RtdHeadParams p{hidden.const_data_ptr(),
                        data<float>(weight),
                        data<float>(bias),
                        data<uint8_t>(label),
                        mutable_data<float>(loss),
                        mutable_data<float>(logit),
                        mutable_data<int64_t>(hits),
                        mutable_data<int64_t>(partials),
                        rows,
                        hidden.sizes()[1],
                        dtype_of(hidden)};
  METRO_RUN(op, hidden, rtd_head, p);
  return {loss, logit, hits};
}

std::tuple<Tensor, Tensor, Tensor> rtd_head_backward(const Tensor& grad_any,
                                                     const Tensor& logit_any,
                                                     const Tensor& hidden_any,
                                                     const Tensor& weight_any,
                                                     const Tensor& label_any) {
  const char* op = "rtd_head_backward";
  check(op, hidden_any, weight_any, label_any);
  const int64_t rows = hidden_any.sizes()[0], cols = hidden_any.sizes()[1];
  check_shape(op, "grad_loss", grad_any, {rows});
  check_dtype(op, "grad_loss", grad_any, ScalarType::Float);
  check_same_device(op, "grad_loss", grad_any, hidden_any, "hidden");
  check_shape(op, "logit", logit_any, {rows});
  check_dtype(op, "logit", logit_any, ScalarType::Float);
  check_same_device(op, "logit", logit_any, hidden_any, "hidden");
  const Tensor grad_loss = torch::stable::contiguous(grad_any);
  const Tensor logit = torch::stable::contiguous(logit_any);
  const Tensor hidden = torch::stable::contiguous(hidden_any);
  const Tensor weight = torch::stable::contiguous(weight_any);
  const Tensor label = torch::stable::contiguous(label_any);
  const Tensor grad_hidden = torch::stable::empty_like(hidden);
  const Tensor grad_weight = empty_on(hidden, {cols}, ScalarType::Float);
  const Tensor grad_bias = empty_on(hidden, {1}, ScalarType::Float);
  const Tensor partials =
      empty_on(hidden, {rtd_head_row_blocks(rows, hidden.is_cuda()), cols + 1}, ScalarType::Float);
  const RtdHeadBackwardParams p{data<float>(grad_loss),
                                data<float>(logit),
                                hidden.const_data_ptr(),
                                data<float>(weight),
                                data<uint8_t>(label),
                                grad_hidden.mutable_data_ptr(),
                                mutable_data<float>(grad_weight),
                                mutable_data<float>(grad_bias),
                                mutable_data<float>(partials),
                                rows,
                                cols,
                                dtype_of(hidden)};
  METRO_RUN(op, hidden, rtd_head_backward, p);
  return {grad_hidden, grad_weight, grad_bias};
}

void register_ops(torch::stable::detail::StableLibrary& m) {
  m.impl("rtd_head", TORCH_BOX(&rtd_head));
  m.impl("rtd_head_backward", TORCH_BOX(&rtd_head_backward));
}

}  // namespace
}  // namespace metro

METRO_REGISTER(metro::register_ops)
