// Forward, FlashAttention-2 (Dao, arXiv 2307.08691): a block per (tile of 64 queries, sequence,
// head) passes over the key tiles. In 16-bit types the next key tile is copied while this one is
// worked on; float32 tiles of 128 columns would not fit twice.
//
// Floor: 4 · length² · head_dim FLOPs a (sequence, head) on the tensor cores (three times that in
// float32); qkv read once, out and lse written once, keys and values re-read from L2.
#include "attention/attention_cuda.cuh"

namespace metro {
namespace {

using namespace cuda;  // NOLINT: the helpers of attention_cuda.cuh

constexpr float kLowest = -1e30f;

template <typename T>
constexpr int kStages = sizeof(T) == 2 ? 2 : 1;

template <typename T, int kDim>
constexpr int kForwardBytes =
    (1 + 2 * kStages<T>)*AttentionTile<T, kDim>::kBytes + 2 * kTileRows * 4;

// What a warp keeps of its 16 queries between key tiles; lanes hold rows group and group + 8.
template <int kDim>
struct Softmax {
  float sums[kDim / 8][4];
  float normalizer[2];  // this lane's share
  float reference[2];   // the exponent taken out, a power of two
};

// From scores to probabilities relative to the row's maximum so far, rescaling what was summed.
template <int kDim>
__device__ inline void softmax_step(float (&scores)[kScoreTiles][4], const float* bias, float scale,
                                    int keys, uint32_t kept, Softmax<kDim>* s) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const float* row_bias = bias + (kTileRows - 1) - (warp * 16 + lane / 4 + 8 * h);
    float top = s->reference[h];
#pragma unroll
    for (int n = 0; n < kScoreTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int key = n * 8 + lane % 4 * 2 + e;
        float& x = scores[n][2 * h + e];
        x = key < keys ? fmaf(x, scale, row_bias[key]) : -INFINITY;
        top = fmaxf(top, x);
      }
    }
    top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
    top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
    const float factor = exp2_approx(s->reference[h] - top);
    s->reference[h] = top;
    s->normalizer[h] *= factor;
#pragma unroll
    for (int n = 0; n < kDim / 8; ++n) {
      s->sums[n][2 * h] *= factor;
      s->sums[n][2 * h + 1] *= factor;
    }
#pragma unroll
    for (int n = 0; n < kScoreTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float& x = scores[n][2 * h + e];
        x = exp2_approx(x - top);
        s->normalizer[h] += x;
        if ((kept >> (4 * n + 2 * h + e) & 1u) == 0) x = 0.0f;
      }
    }
  }
}

template <typename T, int kDim>
__device__ inline void write_out(const AttentionParams& p, const AttentionBlock& b, int first,
                                 float scale, Softmax<kDim>* s) {
  const int lane = threadIdx.x % kWarp;
  float factor[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float sum = s->normalizer[h];
    sum += __shfl_xor_sync(~0u, sum, 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
    factor[h] = scale / sum;
    const int row = first + lane / 4 + 8 * h;
    if (lane % 4 == 0 && row < b.length) {
      p.lse[b.head * p.tokens + b.start + row] = (s->reference[h] + log2f(sum)) * kLn2;
    }
  }
  T* out = static_cast<T*>(p.out) + (b.start * p.heads + b.head) * p.head_dim;
  write_strip<T, kDim>(s->sums, factor, out, p.heads * p.head_dim, first, b.length, p.head_dim);
}

template <typename T, int kDim>
__global__ void __launch_bounds__(kAttentionThreads, 2) forward_kernel(AttentionParams p) {
  using Tile = AttentionTile<T, kDim>;
  const AttentionBlock b = attention_block(p);
  if (b.first >= b.length) return;
  T* queries = dynamic_shared<T>();
  T* keys = queries + Tile::kElements;  // [stages, 2]: keys and values
  float* bias = reinterpret_cast<float*>(keys + 2 * kStages<T> * Tile::kElements);
  const int64_t stride = 3 * p.heads * p.head_dim;
  const auto copy_keys = [&](int first) {
    T* to = keys + first / kTileRows % kStages<T> * 2 * Tile::kElements;
    copy_tile<T, kDim>(to, qkv_rows<T>(p, b, 1), stride, first, b.length, p.head_dim);
    copy_tile<T, kDim>(to + Tile::kElements, qkv_rows<T>(p, b, 2), stride, first, b.length,
                       p.head_dim);
    cp_async_commit();
  };
  copy_tile<T, kDim>(queries, qkv_rows<T>(p, b, 0), stride, b.first, b.length, p.head_dim);
  copy_keys(0);

  const AttentionDropout dropout = attention_dropout(p);
  const float scale = rsqrtf(static_cast<float>(p.head_dim)) * kLog2E;
  const int strip = threadIdx.x / kWarp * 16;
  Softmax<kDim> s = {{}, {0.0f, 0.0f}, {kLowest, kLowest}};
  for (int key = 0; key < b.length; key += kTileRows) {
    load_bias(bias, p, b.head, b.first, key);
    cp_async_wait<0>();
    __syncthreads();  // this tile and its bias have come; nobody reads the other stage any more
    if (kStages<T> == 2 && key + kTileRows < b.length) copy_keys(key + kTileRows);
    const T* tile = keys + key / kTileRows % kStages<T> * 2 * Tile::kElements;
    float scores[kScoreTiles][4] = {};
    add_scores<T, kDim>(scores, queries + strip * Tile::kStride, tile);
    const uint32_t kept = kept_by_query(dropout, b, b.first + strip, key);
    softmax_step<kDim>(scores, bias, scale, b.length - key, kept, &s);
    add_weighted<T, kDim>(s.sums, scores, tile + Tile::kElements);
    __syncthreads();
    if (kStages<T> == 1 && key + kTileRows < b.length) copy_keys(key + kTileRows);
  }
  write_out<T, kDim>(p, b, b.first + strip, dropout.scale, &s);
}

}  // namespace

int attention_cuda(const AttentionParams& p, void* stream) {
  if (p.tokens == 0) return cudaSuccess;
  return for_type_and_head_dim(p, [&]<typename T, int kDim>() {
    return launch_attention(forward_kernel<T, kDim>, attention_grid(p), kForwardBytes<T, kDim>,
                            stream, p);
  });
}

}  // namespace metro
