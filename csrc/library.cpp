// Every operator of torch.ops.metro on one page, and the module metro_ext._C.
//
// Conventions: T tokens of a packed batch, H hidden, V vocabulary, N masked positions, S sequences.
// "act" is the activation type: float32, bfloat16, or float16 on CUDA. Vectors of parameters
// (biases, norm weights) and statistics are float32. A seed is one int64 on the device of the data;
// `draw` tells apart the draws that share a seed (one per place in the model).
// Fake kernels and autograd formulas are registered from Python, in metro_ext/ops.

#include <pybind11/pybind11.h>
#include <torch/csrc/stable/library.h>

#include "common/cpu_isa.h"

STABLE_TORCH_LIBRARY(metro, m) {
  // GELU(x + bias), exact. x act [..., F], bias f32 [F] -> act [..., F].
  m.def("bias_gelu(Tensor x, Tensor bias) -> Tensor");
  // -> grad_x like x, grad_bias f32 [F].
  m.def("bias_gelu_backward(Tensor grad_out, Tensor x, Tensor bias) -> (Tensor, Tensor)");
  // The same with grad_x written over a contiguous grad_out. -> grad_bias.
  m.def("bias_gelu_backward_(Tensor(a!) grad_out, Tensor x, Tensor bias) -> Tensor");

  // LayerNorm(residual + dropout(x + bias)). x, residual act [..., H]; bias, weight, shift f32 [H].
  // With p = 0 the seed is not read and may be None; so may bias and residual.
  // -> out act [..., H], sum act [..., H] (the input of the norm), mean f32 [rows], rstd f32
  // [rows].
  m.def(
      "layer_norm(Tensor x, Tensor? bias, Tensor? residual, Tensor weight, Tensor shift, "
      "Tensor? seed, float p, int draw, float eps) -> (Tensor, Tensor, Tensor, Tensor)");
  // -> grad_x, grad_residual (act; the same values when p = 0), grad_bias, grad_weight, grad_shift
  // (f32 [H]).
  m.def(
      "layer_norm_backward(Tensor grad_out, Tensor sum, Tensor mean, Tensor rstd, Tensor weight, "
      "Tensor? seed, float p, int draw) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");

  // Softmax attention within each packed sequence: qkv act [T, 3, heads, d], cu_seqlens int32
  // [S + 1] (repeated values are empty sequences), score(i, j) = q·k/√d + bias[head, j - i + L - 1]
  // with bias f32 [heads, 2 L - 1] or None and L = max_seqlen; dropout p on the probabilities.
  // -> out act [T, heads, d], lse f32 [heads, T].
  m.def(
      "attention(Tensor qkv, Tensor cu_seqlens, Tensor? bias, int max_seqlen, Tensor? seed, "
      "float p, int draw) -> (Tensor, Tensor)");
  // -> grad_qkv like qkv, grad_bias f32 [heads, 2 L - 1] (empty when bias is None).
  m.def(
      "attention_backward(Tensor grad_out, Tensor qkv, Tensor out, Tensor lse, Tensor cu_seqlens, "
      "Tensor? bias, int max_seqlen, Tensor? seed, float p, int draw) -> (Tensor, Tensor)");

  // Logits hidden·weightᵀ + bias, never held whole: hidden act [N, H], weight act [V, H], bias f32
  // [V], target int64 [N] (-100: row ignored). With a seed one token a row is drawn from
  // softmax(logits / temperature).
  // -> nll f32 [N] (0 where ignored), lse f32 [N], hit uint8 [N] (argmax == target), sample int64
  // [N] (empty without a seed).
  m.def(
      "vocab_head(Tensor hidden, Tensor weight, Tensor bias, Tensor target, Tensor? seed, "
      "float temperature, int draw) -> (Tensor, Tensor, Tensor, Tensor)");
  // The same and, from the same logits, the gradients of scale · Σ nll (scale f32 [1]); the
  // weight's is written into grad_weight act [V, H], or added to it.
  // -> nll, lse, hit, sample, grad_hidden act [N, H], grad_bias f32 [V].
  m.def(
      "vocab_head_gradients(Tensor hidden, Tensor weight, Tensor bias, Tensor target, Tensor? "
      "seed, "
      "float temperature, int draw, Tensor scale, Tensor(a!) grad_weight, bool accumulate) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");

  // Binary cross-entropy of hidden·weight + bias: hidden act [T, H], weight f32 [H], bias f32 [1],
  // label uint8 [T] (0 original, 1 replaced, 255 ignored).
  // -> loss f32 [T] (0 where ignored), logit f32 [T], hits int64 [] (right sides of zero).
  m.def(
      "rtd_head(Tensor hidden, Tensor weight, Tensor bias, Tensor label) -> "
      "(Tensor, Tensor, Tensor)");
  // -> grad_hidden act [T, H], grad_weight f32 [H], grad_bias f32 [1].
  m.def(
      "rtd_head_backward(Tensor grad_loss, Tensor logit, Tensor hidden, Tensor weight, "
      "Tensor label) -> (Tensor, Tensor, Tensor)");

  // Draws `count` positions among the tokens that are not special and masks them: mask_fraction
  // become mask_id, random_fraction an id uniform over [0, vocab_size) without the special ones,
  // the rest stay. A function of (tokens, seed) alone. tokens int64 [T], special int64 [K]
  // ascending -> masked int64 [T], position int64 [count] ascending, target int64 [count]. If fewer
  // can be masked, the slots left over hold position 0 and target -100.
  m.def(
      "mask_tokens(Tensor tokens, Tensor special, Tensor seed, int count, int mask_id, "
      "int vocab_size, float mask_fraction, float random_fraction) -> (Tensor, Tensor, Tensor)");
  // Puts sample[n] at position[n] of the original tokens (rows with target -100 skipped).
  // -> corrupted int64 [T], label uint8 [T] (1 replaced, 0 original, 255 padding).
  m.def(
      "replace_tokens(Tensor tokens, Tensor position, Tensor target, Tensor sample, int pad_id) -> "
      "(Tensor, Tensor)");

  // The weighted objective and its figures in one launch. mlm_*: [N], rtd_*: [T], clm_*: [M]; an
  // absent part is None. denominators f32 [3] (mlm, rtd, clm counts), or None for this batch's own.
  // -> loss f32 [], metrics f32 [12]: see metro_ext.ops.loss.METRICS for the order.
  m.def(
      "pretrain_loss(Tensor? mlm_nll, Tensor? mlm_hit, Tensor? mlm_target, Tensor? rtd_loss, "
      "Tensor? rtd_logit, Tensor? label, Tensor? clm_nll, Tensor? clm_hit, Tensor? clm_target, "
      "Tensor? denominators, float mlm_weight, float rtd_weight, float clm_weight) -> "
      "(Tensor, Tensor)");
  // The constant gradients of the loss by mlm_nll, rtd_loss and clm_nll, times grad_loss.
  m.def(
      "pretrain_loss_backward(Tensor grad_loss, Tensor metrics, Tensor? mlm_target, Tensor? label, "
      "Tensor? clm_target, Tensor? denominators, float mlm_weight, float rtd_weight, "
      "float clm_weight) -> (Tensor, Tensor, Tensor)");
}

namespace py = pybind11;

#ifdef METRO_WITH_CUDA
// The operators that have CUDA kernels; the others refuse CUDA tensors with a sentence.
constexpr const char* kCudaOperators[] = {"attention",   "bias_gelu",      "layer_norm",
                                          "mask_tokens", "replace_tokens", "pretrain_loss",
                                          "rtd_head",    "vocab_head"};
#endif

PYBIND11_MODULE(_C, m) {
  m.doc() = "The kernels of METRO-ext. Importing this module registers torch.ops.metro.*";
  m.def(
      "build_info",
      [] {
        py::dict info;
        info["version"] = METRO_VERSION;
        info["compiler"] = __VERSION__;
        info["flags"] = METRO_FLAGS;
        info["torch_built_against"] = METRO_TORCH_BUILD_VERSION;
        info["torch_target"] = METRO_TORCH_TARGET;
        info["cuda_version"] = METRO_CUDA_VERSION;
        info["cuda_architectures"] = METRO_CUDA_ARCHITECTURES;
        py::list cuda_operators;
#ifdef METRO_WITH_CUDA
        for (const char* name : kCudaOperators) cuda_operators.append(name);
#endif
        info["cuda_operators"] = cuda_operators;
        return info;
      },
      "What this binary was built with. cuda_version is empty in a build without CUDA.");
  m.def(
      "cpu_isa", [] { return metro::cpu_isa_name(metro::cpu_isa()); },
      "The instruction set that the CPU kernels use on this machine.");
}
