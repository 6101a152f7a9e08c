#include "gelu/gelu.h"

#include "emulation/entry.h"

METRO_ENTRY(bias_gelu) {
  return metro::bias_gelu_cuda({in.data("x"), in.data<float>("bias"), in.data("out"),
                                in.integer("rows"), in.integer("cols"), in.dtype()},
                               nullptr);
}

METRO_ENTRY(bias_gelu_backward) {
  return metro::bias_gelu_backward_cuda(
      {in.data("grad_out"), in.data("x"), in.data<float>("bias"), in.data("grad_x"),
       in.data<float>("grad_bias"), in.data<float>("partials"), in.integer("rows"),
       in.integer("cols"), in.dtype()},
      nullptr);
}
