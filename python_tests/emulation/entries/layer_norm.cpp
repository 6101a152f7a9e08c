#include "layer_norm/layer_norm.h"

#include "emulation/entry.h"

METRO_ENTRY(layer_norm) {
  return metro::layer_norm_cuda(
      {in.data("x"), in.data<float>("bias"), in.data("residual"), in.data<float>("weight"),
       in.data<float>("shift"), in.data<int64_t>("seed"), in.data("out"), in.data("sum"),
       in.data<float>("mean"), in.data<float>("rstd"), in.integer("rows"), in.integer("cols"),
       static_cast<float>(in.real("eps")), metro::make_dropout(in.real("p")),
       static_cast<uint32_t>(in.integer("draw")), in.dtype()},
      nullptr);
}

METRO_ENTRY(layer_norm_backward) {
  return metro::layer_norm_backward_cuda(
      {in.data("grad_out"), in.data("sum"), in.data<float>("mean"), in.data<float>("rstd"),
       in.data<float>("weight"), in.data<int64_t>("seed"), in.data("grad_x"),
       in.data("grad_residual"), in.data<float>("grad_bias"), in.data<float>("grad_weight"),
       in.data<float>("grad_shift"), in.data<float>("partials"), in.integer("rows"),
       in.integer("cols"), metro::make_dropout(in.real("p")),
       static_cast<uint32_t>(in.integer("draw")), in.dtype()},
      nullptr);
}
