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
//
// float32 on CUDA is three TF32 products, eight terms at a time, added up in float32. Their model
// on the CPU (sums of tensor cores cut off) has ‖out - float64‖ / ‖out‖ of 3e-7 at 1024 keys, 4e-7
// at 2048 and 5e-7 at 4096 with values about 0 (torch on the CPU: 4e-7), 2e-7, 3e-7 and 4e-7 with
// values about 1, whose sums grow with every key (torch: 1e-7).
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
  // 2 · cu_seqlens[s]. CUDA: [bias_rows, heads, 2 L - 1], each the sum over the query tiles of one
  // block: at most 255 · 4 · (2 L - 1) bytes a head whatever the batch (1 MB at L = 512).
  float* bias_partials;
  int64_t bias_rows;  // CUDA: 1 ... attention_bias_rows(forward), or 0 without tokens or bias
  float* delta;       // [heads, tokens] scratch of the CUDA kernels
};

inline int64_t attention_pad(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

// Blocks a head of the CUDA kernels: one for each tile of `rows` tokens where sequences are no
// shorter than four of them; others take turns (attention_cuda.cuh). Odd, as in batches of equal
// sequences every second slot is empty, and an even number would leave half of the blocks idle.
inline int64_t attention_blocks(const AttentionParams& p, int64_t rows) {
  if (p.sequences == 0) return 0;
  const int64_t tiles = (p.tokens + rows - 1) / rows, slots = p.tokens / rows + p.sequences;
  const int64_t blocks = tiles == 0 ? 0 : (tiles + tiles / 4) | 1;
  return blocks < slots ? blocks : slots;
}

// Odd, so that blocks take turns at the tiles of equal sequences; enough to fill a GPU with two
// heads.
constexpr int64_t kAttentionBiasRows = 255;

inline int64_t attention_bias_rows(const AttentionParams& p) {
  const int64_t blocks = attention_blocks(p, kAttentionTile);
  return blocks < kAttentionBiasRows ? blocks : kAttentionBiasRows;
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

// What a block of the CUDA kernels needs at least for the type and head dimension, and what the
// current device can give it: 99 KB on sm_86, sm_89 and sm_120, where float32 fits up to a head
// dimension of 96 forward and 64 backward. More than `available` is refused by the kernels.
struct SharedMemory {
  int64_t needed, available;  // bytes
};
SharedMemory attention_shared_memory_cuda(const AttentionParams& p);
SharedMemory attention_backward_shared_memory_cuda(const AttentionParams& p);

}  // namespace metro
