// What the CUDA kernels of attention share: tiles of 64 rows in shared memory, the two products
// that all passes are made of, the bias of a tile and its dropout.
//
// A block has four warps; with one strip of 16 rows a warp, warp w owns rows 16 w ... 16 w + 15 of
// a tile of 64 × 64 scores, with two (forward) rows 32 w ... 32 w + 31 of 128 × 64. A strip is held
// as mma accumulators: tile[n][2 h + e] is row group + 8 h, column 8 n + 2 member + e, where group
// = lane / 4 and member = lane % 4. float32 products are split into three TF32 products.
#pragma once

#include "attention/attention.h"
#include "common/cuda_dtype.cuh"
#include "common/cuda_launch.cuh"
#include "common/cuda_mma.cuh"
#include "common/cuda_vector.cuh"
#include "common/philox.h"

namespace metro::cuda {

constexpr int kTileRows = static_cast<int>(kAttentionTile);
constexpr int kAttentionThreads = 128;
constexpr int kScoreTiles = kTileRows / 8;  // accumulators of a warp's strip of scores
constexpr float kLog2E = 1.44269504f;
constexpr float kLn2 = 0.693147181f;
static_assert(kAttentionThreads / kWarp * 16 == kTileRows);

// Rows are padded by 16 bytes, so that the eight rows of a matrix load lie in different banks.
template <typename T, int kDim>
struct AttentionTile {
  static constexpr int kVector = 16 / sizeof(T);
  static constexpr int kStride = kDim + kVector;
  static constexpr int kElements = kTileRows * kStride;
  static constexpr int kBytes = kElements * static_cast<int>(sizeof(T));
};

// A tile of kRows rows of a sequence. Tile t of sequence s has slot cu_seqlens[s] / kRows + s + t:
// distinct for all tiles, and found again without a list of them. A slot may have no tile.
struct AttentionBlock {
  int start, head, length;  // the sequence's first token and how many it has
  int first;                // row of the tile within the sequence

  // [tokens, extent]: the index of the sequence's first row.
  __device__ int64_t row(int64_t extent) const { return start * extent; }
};

// Looks the slot's sequence up, all lanes of the warp together: 32 probes narrow the search
// 32-fold.
template <int kRows>
__device__ inline AttentionBlock attention_block(const AttentionParams& p, int slot) {
  const auto first_slot = [&](int sequence) { return p.cu_seqlens[sequence] / kRows + sequence; };
  const int lane = threadIdx.x % kWarp;
  int low = 0, high = static_cast<int>(p.sequences);  // it is one of low ... high - 1
  while (high - low > 1) {
    const int step = (high - low - 1) / kWarp + 1, probe = low + (lane + 1) * step;
    const bool reached = probe < high && first_slot(probe) <= slot;
    low += __popc(__ballot_sync(~0u, reached)) * step;
    high = high - low > step ? low + step : high;
  }
  const int start = p.cu_seqlens[low];
  return {start, static_cast<int>(blockIdx.y), p.cu_seqlens[low + 1] - start,
          (slot - first_slot(low)) * kRows};
}

// Calls body(AttentionBlock) for each tile of this block's slots: every gridDim.x-th. The batches
// of a graph have room for far more sequences than they hold; the empty ones at the end, which
// begin at the last token, have the last slots, and no block looks at more than one of those.
template <int kRows, typename Body>
__device__ inline void for_tiles(const AttentionParams& p, const Body& body) {
  const int full = static_cast<int>(p.tokens / kRows), slots = full + static_cast<int>(p.sequences);
  for (int slot = static_cast<int>(blockIdx.x); slot < slots; slot += gridDim.x) {
    if (slot >= full && p.cu_seqlens[slot - full] >= p.tokens) return;
    const AttentionBlock b = attention_block<kRows>(p, slot);
    if (b.first < b.length) body(b);
  }
}

// Starts copying rows `first` ... of the sequence to a tile; zeros beyond the sequence and beyond
// head_dim. `rows` is the sequence's first row, `stride` the elements between rows.
template <typename T, int kDim, int kRows = kTileRows>
__device__ inline void copy_tile(T* tile, const T* rows, int64_t stride, int first, int length,
                                 int64_t head_dim) {
  using Tile = AttentionTile<T, kDim>;
  constexpr int kVectors = kDim / Tile::kVector;
  for (int i = threadIdx.x; i < kRows * kVectors; i += kAttentionThreads) {
    const int row = i / kVectors, col = i % kVectors * Tile::kVector;
    const bool valid = first + row < length && col < head_dim;
    const T* from = valid ? rows + (first + row) * stride + col : rows;
    cp_async_16(tile + row * Tile::kStride + col, from, valid);
  }
}

template <typename T>
__device__ inline const T* qkv_rows(const AttentionParams& p, const AttentionBlock& b, int part) {
  return static_cast<const T*>(p.qkv) + (b.row(3 * p.heads) + part * p.heads + b.head) * p.head_dim;
}

template <typename T>
__device__ inline uint32_t pack_pair(float low, float high) {
  alignas(4) T pair[2] = {from_float<T>(low), from_float<T>(high)};
  uint32_t bits;
  memcpy(&bits, pair, 4);
  return bits;
}

// x = high + low + at most 2^-23 |x|: x rounded to the 10 bits of TF32, and what is left of it.
struct SplitFloat {
  uint32_t high, low;
};

__device__ inline SplitFloat split_float(float x) {
  const uint32_t high = (__float_as_uint(x) + 0x1000u) & 0xffffe000u;
  return {high, __float_as_uint(x - __uint_as_float(high))};
}

// c += a b for float32 a and b as three TF32 products; low·low, 2^-22 of the product at most, is
// left out. Tensor cores cut their sums off towards zero (Fasi et al., PeerJ CS 7:e330): over
// thousands of keys that would shrink c by far more than float32 rounds, so that eight terms at a
// time are summed there and added to c with rounding.
__device__ inline void mma_float32(float (&c)[4], const SplitFloat (&a)[4], const float (&b)[2]) {
  const SplitFloat s[2] = {split_float(b[0]), split_float(b[1])};
  const uint32_t a_high[4] = {a[0].high, a[1].high, a[2].high, a[3].high};
  const uint32_t a_low[4] = {a[0].low, a[1].low, a[2].low, a[3].low};
  float sum[4] = {};
  mma_16x8x8_tf32(sum, a_low, {s[0].high, s[1].high});
  mma_16x8x8_tf32(sum, a_high, {s[0].low, s[1].low});
  mma_16x8x8_tf32(sum, a_high, {s[0].high, s[1].high});
#pragma unroll
  for (int i = 0; i < 4; ++i) c[i] += sum[i];
}

// scores[16 kStrips, 8 kTiles] += a[16 kStrips, kDim] · b[8 kTiles, kDim]ᵀ, both in shared memory.
template <typename T, int kDim, int kStrips, int kTiles>
__device__ inline void add_scores(float (&scores)[kStrips][kTiles][4], const T* a, const T* b) {
  constexpr int kStride = AttentionTile<T, kDim>::kStride;
  const int lane = threadIdx.x % kWarp;
  if constexpr (sizeof(T) == 2) {
    const T* a_row = a + (lane % 16) * kStride + lane / 16 * 8;
    const T* b_row = b + (lane % 8 + lane / 16 * 8) * kStride + lane / 8 % 2 * 8;
#pragma unroll 1  // unrolled, the backward kernels run out of registers
    for (int k = 0; k < kDim; k += 16) {
      uint32_t left[kStrips][4];
#pragma unroll
      for (int m = 0; m < kStrips; ++m) ldmatrix_x4(left[m], a_row + m * 16 * kStride + k);
#pragma unroll
      for (int n = 0; n < kTiles; n += 2) {
        uint32_t right[4];
        ldmatrix_x4(right, b_row + n * 8 * kStride + k);
#pragma unroll
        for (int m = 0; m < kStrips; ++m) {
          mma_16x8x16<T>(scores[m][n], left[m], {right[0], right[1]});
          mma_16x8x16<T>(scores[m][n + 1], left[m], {right[2], right[3]});
        }
      }
    }
  } else {
    static_assert(kStrips == 1);
    const T* a_at = a + lane / 4 * kStride + lane % 4;
    const T* b_at = b + lane / 4 * kStride + lane % 4;
#pragma unroll 1
    for (int k = 0; k < kDim; k += 8) {
      const SplitFloat left[4] = {split_float(a_at[k]), split_float(a_at[k + 8 * kStride]),
                                  split_float(a_at[k + 4]), split_float(a_at[k + 8 * kStride + 4])};
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        const T* at = b_at + n * 8 * kStride + k;
        mma_float32(scores[0][n], left, {at[0], at[4]});
      }
    }
  }
}

// sums[16 kStrips, kDim] += weights[16 kStrips, 8 kTiles] · b[8 kTiles, kDim], the weights in
// registers. Rows of b from `depth` on are zeros.
template <typename T, int kDim, int kStrips, int kTiles>
__device__ inline void add_weighted(float (&sums)[kStrips][kDim / 8][4],
                                    const float (&weights)[kStrips][kTiles][4], const T* b,
                                    int depth) {
  constexpr int kStride = AttentionTile<T, kDim>::kStride;
  const int lane = threadIdx.x % kWarp;
  if constexpr (sizeof(T) == 2) {
    const T* b_row = b + (lane % 16) * kStride + lane / 16 * 8;
#pragma unroll
    for (int k = 0; k < kTiles; k += 2) {
      uint32_t left[kStrips][4];
#pragma unroll
      for (int m = 0; m < kStrips; ++m) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float* pair = weights[m][k + i / 2] + i % 2 * 2;
          left[m][i] = pack_pair<T>(pair[0], pair[1]);
        }
      }
#pragma unroll
      for (int n = 0; n < kDim / 8; n += 2) {
        uint32_t right[4];
        ldmatrix_x4_trans(right, b_row + k * 8 * kStride + n * 8);
#pragma unroll
        for (int m = 0; m < kStrips; ++m) {
          mma_16x8x16<T>(sums[m][n], left[m], {right[0], right[1]});
          mma_16x8x16<T>(sums[m][n + 1], left[m], {right[2], right[3]});
        }
      }
    }
  } else {
    static_assert(kStrips == 1);
    // Depth is summed in another order, so that a lane holds what it needs: the columns 2 member
    // and 2 member + 1 of the accumulator stand for member and member + 4.
    const T* b_at = b + lane % 4 * 2 * kStride + lane / 4;
#pragma unroll
    for (int k = 0; k < kTiles; ++k) {
      if (k * 8 >= depth) break;  // without a branch here all steps overlap, in too many registers
      const float (&w)[4] = weights[0][k];
      const SplitFloat left[4] = {split_float(w[0]), split_float(w[2]), split_float(w[1]),
                                  split_float(w[3])};
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n) {
        const T* at = b_at + k * 8 * kStride + n * 8;
        mma_float32(sums[0][n], left, {at[0], at[kStride]});
      }
    }
  }
}

// bias[x] of a tile of kRows queries and 64 keys, x = key - query + kRows - 1 within it, times
// log2 e; 0 where no pair lies.
template <int kRows = kTileRows>
__device__ inline void load_bias(float* bias, const AttentionParams& p, int head, int first_query,
                                 int first_key) {
  const int64_t width = 2 * p.max_seqlen - 1;
  for (int x = threadIdx.x; x < kRows + kTileRows; x += kAttentionThreads) {
    const int64_t at = first_key - first_query + x - (kRows - 1) + p.max_seqlen - 1;
    const bool valid = p.bias != nullptr && at >= 0 && at < width;
    bias[x] = valid ? p.bias[head * width + at] * kLog2E : 0.0f;
  }
}

struct AttentionDropout {
  uint32_t threshold;  // 0: keep all
  float scale;
  uint64_t seed;
  uint32_t purpose;
};

__device__ inline AttentionDropout attention_dropout(const AttentionParams& p) {
  const Dropout d = make_dropout(p.p);
  const bool on = d.threshold > 0;
  return {d.threshold, on ? d.scale : 1.0f, on ? static_cast<uint64_t>(*p.seed) : 0,
          counter_word(Purpose::kAttentionDropout, p.draw)};
}

// Bit k: key 8 · group + k is kept for the query with that packed index.
__device__ inline uint32_t kept_byte(const AttentionDropout& d, int group, int64_t token,
                                     int head) {
  const Philox4 r = philox(d.seed, static_cast<uint32_t>(group), static_cast<uint32_t>(token),
                           d.purpose, static_cast<uint32_t>(head));
  uint32_t bits = 0;
#pragma unroll
  for (int k = 0; k < 8; ++k) bits |= static_cast<uint32_t>(half_word(r, k) >= d.threshold) << k;
  return bits;
}

// The dropout of a warp's strip of scores: bit 4 n + 2 h + e is that of tile[n][2 h + e]. Each call
// of Philox is made once: a lane makes four and hands them on as bytes. Rows are queries here: the
// four lanes of a row share its eight calls, lane `member` making those of tiles member and
// member + 4.
__device__ inline uint32_t kept_by_query(const AttentionDropout& d, const AttentionBlock& b,
                                         int first_query, int first_key) {
  if (d.threshold == 0) return ~0u;
  const int lane = threadIdx.x % kWarp, member = lane % 4;
  const int64_t token = int64_t{b.start} + first_query + lane / 4;
  uint32_t own = 0, kept = 0;
#pragma unroll
  for (int call = 0; call < 4; ++call) {
    const int group = first_key / 8 + member + call / 2 * 4;
    own |= kept_byte(d, group, token + call % 2 * 8, b.head) << (call * 8);
  }
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const uint32_t bits = __shfl_sync(~0u, own, lane / 4 * 4 + k) >> (2 * member);
#pragma unroll
    for (int call = 0; call < 4; ++call) {
      kept |= (bits >> (call * 8) & 3u) << (4 * (k + call / 2 * 4) + 2 * (call % 2));
    }
  }
  return kept;
}

// The same where rows are keys and columns queries: the eight lanes of a `member` share the calls,
// lane `group` making the four of queries 8 group + 2 member and + 1, keys 0-7 and 8-15.
__device__ inline uint32_t kept_by_key(const AttentionDropout& d, const AttentionBlock& b,
                                       int first_query, int first_key) {
  if (d.threshold == 0) return ~0u;
  const int lane = threadIdx.x % kWarp, member = lane % 4, group = lane / 4;
  const int64_t token = int64_t{b.start} + first_query + 8 * group + 2 * member;
  uint32_t own = 0, kept = 0;
#pragma unroll
  for (int call = 0; call < 4; ++call) {  // 2 h + e
    own |= kept_byte(d, first_key / 8 + call / 2, token + call % 2, b.head) << (call * 8);
  }
#pragma unroll
  for (int n = 0; n < kScoreTiles; ++n) {
    const uint32_t bits = __shfl_sync(~0u, own, n * 4 + member) >> group;
#pragma unroll
    for (int call = 0; call < 4; ++call) kept |= (bits >> (call * 8) & 1u) << (4 * n + call);
  }
  return kept;
}

// A warp's strip times `factor[h]` to rows of the sequence; `rows` as in copy_tile.
template <typename T, int kDim>
__device__ inline void write_strip(const float (&sums)[kDim / 8][4], const float (&factor)[2],
                                   T* rows, int64_t stride, int first, int length,
                                   int64_t head_dim) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int row = first + lane / 4 + 8 * h;
    if (row >= length) continue;
#pragma unroll
    for (int n = 0; n < kDim / 8; ++n) {
      const int col = n * 8 + lane % 4 * 2;
      const float pair[2] = {sums[n][2 * h] * factor[h], sums[n][2 * h + 1] * factor[h]};
      if (col < head_dim) store<2>(rows + row * stride + col, pair);
    }
  }
}

// Calls body<T, kDim>() for the element type and the head dimension rounded up.
template <typename T, typename Body>
cudaError_t for_head_dim(int64_t head_dim, const Body& body) {
  if (head_dim <= 32) return body.template operator()<T, 32>();
  if (head_dim <= 64) return body.template operator()<T, 64>();
  if (head_dim <= 96) return body.template operator()<T, 96>();
  return body.template operator()<T, 128>();
}

template <typename Body>
cudaError_t for_type_and_head_dim(const AttentionParams& p, const Body& body) {
  return by_dtype(p.dtype,
                  [&](auto type) { return for_head_dim<decltype(type)>(p.head_dim, body); });
}

inline dim3 attention_grid(const AttentionParams& p, int64_t blocks) {
  return dim3(grid_extent(blocks), grid_extent(p.heads));
}

template <typename Kernel, typename... Args>
cudaError_t launch_attention(Kernel kernel, dim3 grid, int shared_bytes, void* stream,
                             const Args&... args) {
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (error != cudaSuccess) return error;
  return launch(kernel, grid, dim3(kAttentionThreads), static_cast<size_t>(shared_bytes), stream,
                args...);
}

// needed<T, kDim>() and what the device has.
template <typename Needed>
SharedMemory shared_memory(const AttentionParams& p, const Needed& needed) {
  SharedMemory memory{0, shared_memory_limit()};
  for_type_and_head_dim(p, [&]<typename T, int kDim>() {
    memory.needed = needed.template operator()<T, kDim>();
    return cudaSuccess;
  });
  return memory;
}

}  // namespace metro::cuda
