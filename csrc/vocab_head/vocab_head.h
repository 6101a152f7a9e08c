// Cross-entropy and a sample from the logits hidden·weightᵀ + bias, with the gradients of the loss
// in the same pass. The logits are held a chunk of rows at a time, never whole, and are computed
// once: as soon as a chunk's log-sum-exp is known, its logits turn in place into the gradient,
// which is multiplied on. That needs the weight of the rows beforehand, which is why the loss is a
// sum:
//
//   lse = ln Σ exp(logit),  nll = lse - logit[target],  hit = (first argmax == target)
//   loss = scale · Σ nll,   d loss / d logit = scale · (softmax - onehot(target))
//
// Logits are rounded to T (float32, bf16; float16 on CUDA) before the bias is added, and so is the
// gradient of the logits; the rest is float32, in cuBLAS as long as torch's
// allow_{bf16,fp16}_reduced_precision_reduction are off (exact_reductions of metro_ext.hardware,
// which the commands call). grad_weight is in T: a chunk adds its part to what the chunks (and
// calls) before left there, so it is rounded once for each, at most kMaxChunks times a call.
//
// Sampling. The vocabulary is cut into sample tiles of kSampleTile entries. With z = logit /
// temperature and L_t = ln Σ_{i in t} exp z_i, each row draws one Philox call a tile (purpose
// kSample, index = {row, t}) and
//   1. takes the tile with the largest L_t + gumbel(word 0), the first at ties. By the Gumbel-max
//      theorem it is t with probability exp L_t / Σ_s exp L_s.
//      L_t = max z + ln Σ exp(z - max z), over the tile.
//   2. takes inside it the first token whose running sum of exp(z_i - max z), in float32 and in
//      index order, exceeds uniform(word 1) · (the sum over the tile): token i with probability
//      exp z_i / exp L_t. word 1 is independent of every word 0, which alone decide step 1.
// The product is exp z_i / Σ exp z: softmax sampling, exact up to the 2^-23 cells of `uniform`. It
// costs one random number a tile instead of one a token.
#pragma once

#include <cstdint>

#include "common/cpu_isa.h"
#include "common/types.h"

namespace metro {

// Part of the contract between CPU and CUDA: another size draws other samples from one seed. 256
// logits are one pass of a thread block or a few cache lines, and the Philox call, the logarithms
// and the reduction of a tile then cost a few per cent of its 256 exponentials.
constexpr int64_t kSampleTile = 256;

// The sum over a sample tile is the sum of this many partial sums (of every sixteenth entry, in
// order), halves added first: the same bits whatever the width of the machine's vectors.
constexpr int64_t kSumLanes = 16;

// The target of a row without loss, hit or gradient (a sample is still drawn).
constexpr int64_t kIgnoredTarget = -100;

// Scratch of the CPU operator for one chunk. Rows are the fastest index of what has the
// vocabulary's extent, so that a vector holds as many rows and every reduction over the vocabulary
// runs lane by lane; row_stride is the chunk's rows, rounded up to kRowAlignment.
struct VocabHeadWorkspace {
  void* logits;  // T [vocab, row_stride]
  float* tiles;  // [tiles, kTileFigures, row_stride]
  void*
      hidden_columns;   // hidden, packed for the logits; 4 bytes a number suffice for each of these
  void* hidden_rows;    // hidden, packed for the weight's gradient
  void* grad_units;     // the logits' gradient in units along the vocabulary, block_tiles of it
  float* grad_hidden;   // [panels of width, row_stride, panel]
  float* row_lse;       // [row_stride], 0 beyond the chunk's rows
  int32_t* row_target;  // [row_stride], -1 beyond them and where ignored
  int64_t row_stride;
  int64_t block_tiles;
};

// Of a sample tile: the largest logit, the sum of exponentials relative to it, and what it bids.
enum TileFigure { kTileMax, kTileSum, kTileBid, kTileFigures };

// The whole operator, on the CPU.
struct VocabHeadParams {
  const void* hidden;     // T [rows, width]
  const void* weight;     // T [vocab, width]
  const float* bias;      // [vocab]
  const int64_t* target;  // [rows]
  const int64_t* seed;    // [1], or null: no sample
  const float* scale;     // [1], or null: no gradients
  float* nll;             // [rows]
  float* lse;             // [rows]
  uint8_t* hit;           // [rows]
  int64_t* sample;        // [rows], if seed
  void* grad_hidden;      // T [rows, width]; these three only if scale
  void* grad_weight;      // T [vocab, width]
  float* grad_bias;       // [vocab]
  int64_t rows;
  int64_t width;
  int64_t vocab;
  int64_t chunk_rows;
  bool accumulate;  // grad_weight is added to; else it is written
  float inverse_temperature;
  uint32_t draw;
  DType dtype;
  VocabHeadWorkspace work;
};

// What a row of logits is read for, on CUDA. `row` counts from the first row of the whole.
struct VocabHeadRowsParams {
  const void* logits;     // T [rows, vocab], without bias
  const float* bias;      // [vocab]
  const int64_t* target;  // [rows]
  const int64_t* seed;    // [1], or null: no sample
  float* nll;             // [rows]
  float* lse;             // [rows]
  uint8_t* hit;           // [rows]
  int64_t* sample;        // [rows], if seed
  int64_t rows;
  int64_t first_row;
  int64_t vocab;
  float inverse_temperature;
  uint32_t draw;
  DType dtype;
};

// logits [rows, vocab] -> in place scale · (softmax - onehot), in T; its column sums before
// rounding are grad_bias, or are added to it.
struct VocabHeadGradParams {
  void* logits;           // T [rows, vocab]
  const float* scale;     // [1]
  const float* lse;       // [rows]
  const float* bias;      // [vocab]
  const int64_t* target;  // [rows]
  float* grad_bias;       // [vocab]
  float* partials;        // [vocab_head_row_blocks(rows), vocab] scratch
  int64_t rows;
  int64_t vocab;
  bool accumulate;
  DType dtype;
};

// Blocks of rows whose column sums are added up afterwards: enough to occupy a GPU, and four rows a
// warp where there are as many.
inline int64_t vocab_head_row_blocks(int64_t rows) {
  return rows < 64 * 32 ? (rows + 31) / 32 : 64;
}

constexpr int64_t kRowAlignment = 16;  // of a chunk's rows on the CPU, for vectors of any width
constexpr int64_t kMaxChunks = 16;

METRO_CPU_KERNEL(vocab_head, VocabHeadParams)

// `stream` is a cudaStream_t; the result is a cudaError_t.
int vocab_head_rows_cuda(const VocabHeadRowsParams& p, void* stream);
int vocab_head_grad_cuda(const VocabHeadGradParams& p, void* stream);

}  // namespace metro
