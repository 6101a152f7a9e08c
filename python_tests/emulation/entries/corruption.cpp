#include "corruption/corruption.h"

#include "emulation/entry.h"

METRO_ENTRY(mask_tokens) {
  metro::MaskTokensParams p{};
  p.tokens = in.data<int64_t>("tokens");
  p.special = in.data<int64_t>("special");
  p.seed = in.data<int64_t>("seed");
  p.masked = in.data<int64_t>("masked");
  p.position = in.data<int64_t>("position");
  p.target = in.data<int64_t>("target");
  p.order = in.data<uint32_t>("scratch_order");
  p.maskable = in.data<uint8_t>("maskable");
  p.length = in.integer("length");
  p.special_count = in.integer("special_count");
  p.count = in.integer("count");
  p.mask_id = in.integer("mask_id");
  p.ordinary = in.integer("ordinary");
  p.mask_threshold = static_cast<uint64_t>(in.integer("mask_threshold"));
  p.random_threshold = static_cast<uint64_t>(in.integer("random_threshold"));
  return metro::mask_tokens_cuda(p, nullptr);
}

METRO_ENTRY(replace_tokens) {
  return metro::replace_tokens_cuda(
      {in.data<int64_t>("tokens"), in.data<int64_t>("position"), in.data<int64_t>("target"),
       in.data<int64_t>("sample"), in.data<int64_t>("corrupted"), in.data<uint8_t>("label"),
       in.integer("length"), in.integer("count"), in.integer("pad_id")},
      nullptr);
}
