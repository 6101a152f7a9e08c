// Cross-entropy and a sample from the logits hidden·weightᵀ + bias, which are never held whole.
//
// The glue walks the vocabulary in tiles of vocab_head_tile() columns. torch's matrix product
// writes the tile hidden·weight[begin : begin + cols]ᵀ in T (float32, bf16; float16 on CUDA), and
// vocab_head_tile_pass folds it into one VocabRow a row: all that the vocabulary leaves behind.
// Backward recomputes each tile (same product, same rounding, so that softmax and log-sum-exp
// agree), turns it in place into the gradient of the logits, and multiplies that on.
//
//   lse = ln Σ exp(logit),  nll = lse - logit[target],  hit = (first argmax == target)
//   d nll / d logit = softmax - onehot(target)
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
// costs one random number a tile instead of one a token. A tile that is not the best so far can
// never win, so step 2 runs only for tiles that are, while their logits are at hand: about
// ln(number of tiles) times a row.
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

// What a row carries from tile to tile. Written by the pass with begin = 0.
struct VocabRow {
  float max;           // of the logits so far
  float sum;           // Σ exp(logit - max)
  float target_logit;  // once its tile has passed
  float best;          // largest L_t + gumbel so far
  int64_t argmax;      // first index of max
  int64_t sample;      // the token drawn in the tile of `best`
};

struct VocabHeadTileParams {
  const void* logits;     // T [rows, cols], without bias
  const float* bias;      // [vocab]
  const int64_t* target;  // [rows]
  const int64_t* seed;    // [1], or null: no sample
  VocabRow* state;        // [rows]
  float* nll;             // [rows]; outputs are written by the last pass, begin + cols = vocab
  float* lse;             // [rows]
  uint8_t* hit;           // [rows]
  int64_t* sample;        // [rows], if seed
  int64_t rows;
  int64_t begin;  // first column, a multiple of kSampleTile
  int64_t cols;
  int64_t vocab;
  float inverse_temperature;
  uint32_t draw;
  DType dtype;
};

// logits [rows, cols] -> in place grad_nll · (softmax - onehot), in T; its column sums before
// rounding are grad_bias[begin : begin + cols].
struct VocabHeadGradParams {
  void* logits;           // T [rows, cols]
  const float* grad_nll;  // [rows]
  const float* lse;       // [rows]
  const float* bias;      // [vocab]
  const int64_t* target;  // [rows]
  float* grad_bias;       // [vocab]
  float* partials;        // [vocab_head_row_blocks(rows), cols] scratch, CUDA only
  int64_t rows;
  int64_t begin;
  int64_t cols;
  DType dtype;
};

// sum = product (first) or sum += product, in float32; the last call also writes `out` in T. For
// float32, `sum` and `out` may be the same memory.
struct VocabHeadAccumulateParams {
  const void* product;  // T [count]
  float* sum;           // [count]
  void* out;            // T [count]
  int64_t count;
  bool first;
  bool last;
  DType dtype;
};

// Columns of a tile: wide enough that the matrix products run at their full rate, and rows · cols
// at most 8 Mi elements (16 MB in bf16) as long as that leaves one sample tile.
constexpr int64_t kMaxTile = 16 * kSampleTile;
constexpr int64_t kMaxTileElements = int64_t{8} << 20;

inline int64_t vocab_head_tile(int64_t rows, int64_t vocab) {
  int64_t tile = rows > 0 ? kMaxTileElements / rows : kMaxTile;
  tile = tile / kSampleTile * kSampleTile;
  tile = tile < kSampleTile ? kSampleTile : tile > kMaxTile ? kMaxTile : tile;
  return tile < vocab ? tile : vocab;
}

// The same on CUDA, where kernel launches cost and memory is fast: see vocab_head_cuda.cu.
constexpr int64_t kMaxCudaTile = 64 * kSampleTile;
constexpr int64_t kMaxCudaTileBytes = int64_t{256} << 20;

inline int64_t vocab_head_cuda_tile(int64_t rows, int64_t vocab, int64_t element_bytes) {
  int64_t most = rows > 0 ? kMaxCudaTileBytes / (rows * element_bytes) : kMaxCudaTile;
  most = most / kSampleTile * kSampleTile;
  most = most < kSampleTile ? kSampleTile : most > kMaxCudaTile ? kMaxCudaTile : most;
  const int64_t tiles = (vocab + most - 1) / most;  // of nearly equal width
  const int64_t tile = ((vocab + tiles - 1) / tiles + kSampleTile - 1) / kSampleTile * kSampleTile;
  return tile < vocab ? tile : vocab;
}

// Blocks of rows whose column sums are added up afterwards: enough to occupy a GPU, and four rows a
// warp where there are as many.
inline int64_t vocab_head_row_blocks(int64_t rows) {
  return rows < 64 * 32 ? (rows + 31) / 32 : 64;
}

METRO_CPU_KERNEL(vocab_head_tile_pass, VocabHeadTileParams)
METRO_CPU_KERNEL(vocab_head_grad_tile, VocabHeadGradParams)
METRO_CPU_KERNEL(vocab_head_accumulate, VocabHeadAccumulateParams)

// `stream` is a cudaStream_t; the result is a cudaError_t. cols <= kMaxCudaTile.
int vocab_head_tile_pass_cuda(const VocabHeadTileParams& p, void* stream);
int vocab_head_grad_tile_cuda(const VocabHeadGradParams& p, void* stream);
int vocab_head_accumulate_cuda(const VocabHeadAccumulateParams& p, void* stream);

}  // namespace metro
