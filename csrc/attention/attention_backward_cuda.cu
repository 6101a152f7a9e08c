// Backward in two passes over recomputed probabilities, so that nothing is added atomically: a
// block per tile of 64 keys sums grad_k and grad_v in registers over the query tiles, a block per
// tile of 64 queries sums grad_q over the key tiles. The scores and grad_out·vᵀ are made twice: 7
// products where one pass with atomics needs 5, and the same bits in every run.
//
// The bias gradient: a query block writes a tile of grad_score to shared memory, thread x adds up
// diagonal x in the order of the rows, and what neighbouring key tiles share is carried from one to
// the next. Each block leaves one vector by diagonal; the last kernel adds those of all blocks in
// a fixed order.
//
// Floor: 14 · length² · head_dim FLOPs a (sequence, head); qkv, out, grad_out and lse read once,
// grad_qkv written once, the tiles of the inner loops re-read from L2.
#include "attention/attention_cuda.cuh"

namespace metro {
namespace {

using namespace cuda;  // NOLINT: the helpers of attention_cuda.cuh

constexpr int kBiasThreads = 256;
constexpr int kDiagonalStride = kTileRows + 1;  // neighbouring diagonals in neighbouring banks

// Two tiles that stay, two that pass, twice in 16-bit types.
template <typename T>
constexpr int kStages = sizeof(T) == 2 ? 2 : 1;
// Tiles of 8 queries that a key block turns into gradients at a time: it keeps two sums of kDim
// columns, and beside two of 96 or 128 the scores of 64 queries and the parts of float32 products
// do not fit in 255 registers.
template <typename T, int kDim>
constexpr int kKeyScoreTiles = sizeof(T) == 2 || kDim <= 64 ? kScoreTiles
                               : kDim <= 96                 ? kScoreTiles / 2
                                                            : kScoreTiles / 4;
template <typename T, int kDim>
constexpr int kTilesBytes = (2 + 2 * kStages<T>)*AttentionTile<T, kDim>::kBytes;
template <typename T, int kDim>
constexpr int kQueryBytes =
    kTilesBytes<T, kDim> + 4 * (4 * kTileRows + kTileRows * kDiagonalStride);
template <typename T, int kDim>
constexpr int kKeyBytes = kTilesBytes<T, kDim> + 4 * 4 * kTileRows;

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
  return static_cast<const T*>(p.grad_out) + (b.start * f.heads + b.head) * f.head_dim;
}

template <typename T>
__device__ inline T* grad_rows(const AttentionBackwardParams& p, const AttentionBlock& b,
                               int part) {
  const AttentionParams& f = p.forward;
  return static_cast<T*>(p.grad_qkv) + ((b.start * 3 + part) * f.heads + b.head) * f.head_dim;
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

// The tile's gradient by diagonal, added to `carry` (thread t < 64: diagonal t) and written; then
// `carry` holds the diagonals that the next key tile shares.
__device__ inline void add_diagonals(const float* grad_scores, float* diagonals, float* out,
                                     float* carry) {
  const int x = static_cast<int>(threadIdx.x);  // key - query + 63; x = 127 is empty
  const int first = x < kTileRows ? kTileRows - 1 - x : 0;
  const int last = x < kTileRows ? kTileRows : 2 * kTileRows - 1 - x;
  float sum = 0.0f;
  for (int row = first; row < last; ++row) {
    sum += grad_scores[row * kDiagonalStride + row + x - (kTileRows - 1)];
  }
  diagonals[x] = sum;
  __syncthreads();
  if (x < kTileRows) {
    out[x] = *carry + sum;
    *carry = diagonals[x + kTileRows];
  }
}

template <typename T, int kDim>
__global__ void __launch_bounds__(kAttentionThreads, 1)
    grad_query_kernel(AttentionBackwardParams p) {
  using Tile = AttentionTile<T, kDim>;
  const AttentionParams& f = p.forward;
  const AttentionBlock b = attention_block(f);
  if (b.first >= b.length) return;
  T* queries = dynamic_shared<T>();  // then grad_out, then keys and values [stages, 2]
  T* keys = queries + 2 * Tile::kElements;
  float* bias = reinterpret_cast<float*>(keys + 2 * kStages<T> * Tile::kElements);
  float* diagonals = bias + 2 * kTileRows;
  float* shared_grads = diagonals + 2 * kTileRows;
  const int64_t stride = f.heads * f.head_dim;
  const TwoRows<T> passing{{qkv_rows<T>(f, b, 1), qkv_rows<T>(f, b, 2)}, {3 * stride, 3 * stride}};
  const auto copy_keys = [&](int first) {
    copy_two<T, kDim>(keys + first / kTileRows % kStages<T> * 2 * Tile::kElements, passing, first,
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
  const int64_t slot = b.start / kTileRows + b.sequence + b.first / kTileRows;
  float* partial = p.bias_partials + (b.head * attention_slots(f) + slot) * attention_slot_width(f);
  float carry = 0.0f;
  float sums[kDim / 8][4] = {};
  for (int key = 0; key < b.length; key += kTileRows) {
    load_bias(bias, f, b.head, b.first, key);
    cp_async_wait<0>();
    __syncthreads();
    if (kStages<T> == 2 && key + kTileRows < b.length) copy_keys(key + kTileRows);
    const T* tile = keys + key / kTileRows % kStages<T> * 2 * Tile::kElements;
    const uint32_t kept = kept_by_query(dropout, b, b.first + strip, key);
    float scores[kScoreTiles][4] = {}, grads[kScoreTiles][4] = {};
    add_scores<T, kDim>(scores, queries + strip * Tile::kStride, tile);
    add_scores<T, kDim>(grads, queries + Tile::kElements + strip * Tile::kStride,
                        tile + Tile::kElements);
#pragma unroll
    for (int n = 0; n < kScoreTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = strip + lane / 4 + i / 2 * 8, col = n * 8 + lane % 4 * 2 + i % 2;
        const float x = fmaf(scores[n][i], scale * kLog2E, bias[col - row + kTileRows - 1]);
        const float prob = key + col < b.length ? exp2_approx(x - values[i / 2].lse) : 0.0f;
        const float grad = kept >> (4 * n + i) & 1u ? grads[n][i] * dropout.scale : 0.0f;
        grads[n][i] = prob * (grad - values[i / 2].delta);
        if (f.bias != nullptr) shared_grads[row * kDiagonalStride + col] = grads[n][i];
      }
    }
    add_weighted<T, kDim>(sums, grads, tile);
    __syncthreads();
    if (kStages<T> == 1 && key + kTileRows < b.length) copy_keys(key + kTileRows);
    if (f.bias != nullptr) add_diagonals(shared_grads, diagonals, partial + key, &carry);
  }
  if (f.bias != nullptr && threadIdx.x < kTileRows) {
    partial[(b.length + kTileRows - 1) / kTileRows * kTileRows + threadIdx.x] = carry;
  }
  const float factor[2] = {scale, scale};
  write_strip<T, kDim>(sums, factor, grad_rows<T>(p, b, 0), 3 * stride, b.first + strip, b.length,
                       f.head_dim);
}

template <typename T, int kDim>
__global__ void __launch_bounds__(kAttentionThreads, 1) grad_key_kernel(AttentionBackwardParams p) {
  using Tile = AttentionTile<T, kDim>;
  constexpr int kTiles = kKeyScoreTiles<T, kDim>;
  const AttentionParams& f = p.forward;
  const AttentionBlock b = attention_block(f);
  if (b.first >= b.length) return;
  T* keys = dynamic_shared<T>();  // then values, then queries and grad_out [stages, 2]
  T* queries = keys + 2 * Tile::kElements;
  float* bias = reinterpret_cast<float*>(queries + 2 * kStages<T> * Tile::kElements);
  float* lse = bias + 2 * kTileRows;
  float* delta = lse + kTileRows;
  const int64_t stride = f.heads * f.head_dim;
  const TwoRows<T> passing{{qkv_rows<T>(f, b, 0), grad_out_rows<T>(p, b)}, {3 * stride, stride}};
  const auto copy_queries = [&](int first) {
    copy_two<T, kDim>(queries + first / kTileRows % kStages<T> * 2 * Tile::kElements, passing,
                      first, b.length, f.head_dim);
    cp_async_commit();
  };
  copy_two<T, kDim>(keys, {{qkv_rows<T>(f, b, 1), qkv_rows<T>(f, b, 2)}, {3 * stride, 3 * stride}},
                    b.first, b.length, f.head_dim);
  copy_queries(0);

  const AttentionDropout dropout = attention_dropout(f);
  const float scale = rsqrtf(static_cast<float>(f.head_dim));
  const int lane = threadIdx.x % kWarp, strip = threadIdx.x / kWarp * 16;
  float grad_keys[kDim / 8][4] = {}, grad_values[kDim / 8][4] = {};
  for (int query = 0; query < b.length; query += kTileRows) {
    load_bias(bias, f, b.head, query, b.first);
    if (threadIdx.x < kTileRows) {
      const RowValues v = row_values(p, b, query + static_cast<int>(threadIdx.x));
      lse[threadIdx.x] = v.lse;
      delta[threadIdx.x] = v.delta;
    }
    cp_async_wait<0>();
    __syncthreads();
    if (kStages<T> == 2 && query + kTileRows < b.length) copy_queries(query + kTileRows);
    const T* tile = queries + query / kTileRows % kStages<T> * 2 * Tile::kElements;
    const uint32_t kept = kept_by_key(dropout, b, query, b.first + strip);
#pragma unroll 1
    for (int first = 0; first < kTileRows; first += 8 * kTiles) {
      const T* part = tile + first * Tile::kStride;
      float probs[kTiles][4] = {}, grads[kTiles][4] = {};
      add_scores<T, kDim>(probs, keys + strip * Tile::kStride, part);
      add_scores<T, kDim>(grads, keys + Tile::kElements + strip * Tile::kStride,
                          part + Tile::kElements);
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int row = strip + lane / 4 + i / 2 * 8, col = first + n * 8 + lane % 4 * 2 + i % 2;
          const float x = fmaf(probs[n][i], scale * kLog2E, bias[row - col + kTileRows - 1]);
          const float prob = exp2_approx(x - lse[col]);
          const bool keep = kept >> (first / 2 + 4 * n + i) & 1u;
          const float grad = keep ? grads[n][i] * dropout.scale : 0.0f;
          grads[n][i] = prob * (grad - delta[col]);
          probs[n][i] = keep ? prob : 0.0f;
        }
      }
      add_weighted<T, kDim>(grad_values, probs, part + Tile::kElements);
      add_weighted<T, kDim>(grad_keys, grads, part);
    }
    __syncthreads();
    if (kStages<T> == 1 && query + kTileRows < b.length) copy_queries(query + kTileRows);
  }
  const float key_factor[2] = {scale, scale}, value_factor[2] = {dropout.scale, dropout.scale};
  write_strip<T, kDim>(grad_keys, key_factor, grad_rows<T>(p, b, 1), 3 * stride, b.first + strip,
                       b.length, f.head_dim);
  write_strip<T, kDim>(grad_values, value_factor, grad_rows<T>(p, b, 2), 3 * stride,
                       b.first + strip, b.length, f.head_dim);
}

// grad_bias[head, column]: 32 columns a block, the query blocks' vectors of every eighth sequence a
// warp, in the order of the tokens, and then the warps' sums in theirs.
__global__ void __launch_bounds__(kBiasThreads) bias_sum_kernel(AttentionBackwardParams p) {
  constexpr int kWarps = kBiasThreads / kWarp;
  __shared__ float shared[kWarps][kWarp];
  const AttentionParams& f = p.forward;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t width = attention_slot_width(f), columns = 2 * f.max_seqlen - 1;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kWarp + lane;
  const float* partials = p.bias_partials + blockIdx.y * attention_slots(f) * width;
  float sum = 0.0f;
  for (int64_t s = warp; s < f.sequences; s += kWarps) {
    const int64_t start = f.cu_seqlens[s], length = f.cu_seqlens[s + 1] - start;
    const int64_t tiles = (length + kTileRows - 1) / kTileRows;
    const float* vectors = partials + (start / kTileRows + s) * width;
#pragma unroll 4
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t x = column - (f.max_seqlen - 1) + kTileRows - 1 + tile * kTileRows;
      if (x >= 0 && x < (tiles + 1) * kTileRows) sum += vectors[tile * width + x];
    }
  }
  shared[warp][lane] = sum;
  __syncthreads();
  if (warp != 0 || column >= columns) return;
  for (int w = 1; w < kWarps; ++w) sum += shared[w][lane];
  p.grad_bias[blockIdx.y * columns + column] = sum;
}

template <typename T, int kDim>
cudaError_t gradients(const AttentionBackwardParams& p, void* stream) {
  const AttentionParams& f = p.forward;
  const int64_t blocks = ceil_div(f.tokens * f.heads, kAttentionThreads / kWarp);
  cudaError_t error =
      launch(delta_kernel<T>, dim3(grid_extent(blocks)), dim3(kAttentionThreads), 0, stream, p);
  if (error != cudaSuccess) return error;
  error =
      launch_attention(grad_key_kernel<T, kDim>, attention_grid(f), kKeyBytes<T, kDim>, stream, p);
  if (error != cudaSuccess) return error;
  return launch_attention(grad_query_kernel<T, kDim>, attention_grid(f), kQueryBytes<T, kDim>,
                          stream, p);
}

}  // namespace

int attention_backward_cuda(const AttentionBackwardParams& p, void* stream) {
  const AttentionParams& f = p.forward;
  if (f.tokens > 0) {
    const cudaError_t error = for_type_and_head_dim(
        f, [&]<typename T, int kDim>() { return gradients<T, kDim>(p, stream); });
    if (error != cudaSuccess) return error;
  }
  if (f.bias == nullptr) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>(ceil_div(2 * f.max_seqlen - 1, kWarp)),
                  static_cast<unsigned>(f.heads));
  return launch(bias_sum_kernel, grid, dim3(kBiasThreads), 0, stream, p);
}

}  // namespace metro
