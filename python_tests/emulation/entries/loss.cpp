#include "loss/loss.h"

#include "emulation/entry.h"

METRO_ENTRY(pretrain_loss) {
  metro::PretrainLossParams p{};
  p.mlm = {in.data<float>("mlm_nll"), in.data<uint8_t>("mlm_hit"), in.data<int64_t>("mlm_target"),
           in.integer("mlm_rows")};
  p.rtd = {in.data<float>("rtd_loss"), in.data<float>("rtd_logit"), in.data<uint8_t>("label"),
           in.integer("rtd_rows")};
  p.clm = {in.data<float>("clm_nll"), in.data<uint8_t>("clm_hit"), in.data<int64_t>("clm_target"),
           in.integer("clm_rows")};
  p.denominators = in.data<float>("denominators");
  p.weights = {1.5f, 50.0f, 0.7f};
  p.loss = in.data<float>("loss");
  p.metrics = in.data<float>("metrics");
  return metro::pretrain_loss_cuda(p, nullptr);
}

METRO_ENTRY(pretrain_loss_backward) {
  metro::PretrainLossBackwardParams p{};
  p.grad_loss = in.data<float>("grad_loss");
  p.metrics = in.data<float>("metrics");
  p.mlm_target = in.data<int64_t>("mlm_target");
  p.label = in.data<uint8_t>("label");
  p.clm_target = in.data<int64_t>("clm_target");
  p.denominators = in.data<float>("denominators");
  p.weights = {1.5f, 50.0f, 0.7f};
  p.grad_mlm = in.data<float>("grad_mlm");
  p.grad_rtd = in.data<float>("grad_rtd");
  p.grad_clm = in.data<float>("grad_clm");
  p.mlm_rows = in.integer("mlm_rows");
  p.rtd_rows = in.integer("rtd_rows");
  p.clm_rows = in.integer("clm_rows");
  return metro::pretrain_loss_backward_cuda(p, nullptr);
}
