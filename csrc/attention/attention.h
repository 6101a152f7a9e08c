// Softmax attention within each sequence of a packed batch, with a learned bias by relative
// position and dropout on the probabilities; bidirectional.
//
// Sequence s holds the tokens cu_seqlens[s] ... cu_seqlens[s + 1] - 1; i, j count from its start:
//   score[i, j] = scale · q[i]·k[j] + bias[head, j - i + L - 1],  scale = 1/√d
//   prob[i, j]  = exp(score[i, j] - lse[i]),  lse[i] = ln Σ_j exp(score[i, j])
//   out[i]      = Σ_j keep[i, j] · dropout.scale · prob[i, j] · v[j]
// Backward, from prob recomputed and delta[i] = grad_out[i]·out[i]:
//   grad_prob[i, j]  = keep[i, j] · dropout.scale · grad_out[i]·v[j]
//   grad_score[i, j] = prob[i, j] · (grad_prob[i, j] - delta[i])
//
// qkv, grad_qkv: [tokens, 3, heads, head_dim]; out, grad_out: [tokens, heads, head_dim], in T
// (float32, bf16; float16 on CUDA); lse: [heads, tokens]; bias, grad_bias: [heads, 2 L - 1]
// float32, or null. All contiguous; those in T begin on 16-byte boundaries.
// Nothing of size length × length is held: scores live in tiles of 64 × 64. No atomics on floats:
// a (sequence, head) belongs to one worker, and the bias gradient is summed over sequences in a
// fixed order, from vectors by relative position.
#pragma once

#include <cstdint>

#include "common/cpu_isa.h"
#include "common/philox.h"
#include "common/types.h"

namespace metro {

constexpr int64_t kAttentionTile = 64;           // queries and keys of a tile of scores
constexpr int64_t kAttentionMaxHeadDim = 128;    // head_dim is a multiple of 8 up to this
constexpr int64_t kAttentionPad = 16;            // rows of packed matrices come in multiples
constexpr int64_t kAttentionDiagonalBanks = 16;  // see attention_backward_cpu.cpp

struct AttentionParams {
  const void* qkv;
  const int32_t* cu_seqlens;  // [sequences + 1]
  const float* bias;
  const int64_t* seed;  // not read when p = 0
  void* out;
  float* lse;
  int64_t tokens;
  int64_t sequences;
  int64_t heads;
  int64_t head_dim;
  int64_t max_seqlen;  // L: the centre of bias, and no sequence is longer
  double p;
  uint32_t draw;
  DType dtype;
  // The CPU's schedule: the sequences with tokens, longest first, and scratch memory of
  // attention_scratch(...) bytes for each worker, on 64-byte boundaries.
  const int32_t* order;  // [active]
  int64_t active;
  int64_t longest;  // length of the longest sequence
  void* scratch;
  int64_t workers;
};

struct AttentionBackwardParams {
  AttentionParams forward;  // its out and lse are read
  const void* grad_out;
  void* grad_qkv;
  float* grad_bias;
  // Scratch. CPU: [heads, 2 tokens], the gradient by relative position within sequence s starts at
  // 2 · cu_seqlens[s]. CUDA: [heads, attention_slots, attention_slot_width], a vector by diagonal
  // for each tile of queries; tile t of sequence s has slot cu_seqlens[s] / 64 + s + t. That is
  // 4 (L / 64 + 1) bytes a token and head, and for each sequence what 64 tokens take: 36 at
  // L = 512, where a head's qkv takes 384 in bf16 at d = 64.
  float* bias_partials;
  float* delta;  // [heads, tokens] scratch of the CUDA kernels
};

inline int64_t attention_pad(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

// Enough slots for the query tiles of any division of the tokens into sequences.
METRO_HD inline int64_t attention_slots(const AttentionParams& p) {
  return p.tokens / kAttentionTile + p.sequences;
}

METRO_HD inline int64_t attention_slot_width(const AttentionParams& p) {
  return ((p.max_seqlen + kAttentionTile - 1) / kAttentionTile + 1) * kAttentionTile;
}

// Bytes of scratch memory of a CPU worker; O(longest · head_dim). Units are 4 bytes (tile_gemm.h).
inline int64_t attention_scratch(int64_t longest, int64_t head_dim, bool backward) {
  const int64_t rows = attention_pad(longest, kAttentionPad);
  const int64_t tiled = attention_pad(longest, kAttentionTile);
  const int64_t dim = attention_pad(head_dim, kAttentionPad);
  // Forward: k and v. Backward: q and grad_out, in two layouts each, and grad_q.
  const int64_t matrices = backward ? 5 : 2;
  const int64_t vectors = 1 + (backward ? kAttentionDiagonalBanks : 0);  // bias and its gradient
  const int64_t row_values = backward ? 2 * rows : 0;                    // lse and delta
  return 4 * (matrices * tiled * dim + vectors * (2 * rows + kAttentionPad) + row_values);
}

METRO_CPU_KERNEL(attention, AttentionParams)
METRO_CPU_KERNEL(attention_backward, AttentionBackwardParams)

// `stream` is a cudaStream_t; the result is a cudaError_t. The CPU's schedule is not read.
int attention_cuda(const AttentionParams& p, void* stream);
int attention_backward_cuda(const AttentionBackwardParams& p, void* stream);

}  // namespace metro
