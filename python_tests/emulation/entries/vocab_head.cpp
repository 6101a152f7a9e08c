#include "vocab_head/vocab_head.h"

#include "emulation/entry.h"

METRO_ENTRY(vocab_head_rows) {
  metro::VocabHeadRowsParams p{};
  p.logits = in.data("logits");
  p.bias = in.data<float>("bias");
  p.target = in.data<int64_t>("target");
  p.seed = in.data<int64_t>("seed");
  p.nll = in.data<float>("nll");
  p.lse = in.data<float>("lse");
  p.hit = in.data<uint8_t>("hit");
  p.sample = in.data<int64_t>("sample");
  p.rows = in.integer("rows");
  p.first_row = in.integer("first_row");
  p.vocab = in.integer("vocab");
  p.inverse_temperature = static_cast<float>(1.0 / in.real("temperature"));
  p.draw = static_cast<uint32_t>(in.integer("draw"));
  p.dtype = in.dtype();
  return metro::vocab_head_rows_cuda(p, nullptr);
}

METRO_ENTRY(vocab_head_grad) {
  metro::VocabHeadGradParams p{};
  p.logits = in.data("logits");
  p.scale = in.data<float>("scale");
  p.lse = in.data<float>("lse");
  p.bias = in.data<float>("bias");
  p.target = in.data<int64_t>("target");
  p.grad_bias = in.data<float>("grad_bias");
  p.partials = in.data<float>("partials");
  p.rows = in.integer("rows");
  p.vocab = in.integer("vocab");
  p.accumulate = in.integer("accumulate") != 0;
  p.dtype = in.dtype();
  return metro::vocab_head_grad_cuda(p, nullptr);
}
