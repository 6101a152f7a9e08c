#include <cmath>

#include "common/cuda_glue.h"
#include "common/tensor_checks.h"
#include "corruption/corruption.h"

namespace metro {
namespace {

constexpr double kOne = 4294967296.0;  // 2^32, the scale of the thresholds

void check_ids(const char* op, const char* name, const Tensor& t, int64_t length,
               const Tensor& tokens) {
  check_shape(op, name, t, {length});
  check_dtype(op, name, t, ScalarType::Long);
  check_same_device(op, name, t, tokens, "tokens");
}

// The checks of values wait for no GPU: they are made for tensors on the CPU only.
void check_range(const char* op, const char* name, const Tensor& ids, int64_t vocab_size) {
  if (!ids.is_cpu()) return;
  const int64_t* values = data<int64_t>(ids);
  for (int64_t i = 0; i < ids.numel(); ++i) {
    METRO_CHECK(values[i] >= 0 && values[i] < vocab_size, op, name,
                " must lie in [0, vocab_size = ", vocab_size, "), found ", values[i], " at ", i);
  }
}

void check_ascending(const char* op, const char* name, const Tensor& ids) {
  if (!ids.is_cpu()) return;
  const int64_t* values = data<int64_t>(ids);
  for (int64_t i = 1; i < ids.numel(); ++i) {
    METRO_CHECK(values[i - 1] < values[i], op, name, " must be ascending and distinct, found ",
                values[i - 1], " before ", values[i]);
  }
}

struct Thresholds {
  uint64_t mask;
  uint64_t random;
};

Thresholds make_thresholds(const char* op, double mask_fraction, double random_fraction) {
  METRO_CHECK(mask_fraction >= 0.0 && mask_fraction <= 1.0, op,
              "mask_fraction must lie in [0, 1], found ", mask_fraction);
  METRO_CHECK(random_fraction >= 0.0 && random_fraction <= 1.0, op,
              "random_fraction must lie in [0, 1], found ", random_fraction);
  // Rounded before they are compared: 0.7 + 0.3 may be a little above 1.
  const double sum = std::floor((mask_fraction + random_fraction) * kOne + 0.5);
  METRO_CHECK(sum <= kOne, op, "mask_fraction + random_fraction must not exceed 1, found ",
              mask_fraction, " + ", random_fraction);
  return {static_cast<uint64_t>(mask_fraction * kOne + 0.5), static_cast<uint64_t>(sum)};
}

std::tuple<Tensor, Tensor, Tensor> mask_tokens(const Tensor& tokens_any, const Tensor& special_any,
                                               const Tensor& seed_any, int64_t count,
                                               int64_t mask_id, int64_t vocab_size,
                                               double mask_fraction, double random_fraction) {
  const char* op = "mask_tokens";
  check_ids(op, "tokens", tokens_any, -1, tokens_any);
  check_ids(op, "special", special_any, -1, tokens_any);
  check_seed(op, seed_any, tokens_any);
  METRO_CHECK(count >= 0, op, "count must not be negative, found ", count);
  METRO_CHECK(vocab_size >= 1 && vocab_size <= INT32_MAX, op,
              "vocab_size must lie in [1, 2^31), found ", vocab_size);
  METRO_CHECK(mask_id >= 0 && mask_id < vocab_size, op,
              "mask_id must lie in [0, vocab_size = ", vocab_size, "), found ", mask_id);
  const Thresholds thresholds = make_thresholds(op, mask_fraction, random_fraction);
  const Tensor tokens = torch::stable::contiguous(tokens_any);
  const Tensor special = torch::stable::contiguous(special_any);
  const Tensor seed = torch::stable::contiguous(seed_any);
  check_range(op, "tokens", tokens, vocab_size);
  check_range(op, "special", special, vocab_size);
  check_ascending(op, "special", special);
  const int64_t length = tokens.numel();
  const int64_t ordinary = vocab_size - special.numel();
  METRO_CHECK(ordinary >= 1 || random_fraction == 0.0, op, "random_fraction = ", random_fraction,
              " needs an id that is not special, found ", special.numel(),
              " special ids in a vocabulary of ", vocab_size);
  const Tensor masked = torch::stable::empty_like(tokens);
  const Tensor position = empty_on(tokens, {count}, ScalarType::Long);
  const Tensor target = empty_on(tokens, {count}, ScalarType::Long);
  const Tensor order = empty_on(tokens, {length}, ScalarType::Int);
  const Tensor maskable = empty_on(tokens, {length}, ScalarType::Byte);
  const MaskTokensParams p{data<int64_t>(tokens),
                           data<int64_t>(special),
                           data<int64_t>(seed),
                           mutable_data<int64_t>(masked),
                           mutable_data<int64_t>(position),
                           mutable_data<int64_t>(target),
                           mutable_data<uint32_t>(order),
                           mutable_data<uint8_t>(maskable),
                           length,
                           special.numel(),
                           count,
                           mask_id,
                           ordinary,
                           thresholds.mask,
                           thresholds.random};
  METRO_RUN(op, tokens, mask_tokens, p);
  return {masked, position, target};
}

void check_slots(const char* op, const Tensor& tokens, const Tensor& position,
                 const Tensor& target) {
  if (!tokens.is_cpu()) return;
  const int64_t length = tokens.numel();
  for (int64_t n = 0; n < position.numel(); ++n) {
    const int64_t at = data<int64_t>(position)[n], expected = data<int64_t>(target)[n];
    if (expected == kIgnoredTarget) continue;
    METRO_CHECK(at >= 0 && at < length, op, "position must lie in [0, ", length, "), found ", at,
                " at ", n);
    METRO_CHECK(data<int64_t>(tokens)[at] == expected, op,
                "tokens must be the original ones, which target holds: expected ", expected,
                " at position ", at, ", found ", data<int64_t>(tokens)[at]);
  }
}

std::tuple<Tensor, Tensor> replace_tokens(const Tensor& tokens_any, const Tensor& position_any,
                                          const Tensor& target_any, const Tensor& sample_any,
                                          int64_t pad_id) {
  const char* op = "replace_tokens";
  check_ids(op, "tokens", tokens_any, -1, tokens_any);
  check_ids(op, "position", position_any, -1, tokens_any);
  const int64_t count = position_any.numel();
  check_ids(op, "target", target_any, count, tokens_any);
  check_ids(op, "sample", sample_any, count, tokens_any);
  const Tensor tokens = torch::stable::contiguous(tokens_any);
  const Tensor position = torch::stable::contiguous(position_any);
  const Tensor target = torch::stable::contiguous(target_any);
  const Tensor sample = torch::stable::contiguous(sample_any);
  check_slots(op, tokens, position, target);
  const Tensor corrupted = torch::stable::empty_like(tokens);
  const Tensor label = empty_on(tokens, {tokens.numel()}, ScalarType::Byte);
  const ReplaceTokensParams p{data<int64_t>(tokens),
                              data<int64_t>(position),
                              data<int64_t>(target),
                              data<int64_t>(sample),
                              mutable_data<int64_t>(corrupted),
                              mutable_data<uint8_t>(label),
                              tokens.numel(),
                              count,
                              pad_id};
  METRO_RUN(op, tokens, replace_tokens, p);
  return {corrupted, label};
}

void register_ops(torch::stable::detail::StableLibrary& m) {
  m.impl("mask_tokens", TORCH_BOX(&mask_tokens));
  m.impl("replace_tokens", TORCH_BOX(&replace_tokens));
}

}  // namespace
}  // namespace metro

METRO_REGISTER(metro::register_ops)
