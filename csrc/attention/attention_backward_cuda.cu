// Backward in two passes over recomputed probabilities, so that nothing is added atomically: a
// block per tile of 64 keys sums grad_k and grad_v in registers over the query tiles, a block per
// tile of 64 queries sums grad_q over the key tiles. The scores and grad_out·vᵀ are made twice: 7
// products where one pass with atomics needs 5, and the same bits in every run.
//
// The bias gradient: a query block writes a tile of grad_score to shared memory, thread x adds up
// diagonal x in the order of the rows, and what neighbouring key tiles share is carried from one to
// the next. Each block adds the diagonals of all its tiles to a row of its own, at most 255 rows of
// 4 (2 L - 1) bytes a head (1 MB at L = 512, 8.4 MB at 4096), which stay in L2 and which a second
// kernel adds up. Which tiles a block has, and in which order, depends on the shapes alone.
//
// Floor: 14 · length² · head_dim FLOPs a (sequence, head); qkv, out, grad_out and lse read once,
// grad_qkv written once, the tiles of the inner loops re-read from L2.
#include "attention/attention_cuda.cuh"
#include "common/cuda_columns.cuh"

namespace metro {
namespace {

using namespace cuda;  // NOLINT: the helpers of attention_cuda.cuh

constexpr int kDiagonalStride = kTileRows + 1;  // neighbouring diagonals in neighbouring banks

// Two tiles that stay, two that pass: in 16-bit types twice, so that the next pair is copied while
// one is worked on; but 128 columns do not fit twice in the 99 KB of smaller devices.
template <typename T>
constexpr int kMostStages = sizeof(T) == 2 ? 2 : 1;
template <typename T, int kDim>
constexpr int kLeastStages = kDim <= 96 ? kMostStages<T> : 1;

// Tiles of 8 queries that a key block turns into gradients at a time: it keeps two sums of kDim
// columns, and beside those the scores of 64 queries and the parts of float32 products do not
// always fit in 255 registers.
template <typename T, int kDim>
constexpr int kKeyScoreTiles = kScoreTiles / (sizeof(T) == 2 ? (kDim <= 96 ? 1 : 2)
                                              : kDim <= 32   ? 1
                                              : kDim <= 96   ? 2
                                                             : 8);

template <typename T, int kDim, int kStages>
constexpr int kTilesBytes = (2 + 2 * kStages) * AttentionTile<T, kDim>::kBytes;
template <typename T, int kDim, int kStages>
constexpr int kQueryBytes =
    kTilesBytes<T, kDim, kStages> + 4 * (4 * kTileRows + kTileRows * kDiagonalStride);
template <typename T, int kDim, int kStages>
constexpr int kKeyBytes = kTilesBytes<T, kDim, kStages> + 4 * 4 * kTileRows;

// delta[head, token] = grad_out·out, a warp each.
template <typename T>
__global__ void __launch_bounds__(kAttentionThreads) delta_kernel(AttentionBackwardParams p) {
  const AttentionParams& f = p.forward;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (kAttentionThreads / kWarp) +
                      threadIdx.x / kWarp;  // [tokens, heads]
  if (row >= f.tokens * f.heads) return;
  const int lane = threadIdx.x % kWarp;
  float sum = 0.0f;
  for (int64_t col = lane * 2; col < f.head_dim; col += kWarp * 2) {
    float a[2], b[2];
    load<2>(static_cast<const T*>(p.grad_out) + row * f.head_dim + col, a);
    load<2>(static_cast<const T*>(f.out) + row * f.head_dim + col, b);
    sum = fmaf(a[0], b[0], fmaf(a[1], b[1], sum));
  }
  for (int step = kWarp / 2; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
  if (lane == 0) p.delta[row % f.heads * f.tokens + row / f.heads] = sum;
}

template <typename T>
__device__ inline const T* grad_out_rows(const AttentionBackwardParams& p,
                                         const AttentionBlock& b) {
  const AttentionParams& f = p.forward;
  return static_cast<const T*>(p.grad_out) + (b.row(f.heads) + b.head) * f.head_dim;
}

template <typename T>
__device__ inline T* grad_rows(const AttentionBackwardParams& p, const AttentionBlock& b,
                               int part) {
  const AttentionParams& f = p.forward;
  return static_cast<T*>(p.grad_qkv) + (b.row(3 * f.heads) + part * f.heads + b.head) * f.head_dim;
}

// lse (times log2 e; inf past the end, so that the probability is 0) and delta of a query.
struct RowValues {
  float lse, delta;
};

__device__ inline RowValues row_values(const AttentionBackwardParams& p, const AttentionBlock& b,
                                       int query) {
  if (query >= b.length) return {INFINITY, 0.0f};
  const int64_t at = b.head * p.forward.tokens + b.start + query;
  return {p.forward.lse[at] * kLog2E, p.delta[at]};
}

// Two operands' tiles of 64 rows of the sequence from `first` on.
template <typename T>
struct TwoRows {
  const T* rows[2];
  int64_t stride[2];
};

template <typename T, int kDim>
__device__ inline void copy_two(T* to, const TwoRows<T>& from, int first, int length,
                                int64_t head_dim) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    copy_tile<T, kDim>(to + i * AttentionTile<T, kDim>::kElements, from.rows[i], from.stride[i],
                       first, length, head_dim);
  }
}

// Adds the tile's gradient by diagonal, with `carry`, to the block's row, where `at` is the column
// of x = 0. Tiles begin at multiples of 64, so that a thread meets its own columns only. Then
// `carry` (thread t < 64: diagonal t) holds what the next key tile shares.
__device__ inline void add_diagonals(const float* grad_scores, float* diagonals, float* row,
                                     int64_t at, int64_t width, float* carry) {
  const int x = static_cast<int>(threadIdx.x);  // key - query + 63; x = 127 is empty
  const bool valid = x < kTileRows && at + x >= 0 && at + x < width;
  const float before = valid ? row[at + x] : 0.0f;  // early: it has all the sum to arrive
  const int first = x < kTileRows ? kTileRows - 1 - x : 0;
  const int last = x < kTileRows ? kTileRows : 2 * kTileRows - 1 - x;
  float sum = 0.0f;
  for (int r = first; r < last; ++r) {
    sum += grad_scores[r * kDiagonalStride + r + x - (kTileRows - 1)];
  }
  diagonals[x] = sum;
  __syncthreads();
  if (valid) row[at + x] = before + (*carry + sum);
  if (x < kTileRows) *carry = diagonals[x + kTileRows];
}

// `bias_row`: this block's row of bias_partials.
template <typename T, int kDim, int kStages>
__device__ inline void grad_query_tile(const AttentionBackwardParams& p, const AttentionBlock& b,
                                       float* bias_row) {
  using Tile = AttentionTile<T, kDim>;
  const AttentionParams& f = p.forward;
  T* queries = dynamic_shared<T>();  // then grad_out, then keys and values [stages, 2]
  T* keys = queries + 2 * Tile::kElements;
  float* bias = reinterpret_cast<float*>(keys + 2 * kStages * Tile::kElements);
  float* diagonals = bias + 2 * kTileRows;
  float* shared_grads = diagonals + 2 * kTileRows;
  const int64_t stride = f.heads * f.head_dim;
  const TwoRows<T> passing{{qkv_rows<T>(f, b, 1), qkv_rows<T>(f, b, 2)}, {3 * stride, 3 * stride}};
  const auto copy_keys = [&](int first) {
    copy_two<T, kDim>(keys + first / kTileRows % kStages * 2 * Tile::kElements, passing, first,
                      b.length, f.head_dim);
    cp_async_commit();
  };
  copy_two<T, kDim>(queries, {{qkv_rows<T>(f, b, 0), grad_out_rows<T>(p, b)}, {3 * stride, stride}},
                    b.first, b.length, f.head_dim);
  copy_keys(0);

  const AttentionDropout dropout = attention_dropout(f);
  const float scale = rsqrtf(static_cast<float>(f.head_dim));
  const int lane = threadIdx.x % kWarp, strip = threadIdx.x / kWarp * 16;
  const RowValues values[2] = {row_values(p, b, b.first + strip + lane / 4),
                               row_values(p, b, b.first + strip + lane / 4 + 8)};
  const int64_t width = 2 * f.max_seqlen - 1;
  const int64_t diagonal = f.max_seqlen - kTileRows - b.first;  // column of x = 0 at key 0
  float carry = 0.0f;
  float sums[1][kDim / 8][4] = {};
  for (int key = 0; key < b.length; key += kTileRows) {
    load_bias(bias, f, b.head, b.first, key);
    cp_async_wait<0>();
    __syncthreads();
    if (kStages == 2 && key + kTileRows < b.length) copy_keys(key + kTileRows);
    const T* tile = keys + key / kTileRows % kStages * 2 * Tile::kElements;
    const uint32_t kept = kept_by_query(dropout, b, b.first + strip, key);
    float scores[1][kScoreTiles][4] = {}, grads[1][kScoreTiles][4] = {};
    add_scores<T, kDim>(scores, queries + strip * Tile::kStride, tile);
    add_scores<T, kDim>(grads, queries + Tile::kElements + strip * Tile::kStride,
                        tile + Tile::kElements);
#pragma unroll
    for (int n = 0; n < kScoreTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = strip + lane / 4 + i / 2 * 8, col = n * 8 + lane % 4 * 2 + i % 2;
        const float x = fmaf(scores[0][n][i], scale * kLog2E, bias[col - row + kTileRows - 1]);
        const float prob = key + col < b.length ? exp2_approx(x - values[i / 2].lse) : 0.0f;
        const float grad = kept >> (4 * n + i) & 1u ? grads[0][n][i] * dropout.scale : 0.0f;
        grads[0][n][i] = prob * (grad - values[i / 2].delta);
        if (f.bias != nullptr) shared_grads[row * kDiagonalStride + col] = grads[0][n][i];
      }
    }
    add_weighted<T, kDim>(sums, grads, tile, b.length - key);
    __syncthreads();
    if (kStages == 1 && key + kTileRows < b.length) copy_keys(key + kTileRows);
    if (f.bias != nullptr) {
      add_diagonals(shared_grads, diagonals, bias_row, diagonal + key, width, &carry);
    }
  }
  const int64_t last = diagonal + (b.length + kTileRows - 1) / kTileRows * kTileRows + threadIdx.x;
  if (f.bias != nullptr && threadIdx.x < kTileRows && last < width) bias_row[last] += carry;
  const float factor[2] = {scale, scale};
  write_strip<T, kDim>(sums[0], factor, grad_rows<T>(p, b, 0), 3 * stride, b.first + strip,
                       b.length, f.head_dim);
}

template <typename T, int kDim, int kStages>
__global__ void __launch_bounds__(kAttentionThreads, 1)
    grad_query_kernel(AttentionBackwardParams p) {
  const AttentionParams& f = p.forward;
  const int64_t width = 2 * f.max_seqlen - 1;
  float* bias_row = p.bias_partials + (blockIdx.x * f.heads + blockIdx.y) * width;
  if (f.bias != nullptr) {
    for (int64_t i = threadIdx.x; i < width; i += kAttentionThreads) bias_row[i] = 0.0f;
    __syncthreads();
  }
  for_tiles<kTileRows>(
      f, [&](const AttentionBlock& b) { grad_query_tile<T, kDim, kStages>(p, b, bias_row); });
}

template <typename T, int kDim, int kStages>
__device__ inline void grad_key_tile(const AttentionBackwardParams& p, const AttentionBlock& b) {
  using Tile = AttentionTile<T, kDim>;
  constexpr int kTiles = kKeyScoreTiles<T, kDim>;
  const AttentionParams& f = p.forward;
  T* keys = dynamic_shared<T>();  // then values, then queries and grad_out [stages, 2]
  T* queries = keys + 2 * Tile::kElements;
  float* bias = reinterpret_cast<float*>(queries + 2 * kStages * Tile::kElements);
  float* lse = bias + 2 * kTileRows;
  float* delta = lse + kTileRows;
  const int64_t stride = f.heads * f.head_dim;
  const TwoRows<T> passing{{qkv_rows<T>(f, b, 0), grad_out_rows<T>(p, b)}, {3 * stride, stride}};
  const auto copy_queries = [&](int first) {
    copy_two<T, kDim>(queries + first / kTileRows % kStages * 2 * Tile::kElements, passing, first,
                      b.length, f.head_dim);
    cp_async_commit();
  };
  copy_two<T, kDim>(keys, {{qkv_rows<T>(f, b, 1), qkv_rows<T>(f, b, 2)}, {3 * stride, 3 * stride}},
                    b.first, b.length, f.head_dim);
  copy_queries(0);

  const AttentionDropout dropout = attention_dropout(f);
  const float scale = rsqrtf(static_cast<float>(f.head_dim));
  const int lane = threadIdx.x % kWarp, strip = threadIdx.x / kWarp * 16;
  float grad_keys[1][kDim / 8][4] = {}, grad_values[1][kDim / 8][4] = {};
  for (int query = 0; query < b.length; query += kTileRows) {
    load_bias(bias, f, b.head, query, b.first);
    if (threadIdx.x < kTileRows) {
      const RowValues v = row_values(p, b, query + static_cast<int>(threadIdx.x));
      lse[threadIdx.x] = v.lse;
      delta[threadIdx.x] = v.delta;
    }
    cp_async_wait<0>();
    __syncthreads();
    if (kStages == 2 && query + kTileRows < b.length) copy_queries(query + kTileRows);
    const T* tile = queries + query / kTileRows % kStages * 2 * Tile::kElements;
    const uint32_t kept = kept_by_key(dropout, b, query, b.first + strip);
#pragma unroll 1
    for (int first = 0; first < kTileRows; first += 8 * kTiles) {
      const T* part = tile + first * Tile::kStride;
      const int depth = b.length - query - first;
      float probs[1][kTiles][4] = {}, grads[1][kTiles][4] = {};
      add_scores<T, kDim>(probs, keys + strip * Tile::kStride, part);
      add_scores<T, kDim>(grads, keys + Tile::kElements + strip * Tile::kStride,
                          part + Tile::kElements);
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int row = strip + lane / 4 + i / 2 * 8, col = first + n * 8 + lane % 4 * 2 + i % 2;
          const float x = fmaf(probs[0][n][i], scale * kLog2E, bias[row - col + kTileRows - 1]);
          const float prob = exp2_approx(x - lse[col]);
          const bool keep = kept >> (first / 2 + 4 * n + i) & 1u;
          const float grad = keep ? grads[0][n][i] * dropout.scale : 0.0f;
          grads[0][n][i] = prob * (grad - delta[col]);
          probs[0][n][i] = keep ? prob : 0.0f;
        }
      }
      add_weighted<T, kDim>(grad_values, probs, part + Tile::kElements, depth);
      add_weighted<T, kDim>(grad_keys, grads, part, depth);
    }
    __syncthreads();
    if (kStages == 1 && query + kTileRows < b.length) copy_queries(query + kTileRows);
  }
  const float key_factor[2] = {scale, scale}, value_factor[2] = {dropout.scale, dropout.scale};
  write_strip<T, kDim>(grad_keys[0], key_factor, grad_rows<T>(p, b, 1), 3 * stride, b.first + strip,
                       b.length, f.head_dim);
  write_strip<T, kDim>(grad_values[0], value_factor, grad_rows<T>(p, b, 2), 3 * stride,
                       b.first + strip, b.length, f.head_dim);
}

template <typename T, int kDim, int kStages>
__global__ void __launch_bounds__(kAttentionThreads, 1) grad_key_kernel(AttentionBackwardParams p) {
  for_tiles<kTileRows>(p.forward,
                       [&](const AttentionBlock& b) { grad_key_tile<T, kDim, kStages>(p, b); });
}

template <typename T, int kDim, int kStages>
cudaError_t gradients(const AttentionBackwardParams& p, void* stream) {
  const AttentionParams& f = p.forward;
  const int64_t rows = ceil_div(f.tokens * f.heads, kAttentionThreads / kWarp);
  cudaError_t error =
      launch(delta_kernel<T>, dim3(grid_extent(rows)), dim3(kAttentionThreads), 0, stream, p);
  if (error != cudaSuccess) return error;
  const int64_t blocks = attention_blocks(f, kTileRows);
  error = launch_attention(grad_key_kernel<T, kDim, kStages>, attention_grid(f, blocks),
                           kKeyBytes<T, kDim, kStages>, stream, p);
  if (error != cudaSuccess) return error;
  return launch_attention(grad_query_kernel<T, kDim, kStages>,
                          attention_grid(f, f.bias == nullptr ? blocks : p.bias_rows),
                          kQueryBytes<T, kDim, kStages>, stream, p);
}

}  // namespace

int attention_backward_cuda(const AttentionBackwardParams& p, void* stream) {
  const AttentionParams& f = p.forward;
  const cudaError_t error = for_type_and_head_dim(f, [&]<typename T, int kDim>() {
    if constexpr (kLeastStages<T, kDim> < kMostStages<T>) {
      if (shared_memory_limit() < kQueryBytes<T, kDim, kMostStages<T>>) {
        return gradients<T, kDim, kLeastStages<T, kDim>>(p, stream);
      }
    }
    return gradients<T, kDim, kMostStages<T>>(p, stream);
  });
  if (error != cudaSuccess || f.bias == nullptr) return error;
  return launch_column_sum(p.bias_partials, p.grad_bias, p.bias_rows,
                           f.heads * (2 * f.max_seqlen - 1), false, stream);
}

SharedMemory attention_backward_shared_memory_cuda(const AttentionParams& p) {
  return shared_memory(p, [&]<typename T, int kDim>() {  // more than a key block's
    return kQueryBytes<T, kDim, kLeastStages<T, kDim>>;
  });
}

}  // namespace metro
