#include "rtd_head/rtd_head.h"

#include "emulation/entry.h"

METRO_ENTRY(rtd_head) {
  return metro::rtd_head_cuda(
      {in.data("hidden"), in.data<float>("weight"), in.data<float>("bias"),
       in.data<uint8_t>("label"), in.data<float>("loss"), in.data<float>("logit"),
       in.data<int64_t>("hits"), in.data<int64_t>("partials"), in.integer("rows"),
       in.integer("cols"), in.dtype()},
      nullptr);
}

METRO_ENTRY(rtd_head_backward) {
  return metro::rtd_head_backward_cuda(
      {in.data<float>("grad_loss"), in.data<float>("logit"), in.data("hidden"),
       in.data<float>("weight"), in.data<uint8_t>("label"), in.data("grad_hidden"),
       in.data<float>("grad_weight"), in.data<float>("grad_bias"), in.data<float>("partials"),
       in.integer("rows"), in.integer("cols"), in.dtype()},
      nullptr);
}
