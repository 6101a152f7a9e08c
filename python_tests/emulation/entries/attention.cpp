#include "attention/attention.h"

#include "emulation/entry.h"

namespace {

metro::AttentionParams params(const metro::emulation::Arguments& in) {
  metro::AttentionParams p{};
  p.qkv = in.data("qkv");
  p.cu_seqlens = in.data<int32_t>("cu_seqlens");
  p.bias = in.data<float>("bias");
  p.seed = in.data<int64_t>("seed");
  p.out = in.data("out");
  p.lse = in.data<float>("lse");
  p.tokens = in.integer("tokens");
  p.sequences = in.integer("sequences");
  p.heads = in.integer("heads");
  p.head_dim = in.integer("head_dim");
  p.max_seqlen = in.integer("max_seqlen");
  p.p = in.real("p");
  p.draw = static_cast<uint32_t>(in.integer("draw"));
  p.dtype = in.dtype();
  return p;
}

}  // namespace

METRO_ENTRY(attention) { return metro::attention_cuda(params(in), nullptr); }

METRO_ENTRY(attention_backward) {
  metro::AttentionBackwardParams p{};
  p.forward = params(in);
  p.grad_out = in.data("grad_out");
  p.grad_qkv = in.data("grad_qkv");
  p.grad_bias = in.data<float>("grad_bias");
  p.bias_partials = in.data<float>("bias_partials");
  p.bias_rows = in.integer("bias_rows");
  p.delta = in.data<float>("delta");
  return metro::attention_backward_cuda(p, nullptr);
}

METRO_ENTRY(attention_shared_memory) {
  const metro::SharedMemory both[] = {metro::attention_shared_memory_cuda(params(in)),
                                      metro::attention_backward_shared_memory_cuda(params(in))};
  int64_t* bytes = in.data<int64_t>("bytes");  // [2, 2]: needed and available
  for (int i = 0; i < 2; ++i) {
    bytes[2 * i] = both[i].needed;
    bytes[2 * i + 1] = both[i].available;
  }
  return 0;
}
