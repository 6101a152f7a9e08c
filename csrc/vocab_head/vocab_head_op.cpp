#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "common/cuda_glue.h"
#include "common/tensor_checks.h"
#include "vocab_head/vocab_head.h"

#ifdef METRO_WITH_CUDA
// Weak, as in common/cuda_glue.h.
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_cuda_addmm_out(AtenTensorHandle out, AtenTensorHandle self, AtenTensorHandle mat1,
                          AtenTensorHandle mat2, double beta, double alpha);
#endif

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
  METRO_CHECK(width > 0, op, "hidden must have at least one column, found ", shape_string(hidden));
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

// `a` contiguous and cut off from autograd, which forbids products written into given memory.
Tensor plain(const Tensor& a) {
  std::array<StableIValue, 1> stack{torch::stable::detail::from(torch::stable::contiguous(a))};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::detach", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// ---- Chunks of rows ----

// A chunk's logits on the CPU: few enough (16 MB in bf16) to be no burden beside inputs and
// gradients, enough rows that reading the weight and adding to its gradient, once a chunk, cost
// little beside the products: 2 · rows FLOPs for each number of the weight that is read.
constexpr int64_t kChunkElements = int64_t{8} << 20;
constexpr int64_t kMinChunkRows = 64;
constexpr int64_t kMaxChunkRows = 1024;
// On CUDA (512 MB in 16 bits): see vocab_head_rows_cuda.cu.
constexpr int64_t kCudaChunkElements = int64_t{256} << 20;
constexpr int64_t kCudaRowAlignment = 128;

int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

int64_t chunk_rows(const Tensor& hidden, const Shape& shape) {
  const bool on_cuda = hidden.is_cuda();
  int64_t most = on_cuda ? std::max<int64_t>(kCudaChunkElements / shape.vocab, 1)
                         : std::clamp(kChunkElements / shape.vocab, kMinChunkRows, kMaxChunkRows);
  most = std::max(most, (shape.rows + kMaxChunks - 1) / kMaxChunks);
  const int64_t chunks = (shape.rows + most - 1) / most;  // of nearly equal size
  const int64_t rows = (shape.rows + chunks - 1) / chunks;
  return std::min(round_up(rows, on_cuda ? kCudaRowAlignment : kRowAlignment), shape.rows);
}

// Memory in pieces that begin on 64-byte boundaries.
class Scratch {
 public:
  void add(void** piece, int64_t bytes) {
    pieces_.push_back({piece, size_});
    size_ += round_up(bytes, 64);
  }
  Tensor allocate(const Tensor& like) {
    const Tensor memory = empty_on(like, {size_ + 64}, ScalarType::Byte);
    const auto address = reinterpret_cast<uintptr_t>(memory.mutable_data_ptr());
    for (const auto& [piece, offset] : pieces_) {
      *piece = reinterpret_cast<void*>((address + 63) / 64 * 64 + static_cast<uintptr_t>(offset));
    }
    return memory;
  }

 private:
  std::vector<std::pair<void**, int64_t>> pieces_;
  int64_t size_ = 0;
};

// ---- The operator on either device, arguments checked, contiguous and without autograd ----

struct Arguments {
  const char* op;
  Shape shape;
  Tensor hidden;
  Tensor weight;
  Tensor bias;
  Tensor target;
  std::optional<Tensor> seed;
  float inverse_temperature;
  uint32_t draw;
};

struct Results {
  Tensor nll;
  Tensor lse;
  Tensor hit;
  Tensor sample;
};

struct Gradients {
  Tensor scale;  // f32 [1]
  Tensor weight;
  bool accumulate;
  Tensor hidden;
  Tensor bias;
};

Arguments check_arguments(const char* op, const Tensor& hidden, const Tensor& weight,
                          const Tensor& bias, const Tensor& target,
                          const std::optional<Tensor>& seed, double temperature, int64_t draw) {
  const Shape shape = check(op, hidden, weight, bias, target);
  METRO_CHECK(temperature > 0 && std::isfinite(temperature), op,
              "temperature must be positive and finite, found ", temperature);
  METRO_CHECK(draw >= 0 && draw < (1 << 24), op, "draw must be between 0 and 2^24 - 1, found ",
              draw);
  if (seed) check_seed(op, *seed, hidden);
  const Tensor plain_target = plain(target);
  check_targets(op, plain_target, shape.vocab);
  return {op,
          shape,
          plain(hidden),
          plain(weight),
          plain(bias),
          plain_target,
          seed,
          static_cast<float>(1.0 / temperature),
          static_cast<uint32_t>(draw)};
}

Results make_results(const Arguments& a) {
  const int64_t rows = a.shape.rows;
  return {empty_on(a.hidden, {rows}, ScalarType::Float),
          empty_on(a.hidden, {rows}, ScalarType::Float),
          empty_on(a.hidden, {rows}, ScalarType::Byte),
          empty_on(a.hidden, {a.seed ? rows : 0}, ScalarType::Long)};
}

// The widest panel of the CPU kernels (panel_gemm.h), and bytes of the logits' gradient that are
// packed at a time: with what else a thread reads they stay in the last-level cache.
constexpr int64_t kWidestPanel = 64;
constexpr int64_t kBlockBytes = int64_t{2} << 20;

Tensor make_workspace(const Arguments& a, bool gradients, VocabHeadParams* p) {
  VocabHeadWorkspace& work = p->work;
  const int64_t rows = round_up(p->chunk_rows, kRowAlignment), vocab = a.shape.vocab;
  const int64_t tiles = (vocab + kSampleTile - 1) / kSampleTile;
  const int64_t panel_rows = round_up(rows, kWidestPanel);
  const int64_t panel_width = round_up(a.shape.hidden, kWidestPanel);
  const int64_t element = a.hidden.element_size();
  work.row_stride = rows;
  const int64_t fitting = std::clamp<int64_t>(kBlockBytes / (kSampleTile * rows * element), 4, 16);
  work.block_tiles = std::min(fitting, tiles);
  Scratch scratch;
  scratch.add(&work.logits, (vocab + 1) * rows * element);
  scratch.add(reinterpret_cast<void**>(&work.tiles), tiles * kTileFigures * rows * 4);
  scratch.add(&work.hidden_columns, panel_rows * (a.shape.hidden + 1) * 4);
  if (gradients) {
    scratch.add(&work.hidden_rows, panel_width * rows * 4);
    scratch.add(&work.grad_units, work.block_tiles * kSampleTile * rows * 4);
    scratch.add(reinterpret_cast<void**>(&work.grad_hidden), panel_width * rows * 4);
    scratch.add(reinterpret_cast<void**>(&work.row_lse), rows * 4);
    scratch.add(reinterpret_cast<void**>(&work.row_target), rows * 4);
  }
  return scratch.allocate(a.hidden);
}

void run_cpu(const Arguments& a, const Results& r, const Gradients* g) {
  VocabHeadParams p{};
  p.hidden = a.hidden.const_data_ptr();
  p.weight = a.weight.const_data_ptr();
  p.bias = data<float>(a.bias);
  p.target = data<int64_t>(a.target);
  p.seed = a.seed ? data<int64_t>(*a.seed) : nullptr;
  p.nll = mutable_data<float>(r.nll);
  p.lse = mutable_data<float>(r.lse);
  p.hit = mutable_data<uint8_t>(r.hit);
  p.sample = mutable_data<int64_t>(r.sample);
  if (g != nullptr) {
    p.scale = data<float>(g->scale);
    p.grad_hidden = g->hidden.mutable_data_ptr();
    p.grad_weight = g->weight.mutable_data_ptr();
    p.grad_bias = mutable_data<float>(g->bias);
    p.accumulate = g->accumulate;
  }
  p.rows = a.shape.rows;
  p.width = a.shape.hidden;
  p.vocab = a.shape.vocab;
  p.chunk_rows = chunk_rows(a.hidden, a.shape);
  p.inverse_temperature = a.inverse_temperature;
  p.draw = a.draw;
  p.dtype = dtype_of(a.hidden);
  const Tensor memory = make_workspace(a, g != nullptr, &p);
  METRO_RUN_CPU(a.op, a.hidden, vocab_head, p);
}

#ifdef METRO_WITH_CUDA
Tensor rows_of(Tensor matrix, int64_t begin, int64_t count) {
  return torch::stable::narrow(matrix, 0, begin, count);
}

// out = a·b by torch's own product; `out` has the right shape, dtype and layout.
void matmul_into(Tensor out, const Tensor& a, const Tensor& b) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(a), torch::stable::detail::from(b),
                                    torch::stable::detail::from(out)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);  // takes over the reference that is returned
}

// out = or += aᵀ·b.
void transposed_product(const char* op, Tensor out, const Tensor& a, const Tensor& b, bool add) {
  const Tensor left = torch::stable::transpose(a, 0, 1);
  if (!add) return matmul_into(out, left, b);
  METRO_CHECK(aoti_torch_cuda_addmm_out != nullptr, op,
              "the torch that is loaded lacks aoti_torch_cuda_addmm_out");
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_cuda_addmm_out(out.get(), out.get(), left.get(), b.get(), 1.0, 1.0));
}

// Rows [first, first + rows), whose logits go into `logits` [rows, vocab].
void run_cuda_chunk(const Arguments& a, const Results& r, const Gradients* g, const Tensor& logits,
                    const Tensor& partials, int64_t first, int64_t rows) {
  void* stream = current_stream(a.op, a.hidden);
  const Tensor hidden = rows_of(a.hidden, first, rows);
  const Tensor target = rows_of(a.target, first, rows), lse = rows_of(r.lse, first, rows);
  matmul_into(logits, hidden, torch::stable::transpose(a.weight, 0, 1));
  VocabHeadRowsParams p{};
  p.logits = logits.const_data_ptr();
  p.bias = data<float>(a.bias);
  p.target = data<int64_t>(target);
  p.seed = a.seed ? data<int64_t>(*a.seed) : nullptr;
  p.nll = mutable_data<float>(r.nll) + first;
  p.lse = mutable_data<float>(lse);
  p.hit = mutable_data<uint8_t>(r.hit) + first;
  p.sample = a.seed ? mutable_data<int64_t>(r.sample) + first : nullptr;
  p.rows = rows;
  p.first_row = first;
  p.vocab = a.shape.vocab;
  p.inverse_temperature = a.inverse_temperature;
  p.draw = a.draw;
  p.dtype = dtype_of(a.hidden);
  check_cuda(a.op, vocab_head_rows_cuda(p, stream));
  if (g == nullptr) return;
  const VocabHeadGradParams q{logits.mutable_data_ptr(),
                              data<float>(g->scale),
                              p.lse,
                              p.bias,
                              p.target,
                              mutable_data<float>(g->bias),
                              mutable_data<float>(partials),
                              rows,
                              p.vocab,
                              first > 0,
                              p.dtype};
  check_cuda(a.op, vocab_head_grad_cuda(q, stream));
  transposed_product(a.op, g->weight, logits, hidden, g->accumulate || first > 0);
  matmul_into(rows_of(g->hidden, first, rows), logits, a.weight);
}

void run_cuda(const Arguments& a, const Results& r, const Gradients* g) {
  const torch::stable::accelerator::DeviceGuard guard(a.hidden.get_device_index());
  const int64_t most = chunk_rows(a.hidden, a.shape), vocab = a.shape.vocab;
  const Tensor buffer = empty_on(a.hidden, {most, vocab}, a.hidden.scalar_type());
  const int64_t blocks = g != nullptr ? vocab_head_row_blocks(most) : 0;
  const Tensor partials = empty_on(a.hidden, {blocks, vocab}, ScalarType::Float);
  for (int64_t first = 0; first < a.shape.rows; first += most) {
    const int64_t rows = std::min(most, a.shape.rows - first);
    run_cuda_chunk(a, r, g, rows_of(buffer, 0, rows), partials, first, rows);
  }
}
#endif

void run(const Arguments& a, const Results& r, const Gradients* g) {
  if (!a.hidden.is_cuda()) return run_cpu(a, r, g);
#ifdef METRO_WITH_CUDA
  run_cuda(a, r, g);
#else
  fail_no_cuda(a.op);
#endif
}

std::tuple<Tensor, Tensor, Tensor, Tensor> vocab_head(const Tensor& hidden, const Tensor& weight,
                                                      const Tensor& bias, const Tensor& target,
                                                      const std::optional<Tensor>& seed,
                                                      double temperature, int64_t draw) {
  const Arguments a =
      check_arguments("vocab_head", hidden, weight, bias, target, seed, temperature, draw);
  const Results r = make_results(a);
  if (a.shape.rows > 0) run(a, r, nullptr);
  return {r.nll, r.lse, r.hit, r.sample};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> vocab_head_gradients(
    const Tensor& hidden, const Tensor& weight, const Tensor& bias, const Tensor& target,
    const std::optional<Tensor>& seed, double temperature, int64_t draw, const Tensor& scale,
    Tensor grad_weight, bool accumulate) {
  const char* op = "vocab_head_gradients";
  const Arguments a = check_arguments(op, hidden, weight, bias, target, seed, temperature, draw);
  check_dtype(op, "scale", scale, ScalarType::Float);
  METRO_CHECK(scale.numel() == 1, op, "scale must hold one number, found shape ",
              shape_string(scale));
  check_same_device(op, "scale", scale, hidden, "hidden");
  check_dtype(op, "grad_weight", grad_weight, weight.scalar_type());
  check_shape(op, "grad_weight", grad_weight, {a.shape.vocab, a.shape.hidden});
  check_same_device(op, "grad_weight", grad_weight, hidden, "hidden");
  METRO_CHECK(grad_weight.is_contiguous(), op, "grad_weight must be contiguous");
  const Results r = make_results(a);
  const Gradients g{scale, grad_weight, accumulate, torch::stable::empty_like(a.hidden),
                    torch::stable::empty_like(a.bias)};
  if (a.shape.rows > 0) {
    run(a, r, &g);
  } else {
    Tensor weight_part = grad_weight, bias_part = g.bias;
    if (!accumulate) torch::stable::zero_(weight_part);
    torch::stable::zero_(bias_part);
  }
  return {r.nll, r.lse, r.hit, r.sample, g.hidden, g.bias};
}

void register_ops(torch::stable::detail::StableLibrary& m) {
  m.impl("vocab_head", TORCH_BOX(&vocab_head));
  m.impl("vocab_head_gradients", TORCH_BOX(&vocab_head_gradients));
}

}  // namespace
}  // namespace metro

METRO_REGISTER(metro::register_ops)
