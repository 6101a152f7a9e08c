// What the CUDA kernels of attention share: tiles of 64 rows in shared memory, the two products
// that all passes are made of, the bias of a tile and its dropout.
//
// A block has four warps; warp w owns rows 16 w ... 16 w + 15 of a tile of 64 × 64 scores, as mma
// accumulators: tile[n][2 h + e] is row group + 8 h, column 8 n + 2 member + e, where
// group = lane / 4 and member = lane % 4. float32 products are split into three TF32 products.
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

// Where a block stands: x counts tiles of all sequences, y heads. Sequences have length ≤
// max_seqlen and the grid knows no more than that: `first >= length` means that there is nothing to
// do.
struct AttentionBlock {
  int64_t sequence, start;  // its first token
  int head, length, first;  // `first` row of the tile within the sequence
};

__device__ inline AttentionBlock attention_block(const AttentionParams& p) {
  const int64_t tiles = (p.max_seqlen + kTileRows - 1) / kTileRows;
  const int64_t sequence = blockIdx.x / tiles;
  const int64_t start = p.cu_seqlens[sequence];
  return {sequence, start, static_cast<int>(blockIdx.y),
          static_cast<int>(p.cu_seqlens[sequence + 1] - start),
          static_cast<int>(blockIdx.x % tiles) * kTileRows};
}

inline dim3 attention_grid(const AttentionParams& p) {
  return dim3(grid_extent(ceil_div(p.max_seqlen, kTileRows) * p.sequences), grid_extent(p.heads));
}

// Starts copying rows `first` ... of the sequence to a tile; zeros beyond the sequence and beyond
// head_dim. `rows` is the sequence's first row, `stride` the elements between rows.
template <typename T, int kDim>
__device__ inline void copy_tile(T* tile, const T* rows, int64_t stride, int first, int length,
                                 int64_t head_dim) {
  using Tile = AttentionTile<T, kDim>;
  constexpr int kVectors = kDim / Tile::kVector;
  for (int i = threadIdx.x; i < kTileRows * kVectors; i += kAttentionThreads) {
    const int row = i / kVectors, col = i % kVectors * Tile::kVector;
    const bool valid = first + row < length && col < head_dim;
    const T* from = valid ? rows + (first + row) * stride + col : rows;
    cp_async_16(tile + row * Tile::kStride + col, from, valid);
  }
}

template <typename T>
__device__ inline const T* qkv_rows(const AttentionParams& p, const AttentionBlock& b, int part) {
  return static_cast<const T*>(p.qkv) + ((b.start * 3 + part) * p.heads + b.head) * p.head_dim;
}

template <typename T>
__device__ inline uint32_t pack_pair(float low, float high) {
  alignas(4) T pair[2] = {from_float<T>(low), from_float<T>(high)};
  uint32_t bits;
  memcpy(&bits, pair, 4);
  return bits;
}

// a·b ≈ a₁b₁ + a₁b₂ + a₂b₁, where x₁ is x cut to the 10 bits of TF32 and x₂ = x - x₁: the relative
// error is about 2^-20, small terms first.
__device__ inline void mma_float32(float (&c)[4], const float (&a)[4], const float (&b)[2]) {
  uint32_t a1[4], a2[4], b1[2], b2[2];
  const auto split = [](float x, uint32_t* high, uint32_t* low) {
    *high = __float_as_uint(x) & 0xffffe000u;
    *low = __float_as_uint(x - __uint_as_float(*high));
  };
#pragma unroll
  for (int i = 0; i < 4; ++i) split(a[i], &a1[i], &a2[i]);
#pragma unroll
  for (int i = 0; i < 2; ++i) split(b[i], &b1[i], &b2[i]);
  mma_16x8x8_tf32(c, a2, b1);
  mma_16x8x8_tf32(c, a1, b2);
  mma_16x8x8_tf32(c, a1, b1);
}

// scores[16, 8 kTiles] += a[16, kDim] · b[8 kTiles, kDim]ᵀ, both in shared memory.
template <typename T, int kDim, int kTiles>
__device__ inline void add_scores(float (&scores)[kTiles][4], const T* a, const T* b) {
  constexpr int kStride = AttentionTile<T, kDim>::kStride;
  const int lane = threadIdx.x % kWarp;
  if constexpr (sizeof(T) == 2) {
    const T* a_row = a + (lane % 16) * kStride + lane / 16 * 8;
    const T* b_row = b + (lane % 8 + lane / 16 * 8) * kStride + lane / 8 % 2 * 8;
#pragma unroll 1  // unrolled, the backward kernels run out of registers
    for (int k = 0; k < kDim; k += 16) {
      uint32_t left[4];
      ldmatrix_x4(left, a_row + k);
#pragma unroll
      for (int n = 0; n < kTiles; n += 2) {
        uint32_t right[4];
        ldmatrix_x4(right, b_row + n * 8 * kStride + k);
        mma_16x8x16<T>(scores[n], left, {right[0], right[1]});
        mma_16x8x16<T>(scores[n + 1], left, {right[2], right[3]});
      }
    }
  } else {
    const T* a_at = a + lane / 4 * kStride + lane % 4;
    const T* b_at = b + lane / 4 * kStride + lane % 4;
#pragma unroll 1
    for (int k = 0; k < kDim; k += 8) {
      const float left[4] = {a_at[k], a_at[k + 8 * kStride], a_at[k + 4],
                             a_at[k + 8 * kStride + 4]};
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        const T* at = b_at + n * 8 * kStride + k;
        mma_float32(scores[n], left, {at[0], at[4]});
      }
    }
  }
}

// sums[16, kDim] += weights[16, 8 kTiles] · b[8 kTiles, kDim], the weights in registers.
template <typename T, int kDim, int kTiles>
__device__ inline void add_weighted(float (&sums)[kDim / 8][4], const float (&weights)[kTiles][4],
                                    const T* b) {
  constexpr int kStride = AttentionTile<T, kDim>::kStride;
  const int lane = threadIdx.x % kWarp;
  if constexpr (sizeof(T) == 2) {
    const T* b_row = b + (lane % 16) * kStride + lane / 16 * 8;
#pragma unroll
    for (int k = 0; k < kTiles; k += 2) {
      const uint32_t left[4] = {pack_pair<T>(weights[k][0], weights[k][1]),
                                pack_pair<T>(weights[k][2], weights[k][3]),
                                pack_pair<T>(weights[k + 1][0], weights[k + 1][1]),
                                pack_pair<T>(weights[k + 1][2], weights[k + 1][3])};
#pragma unroll
      for (int n = 0; n < kDim / 8; n += 2) {
        uint32_t right[4];
        ldmatrix_x4_trans(right, b_row + k * 8 * kStride + n * 8);
        mma_16x8x16<T>(sums[n], left, {right[0], right[1]});
        mma_16x8x16<T>(sums[n + 1], left, {right[2], right[3]});
      }
    }
  } else {
    // Depth is summed in another order, so that a lane holds what it needs: the columns 2 member
    // and 2 member + 1 of the accumulator stand for member and member + 4.
    const T* b_at = b + lane % 4 * 2 * kStride + lane / 4;
#pragma unroll
    for (int k = 0; k < kTiles; ++k) {
      const float left[4] = {weights[k][0], weights[k][2], weights[k][1], weights[k][3]};
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n) {
        const T* at = b_at + k * 8 * kStride + n * 8;
        mma_float32(sums[n], left, {at[0], at[kStride]});
      }
    }
  }
}

// bias[x] of the tile, x = key - query + 63 within it, times log2 e; 0 where no pair lies.
__device__ inline void load_bias(float* bias, const AttentionParams& p, int head, int first_query,
                                 int first_key) {
  const int64_t width = 2 * p.max_seqlen - 1;
  const int64_t at =
      first_key - first_query + static_cast<int>(threadIdx.x) - (kTileRows - 1) + p.max_seqlen - 1;
  const bool valid = p.bias != nullptr && at >= 0 && at < width;
  bias[threadIdx.x] = valid ? p.bias[head * width + at] * kLog2E : 0.0f;
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
  const int64_t token = b.start + first_query + lane / 4;
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
  const int64_t token = b.start + first_query + 8 * group + 2 * member;
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

template <typename Kernel, typename... Args>
cudaError_t launch_attention(Kernel kernel, dim3 grid, int shared_bytes, void* stream,
                             const Args&... args) {
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (error != cudaSuccess) return error;
  return launch(kernel, grid, dim3(kAttentionThreads), static_cast<size_t>(shared_bytes), stream,
                args...);
}

}  // namespace metro::cuda
