#include <cmath>

#include "common/cuda_glue.h"
#include "common/tensor_checks.h"
#include "vocab_head/vocab_head.h"

namespace metro {
namespace {

struct Shape {
  int64_t rows;
  int64_t hidden;
  int64_t vocab;
};

// Of tensors on the CPU only: reading them on a GPU would wait for it.
void check_targets(const char* op, const Tensor& target, int64_t vocab) {
  if (!target.is_cpu()) return;
  const int64_t* ids = data<int64_t>(target);
  for (int64_t row = 0; row < target.numel(); ++row) {
    METRO_CHECK(ids[row] == kIgnoredTarget || (ids[row] >= 0 && ids[row] < vocab), op,
                "target must hold ids in [0, ", vocab, ") or -100 (ignored), found ", ids[row],
                " at row ", row);
  }
}

Shape check(const char* op, const Tensor& hidden, const Tensor& weight, const Tensor& bias,
            const Tensor& target) {
  check_floating(op, "hidden", hidden);
  check_shape(op, "hidden", hidden, {-1, -1});
  const int64_t rows = hidden.sizes()[0], width = hidden.sizes()[1];
  check_dtype(op, "weight", weight, hidden.scalar_type());
  check_shape(op, "weight", weight, {-1, width});
  const int64_t vocab = weight.sizes()[0];
  METRO_CHECK(vocab > 0, op, "weight must have at least one row, found ", shape_string(weight));
  check_dtype(op, "bias", bias, ScalarType::Float);
  check_shape(op, "bias", bias, {vocab});
  check_dtype(op, "target", target, ScalarType::Long);
  check_shape(op, "target", target, {rows});
  check_same_device(op, "weight", weight, hidden, "hidden");
  check_same_device(op, "bias", bias, hidden, "hidden");
  check_same_device(op, "target", target, hidden, "hidden");
  return {rows, width, vocab};
}

int64_t tile_for(const Tensor& hidden, const Shape& shape) {
  return hidden.is_cuda() ? vocab_head_cuda_tile(shape.rows, shape.vocab, hidden.element_size())
                          : vocab_head_tile(shape.rows, shape.vocab);
}

// out = a·b by torch's own product; `out` has the right shape, dtype and layout.
void matmul_into(Tensor out, const Tensor& a, const Tensor& b) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(a), torch::stable::detail::from(b),
                                    torch::stable::detail::from(out)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);  // takes over the reference that is returned
}

// `a` contiguous and cut off from autograd, which forbids products written into given memory.
Tensor plain(const Tensor& a) {
  std::array<StableIValue, 1> stack{torch::stable::detail::from(torch::stable::contiguous(a))};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::detach", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

Tensor rows_of(Tensor matrix, int64_t begin, int64_t count) {
  return torch::stable::narrow(matrix, 0, begin, count);
}

// The first rows · cols elements of a flat buffer as a contiguous matrix.
Tensor matrix_in(const Tensor& buffer, int64_t rows, int64_t cols) {
  const int64_t sizes[] = {rows, cols};
  return torch::stable::view(rows_of(buffer, 0, rows * cols),
                             torch::headeronly::IntHeaderOnlyArrayRef(sizes, 2));
}

std::tuple<Tensor, Tensor, Tensor, Tensor> vocab_head(
    const Tensor& hidden_any, const Tensor& weight_any, const Tensor& bias_any,
    const Tensor& target_any, const std::optional<Tensor>& seed, double temperature, int64_t draw) {
  const char* op = "vocab_head";
  const Shape shape = check(op, hidden_any, weight_any, bias_any, target_any);
  METRO_CHECK(temperature > 0 && std::isfinite(temperature), op,
              "temperature must be positive and finite, found ", temperature);
  if (seed) check_seed(op, *seed, hidden_any);
  const Tensor hidden = plain(hidden_any), weight = plain(weight_any);
  const Tensor bias = plain(bias_any), target = plain(target_any);
  check_targets(op, target, shape.vocab);

  const Tensor nll = empty_on(hidden, {shape.rows}, ScalarType::Float);
  const Tensor lse = empty_on(hidden, {shape.rows}, ScalarType::Float);
  const Tensor hit = empty_on(hidden, {shape.rows}, ScalarType::Byte);
  const Tensor sample = empty_on(hidden, {seed ? shape.rows : 0}, ScalarType::Long);
  if (shape.rows == 0) return {nll, lse, hit, sample};

  const int64_t tile = tile_for(hidden, shape);
  const Tensor buffer = empty_on(hidden, {shape.rows * tile}, hidden.scalar_type());
  const Tensor state =
      empty_on(hidden, {shape.rows, static_cast<int64_t>(sizeof(VocabRow) / 8)}, ScalarType::Long);
  VocabHeadTileParams p{};
  p.bias = data<float>(bias);
  p.target = data<int64_t>(target);
  p.seed = seed ? data<int64_t>(*seed) : nullptr;
  p.state = static_cast<VocabRow*>(state.mutable_data_ptr());
  p.nll = mutable_data<float>(nll);
  p.lse = mutable_data<float>(lse);
  p.hit = mutable_data<uint8_t>(hit);
  p.sample = mutable_data<int64_t>(sample);
  p.rows = shape.rows;
  p.vocab = shape.vocab;
  p.inverse_temperature = static_cast<float>(1.0 / temperature);
  p.draw = static_cast<uint32_t>(draw);
  p.dtype = dtype_of(hidden);
  for (p.begin = 0; p.begin < shape.vocab; p.begin += tile) {
    p.cols = std::min(tile, shape.vocab - p.begin);
    const Tensor logits = matrix_in(buffer, shape.rows, p.cols);
    const Tensor weight_tile = rows_of(weight, p.begin, p.cols);
    matmul_into(logits, hidden, torch::stable::transpose(weight_tile, 0, 1));
    p.logits = logits.const_data_ptr();
    METRO_RUN(op, hidden, vocab_head_tile_pass, p);
  }
  return {nll, lse, hit, sample};
}

std::tuple<Tensor, Tensor, Tensor> vocab_head_backward(
    const Tensor& grad_any, const Tensor& lse_any, const Tensor& hidden_any,
    const Tensor& weight_any, const Tensor& bias_any, const Tensor& target_any) {
  const char* op = "vocab_head_backward";
  const Shape shape = check(op, hidden_any, weight_any, bias_any, target_any);
  for (const auto& [name, tensor] : {std::pair<const char*, const Tensor&>{"grad_nll", grad_any},
                                     std::pair<const char*, const Tensor&>{"lse", lse_any}}) {
    check_dtype(op, name, tensor, ScalarType::Float);
    check_shape(op, name, tensor, {shape.rows});
    check_same_device(op, name, tensor, hidden_any, "hidden");
  }
  const Tensor grad_nll = plain(grad_any), lse = plain(lse_any);
  const Tensor hidden = plain(hidden_any), weight = plain(weight_any);
  const Tensor bias = plain(bias_any), target = plain(target_any);
  check_targets(op, target, shape.vocab);

  Tensor grad_hidden = torch::stable::empty_like(hidden);
  Tensor grad_weight = torch::stable::empty_like(weight);
  Tensor grad_bias = torch::stable::empty_like(bias);
  if (shape.rows == 0) {
    return {grad_hidden, torch::stable::zero_(grad_weight), torch::stable::zero_(grad_bias)};
  }

  const int64_t tile = tile_for(hidden, shape);
  const Tensor buffer = empty_on(hidden, {shape.rows * tile}, hidden.scalar_type());
  const Tensor product = torch::stable::empty_like(hidden);
  const int64_t blocks = hidden.is_cuda() ? vocab_head_row_blocks(shape.rows) : 0;
  const Tensor partials = empty_on(hidden, {blocks, tile}, ScalarType::Float);
  const bool is_float = hidden.scalar_type() == ScalarType::Float;
  const Tensor sum =
      is_float ? grad_hidden : empty_on(hidden, {shape.rows, shape.hidden}, ScalarType::Float);
  VocabHeadGradParams p{};
  p.grad_nll = data<float>(grad_nll);
  p.lse = data<float>(lse);
  p.bias = data<float>(bias);
  p.target = data<int64_t>(target);
  p.grad_bias = mutable_data<float>(grad_bias);
  p.partials = mutable_data<float>(partials);
  p.rows = shape.rows;
  p.dtype = dtype_of(hidden);
  for (p.begin = 0; p.begin < shape.vocab; p.begin += tile) {
    p.cols = std::min(tile, shape.vocab - p.begin);
    const Tensor logits = matrix_in(buffer, shape.rows, p.cols);
    const Tensor weight_tile = rows_of(weight, p.begin, p.cols);
    matmul_into(logits, hidden, torch::stable::transpose(weight_tile, 0, 1));
    p.logits = logits.mutable_data_ptr();
    METRO_RUN(op, hidden, vocab_head_grad_tile, p);
    matmul_into(rows_of(grad_weight, p.begin, p.cols), torch::stable::transpose(logits, 0, 1),
                hidden);
    matmul_into(product, logits, weight_tile);
    const VocabHeadAccumulateParams add{product.const_data_ptr(),
                                        mutable_data<float>(sum),
                                        grad_hidden.mutable_data_ptr(),
                                        shape.rows * shape.hidden,
                                        p.begin == 0,
                                        p.begin + p.cols == shape.vocab,
                                        p.dtype};
    METRO_RUN(op, hidden, vocab_head_accumulate, add);
  }
  return {grad_hidden, grad_weight, grad_bias};
}

void register_ops(torch::stable::detail::StableLibrary& m) {
  m.impl("vocab_head", TORCH_BOX(&vocab_head));
  m.impl("vocab_head_backward", TORCH_BOX(&vocab_head_backward));
}

}  // namespace
}  // namespace metro

METRO_REGISTER(metro::register_ops)
