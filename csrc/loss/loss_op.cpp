#include "common/cuda_glue.h"
#include "common/tensor_checks.h"
#include "loss/loss.h"

namespace metro {
namespace {

using OptionalTensor = std::optional<Tensor>;

OptionalTensor contiguous(const OptionalTensor& t) {
  if (!t.has_value()) return std::nullopt;
  return torch::stable::contiguous(*t);
}

template <typename T>
const T* data_or_null(const OptionalTensor& t) {
  return t.has_value() ? data<T>(*t) : nullptr;
}

int64_t rows_of(const OptionalTensor& t) { return t.has_value() ? t->sizes()[0] : 0; }

void check_vector(const char* op, const char* name, const Tensor& t, int64_t rows, ScalarType dtype,
                  const Tensor& reference) {
  check_shape(op, name, t, {rows});
  check_dtype(op, name, t, dtype);
  check_same_device(op, name, t, reference, "the other tensors");
}

// The tensors of a part are given together or not at all, and have the same length.
struct Argument {
  const char* name;
  OptionalTensor* tensor;
  ScalarType dtype;
};

void check_part(const char* op, std::initializer_list<Argument> part, const Tensor& reference) {
  const Argument& first = *part.begin();
  for (const Argument& argument : part) {
    METRO_CHECK(argument.tensor->has_value() == first.tensor->has_value(), op, first.name, " and ",
                argument.name, " must be given together, found one of them None");
    if (!argument.tensor->has_value()) continue;
    const Tensor& t = **argument.tensor;
    check_vector(op, argument.name, t, -1, argument.dtype, reference);
    check_same_shape(op, argument.name, t, **first.tensor, first.name);
    *argument.tensor = contiguous(*argument.tensor);
  }
}

OptionalTensor check_denominators(const char* op, const OptionalTensor& t,
                                  const Tensor& reference) {
  if (t.has_value()) check_vector(op, "denominators", *t, 3, ScalarType::Float, reference);
  return contiguous(t);
}

LossWeights make_weights(double mlm, double rtd, double clm) {
  return {static_cast<float>(mlm), static_cast<float>(rtd), static_cast<float>(clm)};
}

std::tuple<Tensor, Tensor> pretrain_loss(OptionalTensor mlm_nll, OptionalTensor mlm_hit,
                                         OptionalTensor mlm_target, OptionalTensor rtd_loss,
                                         OptionalTensor rtd_logit, OptionalTensor label,
                                         OptionalTensor clm_nll, OptionalTensor clm_hit,
                                         OptionalTensor clm_target, OptionalTensor denominators,
                                         double mlm_weight, double rtd_weight, double clm_weight) {
  const char* op = "pretrain_loss";
  const OptionalTensor& any = mlm_nll.has_value()    ? mlm_nll
                              : rtd_loss.has_value() ? rtd_loss
                                                     : clm_nll;
  METRO_CHECK(any.has_value(), op, "expected mlm_nll, rtd_loss or clm_nll, found None for all");
  const Tensor reference = *any;
  check_part(op,
             {{"mlm_nll", &mlm_nll, ScalarType::Float},
              {"mlm_hit", &mlm_hit, ScalarType::Byte},
              {"mlm_target", &mlm_target, ScalarType::Long}},
             reference);
  check_part(op,
             {{"rtd_loss", &rtd_loss, ScalarType::Float},
              {"rtd_logit", &rtd_logit, ScalarType::Float},
              {"label", &label, ScalarType::Byte}},
             reference);
  check_part(op,
             {{"clm_nll", &clm_nll, ScalarType::Float},
              {"clm_hit", &clm_hit, ScalarType::Byte},
              {"clm_target", &clm_target, ScalarType::Long}},
             reference);
  denominators = check_denominators(op, denominators, reference);
  int64_t longest = 0;
  for (const int64_t rows : {rows_of(mlm_nll), rows_of(rtd_loss), rows_of(clm_nll)}) {
    longest = rows > longest ? rows : longest;
  }
  const Tensor loss = empty_on(reference, {}, ScalarType::Float);
  const Tensor metrics = empty_on(reference, {kMetrics}, ScalarType::Float);
  const Tensor partials =
      empty_on(reference, {pretrain_loss_blocks(longest), kMetrics}, ScalarType::Double);
  const PretrainLossParams p{{data_or_null<float>(mlm_nll), data_or_null<uint8_t>(mlm_hit),
                              data_or_null<int64_t>(mlm_target), rows_of(mlm_nll)},
                             {data_or_null<float>(rtd_loss), data_or_null<float>(rtd_logit),
                              data_or_null<uint8_t>(label), rows_of(rtd_loss)},
                             {data_or_null<float>(clm_nll), data_or_null<uint8_t>(clm_hit),
                              data_or_null<int64_t>(clm_target), rows_of(clm_nll)},
                             data_or_null<float>(denominators),
                             make_weights(mlm_weight, rtd_weight, clm_weight),
                             mutable_data<float>(loss),
                             mutable_data<float>(metrics),
                             mutable_data<double>(partials)};
  METRO_RUN(op, reference, pretrain_loss, p);
  return {loss, metrics};
}

std::tuple<Tensor, Tensor, Tensor> pretrain_loss_backward(
    const Tensor& grad_any, const Tensor& metrics_any, OptionalTensor mlm_target,
    OptionalTensor label, OptionalTensor clm_target, OptionalTensor denominators, double mlm_weight,
    double rtd_weight, double clm_weight) {
  const char* op = "pretrain_loss_backward";
  check_shape(op, "grad_loss", grad_any, {});
  check_dtype(op, "grad_loss", grad_any, ScalarType::Float);
  check_vector(op, "metrics", metrics_any, kMetrics, ScalarType::Float, grad_any);
  const Tensor metrics = torch::stable::contiguous(metrics_any);
  check_part(op, {{"mlm_target", &mlm_target, ScalarType::Long}}, metrics);
  check_part(op, {{"label", &label, ScalarType::Byte}}, metrics);
  check_part(op, {{"clm_target", &clm_target, ScalarType::Long}}, metrics);
  denominators = check_denominators(op, denominators, metrics);
  const Tensor grad_mlm = empty_on(metrics, {rows_of(mlm_target)}, ScalarType::Float);
  const Tensor grad_rtd = empty_on(metrics, {rows_of(label)}, ScalarType::Float);
  const Tensor grad_clm = empty_on(metrics, {rows_of(clm_target)}, ScalarType::Float);
  const PretrainLossBackwardParams p{data<float>(grad_any),
                                     data<float>(metrics),
                                     data_or_null<int64_t>(mlm_target),
                                     data_or_null<uint8_t>(label),
                                     data_or_null<int64_t>(clm_target),
                                     data_or_null<float>(denominators),
                                     make_weights(mlm_weight, rtd_weight, clm_weight),
                                     mutable_data<float>(grad_mlm),
                                     mutable_data<float>(grad_rtd),
                                     mutable_data<float>(grad_clm),
                                     rows_of(mlm_target),
                                     rows_of(label),
                                     rows_of(clm_target)};
  METRO_RUN(op, metrics, pretrain_loss_backward, p);
  return {grad_mlm, grad_rtd, grad_clm};
}

void register_ops(torch::stable::detail::StableLibrary& m) {
  m.impl("pretrain_loss", TORCH_BOX(&pretrain_loss));
  m.impl("pretrain_loss_backward", TORCH_BOX(&pretrain_loss_backward));
}

}  // namespace
}  // namespace metro

METRO_REGISTER(metro::register_ops)
