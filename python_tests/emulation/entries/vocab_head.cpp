#include "vocab_head/vocab_head.h"

#include "emulation/entry.h"

METRO_ENTRY(vocab_head_tile_pass) {
  metro::VocabHeadTileParams p{};
  p.logits = in.data("logits");
  p.bias = in.data<float>("bias");
  p.target = in.data<int64_t>("target");
  p.seed = in.data<int64_t>("seed");
  p.state = in.data<metro::VocabRow>("state");
  p.nll = in.data<float>("nll");
  p.lse = in.data<float>("lse");
  p.hit = in.data<uint8_t>("hit");
  p.sample = in.data<int64_t>("sample");
  p.rows = in.integer("rows");
  p.begin = in.integer("begin");
  p.cols = in.integer("cols");
  p.vocab = in.integer("vocab");
  p.inverse_temperature = static_cast<float>(1.0 / in.real("temperature"));
  p.draw = static_cast<uint32_t>(in.integer("draw"));
  p.dtype = in.dtype();
  return metro::vocab_head_tile_pass_cuda(p, nullptr);
}

METRO_ENTRY(vocab_head_accumulate) {
  return metro::vocab_head_accumulate_cuda(
      {in.data("product"), in.data<float>("sum"), in.data("out"), in.integer("count"),
       in.integer("first") != 0, in.integer("last") != 0, in.dtype()},
      nullptr);
}

METRO_ENTRY(vocab_head_grad_tile) {
  metro::VocabHeadGradParams p{};
  p.logits = in.data("logits");
  p.grad_nll = in.data<float>("grad_nll");
  p.lse = in.data<float>("lse");
  p.bias = in.data<float>("bias");
  p.target = in.data<int64_t>("target");
  p.grad_bias = in.data<float>("grad_bias");
  p.partials = in.data<float>("partials");
  p.rows = in.integer("rows");
  p.begin = in.integer("begin");
  p.cols = in.integer("cols");
  p.dtype = in.dtype();
  return metro::vocab_head_grad_tile_cuda(p, nullptr);
}
