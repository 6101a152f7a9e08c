#include <algorithm>
#include <vector>

#include "attention/attention.h"
#include "common/cuda_glue.h"
#include "common/parallel.h"
#include "common/tensor_checks.h"

namespace metro {
namespace {

using OptionalTensor = std::optional<Tensor>;

struct Arguments {
  Tensor qkv;
  Tensor cu_seqlens;
  OptionalTensor bias;
  OptionalTensor seed;
  AttentionParams params;  // all but the outputs and the schedule
};

Arguments check(const char* op, const Tensor& qkv, const Tensor& cu_seqlens,
                const OptionalTensor& bias, int64_t max_seqlen, const OptionalTensor& seed,
                double p, int64_t draw) {
  check_floating(op, "qkv", qkv);
  check_shape(op, "qkv", qkv, {-1, 3, -1, -1});
  const auto sizes = qkv.sizes();
  const int64_t tokens = sizes[0], heads = sizes[2], head_dim = sizes[3];
  METRO_CHECK(tokens <= INT32_MAX, op, "qkv must hold at most 2^31 - 1 tokens, found ", tokens);
  METRO_CHECK(!qkv.is_cuda() || heads <= 65535, op,
              "qkv must have at most 65535 heads on CUDA, found ", heads);
  METRO_CHECK(head_dim > 0 && head_dim % 8 == 0 && head_dim <= kAttentionMaxHeadDim, op,
              "the head dimension must be a multiple of 8 up to ", kAttentionMaxHeadDim, ", found ",
              head_dim);
  check_dtype(op, "cu_seqlens", cu_seqlens, ScalarType::Int);
  METRO_CHECK(cu_seqlens.dim() == 1 && cu_seqlens.numel() >= 1, op,
              "cu_seqlens must have shape [sequences + 1], found ", shape_string(cu_seqlens));
  METRO_CHECK(cu_seqlens.numel() <= INT32_MAX / 2, op,
              "cu_seqlens must hold at most 2^30 - 1 boundaries, found ", cu_seqlens.numel());
  check_same_device(op, "cu_seqlens", cu_seqlens, qkv, "qkv");
  METRO_CHECK(max_seqlen >= 1 && max_seqlen <= INT32_MAX / 2, op,
              "max_seqlen must be between 1 and 2^30 - 1, found ", max_seqlen);
  METRO_CHECK(p >= 0.0 && p <= 1.0, op, "p must be between 0 and 1, found ", p);
  METRO_CHECK(draw >= 0 && draw < (1 << 24), op, "draw must be between 0 and 2^24 - 1, found ",
              draw);
  METRO_CHECK(p == 0.0 || seed.has_value(), op, "dropout needs a seed, found None with p = ", p);
  Arguments a{contiguous_aligned(qkv), torch::stable::contiguous(cu_seqlens), {}, seed, {}};
  if (bias.has_value()) {
    check_shape(op, "bias", *bias, {heads, 2 * max_seqlen - 1});
    check_dtype(op, "bias", *bias, ScalarType::Float);
    check_same_device(op, "bias", *bias, qkv, "qkv");
    a.bias = torch::stable::contiguous(*bias);
  }
  if (p > 0.0) check_seed(op, *seed, qkv);
  a.params.qkv = a.qkv.const_data_ptr();
  a.params.cu_seqlens = data<int32_t>(a.cu_seqlens);
  a.params.bias = a.bias.has_value() ? data<float>(*a.bias) : nullptr;
  a.params.seed = p > 0.0 ? data<int64_t>(*seed) : nullptr;
  a.params.tokens = tokens;
  a.params.sequences = cu_seqlens.numel() - 1;
  a.params.heads = heads;
  a.params.head_dim = head_dim;
  a.params.max_seqlen = max_seqlen;
  a.params.p = p;
  a.params.draw = static_cast<uint32_t>(draw);
  a.params.dtype = dtype_of(qkv);
  return a;
}

// On the CPU the boundaries can be read without waiting, so they are checked.
void check_boundaries(const char* op, const AttentionParams& p) {
  const int32_t* at = p.cu_seqlens;
  METRO_CHECK(at[0] == 0, op, "cu_seqlens must begin with 0, found ", at[0]);
  for (int64_t s = 0; s < p.sequences; ++s) {
    METRO_CHECK(at[s] <= at[s + 1], op, "cu_seqlens must not decrease, found ", at[s], " then ",
                at[s + 1], " at index ", s);
    METRO_CHECK(at[s + 1] - at[s] <= p.max_seqlen, op, "sequence ", s, " has ", at[s + 1] - at[s],
                " tokens, more than max_seqlen = ", p.max_seqlen);
  }
  METRO_CHECK(at[p.sequences] == p.tokens, op, "cu_seqlens must end with the ", p.tokens,
              " tokens of qkv, found ", at[p.sequences]);
}

// The order of work and the memory of the CPU kernels; keeps what the parameters point to alive.
struct Schedule {
  std::vector<int32_t> order;
  std::optional<Tensor> scratch;

  Schedule(const char* op, const Tensor& reference, bool backward, AttentionParams* p) {
    if (!reference.is_cpu()) return;
    check_boundaries(op, *p);
    const int32_t* at = p->cu_seqlens;
    const auto length = [at](int32_t s) { return at[s + 1] - at[s]; };
    for (int32_t s = 0; s < p->sequences; ++s) {
      if (length(s) > 0) order.push_back(s);
    }
    std::stable_sort(order.begin(), order.end(),
                     [&](int32_t a, int32_t b) { return length(a) > length(b); });
    p->order = order.data();
    p->active = static_cast<int64_t>(order.size());
    p->longest = order.empty() ? 0 : length(order[0]);
    p->workers = std::min(num_threads(), p->active * p->heads);
    const int64_t bytes = attention_scratch(p->longest, p->head_dim, backward);
    scratch = empty_on(reference, {p->workers * bytes}, ScalarType::Byte);
    p->scratch = scratch->mutable_data_ptr();
  }
};

#ifdef METRO_WITH_CUDA
template <SharedMemory (*kernels)(const AttentionParams&)>
void check_shared_memory(const char* op, const Tensor& qkv, const AttentionParams& p) {
  if (!qkv.is_cuda()) return;
  const torch::stable::accelerator::DeviceGuard guard(qkv.get_device_index());
  const SharedMemory memory = kernels(p);
  METRO_CHECK(memory.needed <= memory.available, op, "a head dimension of ", p.head_dim, " in ",
              dtype_name(qkv.scalar_type()), " needs ", memory.needed,
              " bytes of shared memory a block, and this device has ", memory.available,
              ": use bfloat16 or float16, or smaller heads");
}
#define METRO_CHECK_SHARED_MEMORY(op, qkv, family, p) \
  check_shared_memory<family##_shared_memory_cuda>(op, qkv, p)
#else
#define METRO_CHECK_SHARED_MEMORY(op, qkv, family, p)
#endif

std::tuple<Tensor, Tensor> attention(const Tensor& qkv, const Tensor& cu_seqlens,
                                     const OptionalTensor& bias, int64_t max_seqlen,
                                     const OptionalTensor& seed, double p, int64_t draw) {
  const char* op = "attention";
  Arguments a = check(op, qkv, cu_seqlens, bias, max_seqlen, seed, p, draw);
  AttentionParams& params = a.params;
  const Tensor out =
      empty_on(a.qkv, {params.tokens, params.heads, params.head_dim}, a.qkv.scalar_type());
  const Tensor lse = empty_on(a.qkv, {params.heads, params.tokens}, ScalarType::Float);
  params.out = out.mutable_data_ptr();
  params.lse = mutable_data<float>(lse);
  const Schedule schedule(op, a.qkv, false, &params);
  METRO_CHECK_SHARED_MEMORY(op, a.qkv, attention, params);
  METRO_RUN(op, a.qkv, attention, params);
  return {out, lse};
}

void check_saved(const char* op, const char* name, const Tensor& t, const Arguments& a) {
  check_shape(op, name, t, {a.params.tokens, a.params.heads, a.params.head_dim});
  check_dtype(op, name, t, a.qkv.scalar_type());
  check_same_device(op, name, t, a.qkv, "qkv");
}

std::tuple<Tensor, Tensor> attention_backward(const Tensor& grad_any, const Tensor& qkv,
                                              const Tensor& out_any, const Tensor& lse_any,
                                              const Tensor& cu_seqlens, const OptionalTensor& bias,
                                              int64_t max_seqlen, const OptionalTensor& seed,
                                              double p, int64_t draw) {
  const char* op = "attention_backward";
  Arguments a = check(op, qkv, cu_seqlens, bias, max_seqlen, seed, p, draw);
  check_saved(op, "grad_out", grad_any, a);
  check_saved(op, "out", out_any, a);
  check_shape(op, "lse", lse_any, {a.params.heads, a.params.tokens});
  check_dtype(op, "lse", lse_any, ScalarType::Float);
  check_same_device(op, "lse", lse_any, a.qkv, "qkv");
  const Tensor grad_out = contiguous_aligned(grad_any);
  const Tensor out = contiguous_aligned(out_any);
  const Tensor lse = torch::stable::contiguous(lse_any);
  a.params.out = const_cast<void*>(out.const_data_ptr());
  a.params.lse = const_cast<float*>(data<float>(lse));
  const bool with_bias = a.bias.has_value();
  const Tensor grad_qkv = torch::stable::empty_like(a.qkv);
  const Tensor grad_bias =
      with_bias ? torch::stable::empty_like(*a.bias) : empty_on(a.qkv, {0}, ScalarType::Float);
  const bool cuda = a.qkv.is_cuda();
  const int64_t bias_rows = cuda && with_bias ? attention_bias_rows(a.params) : 0;
  const int64_t partial = cuda ? bias_rows * (2 * max_seqlen - 1) : 2 * a.params.tokens;
  const Tensor partials =
      empty_on(a.qkv, {a.params.heads, with_bias ? partial : 0}, ScalarType::Float);
  const Tensor delta =
      empty_on(a.qkv, {a.params.heads, cuda ? a.params.tokens : 0}, ScalarType::Float);
  const Schedule schedule(op, a.qkv, true, &a.params);
  METRO_CHECK_SHARED_MEMORY(op, a.qkv, attention_backward, a.params);
  const AttentionBackwardParams params{a.params,
                                       grad_out.const_data_ptr(),
                                       grad_qkv.mutable_data_ptr(),
                                       mutable_data<float>(grad_bias),
                                       mutable_data<float>(partials),
                                       bias_rows,
                                       mutable_data<float>(delta)};
  METRO_RUN(op, a.qkv, attention_backward, params);
  return {grad_qkv, grad_bias};
}

void register_ops(torch::stable::detail::StableLibrary& m) {
  m.impl("attention", TORCH_BOX(&attention));
  m.impl("attention_backward", TORCH_BOX(&attention_backward));
}

}  // namespace
}  // namespace metro

METRO_REGISTER(metro::register_ops)
