// Forward, FlashAttention-2 (Dao, arXiv 2307.08691): a block per (tile of queries, sequence, head)
// passes over the key tiles. In 16-bit types the next key tile is copied while this one is worked
// on; float32 tiles of 128 columns would not fit twice.
//
// Floor: 4 · length² · head_dim FLOPs a (sequence, head) on the tensor cores (three times that in
// float32); qkv read once, out and lse written once, keys and values re-read from L2.
//
// What mma.sync allows, by counting, not yet run on a GPU. In bf16 at d = 64 a block's 128 queries
// against 64 keys keep a multiprocessor's units busy for these clocks:
//   tensor cores, 512 mma      1024 on sm_80; 810 on sm_90 at the 63 % of their peak that mma.sync
//                              was measured at (Luo et al., arXiv 2402.13499)
//   shared memory, 160 ldmatrix 640; with one strip of 16 queries a warp it would be 1152
//   8192 exponentials, 16 a clock 512; other arithmetic on scores, some 6 instructions each, 384
// Registers (bench/results/cuda_resources.json) leave two blocks a multiprocessor, one's softmax
// under the other's products. An H100 is then between 280 TFLOP/s (nothing overlaps) and 600.
// The first run decides about wgmma, which reads keys and values from shared memory itself and has
// 512 clocks in place of 810: worth a kernel of its own if the tensor or shared-memory pipe is the
// busiest one, and not if exponentials and arithmetic are. The backward kernels, one strip a warp,
// load 1.1 clocks of ldmatrix for one of mma: measure two strips there first.
#include "attention/attention_cuda.cuh"

namespace metro {
namespace {

using namespace cuda;  // NOLINT: the helpers of attention_cuda.cuh

constexpr float kLowest = -1e30f;

template <typename T>
constexpr int kStages = sizeof(T) == 2 ? 2 : 1;

// Strips of 16 queries a warp: two share every fragment of keys and values that is loaded, where
// the registers allow it.
template <typename T, int kDim>
constexpr int kStrips = sizeof(T) == 2 && kDim <= 64 ? 2 : 1;
template <typename T, int kDim>
constexpr int kQueries = kStrips<T, kDim> * kTileRows;

template <typename T, int kDim>
constexpr int kForwardBytes = (kStrips<T, kDim> + 2 * kStages<T>)*AttentionTile<T, kDim>::kBytes +
                              (kQueries<T, kDim> + kTileRows) * 4;

// What a warp keeps of a strip between key tiles; lanes hold rows group and group + 8.
struct Softmax {
  float normalizer[2] = {0.0f, 0.0f};       // this lane's share
  float reference[2] = {kLowest, kLowest};  // the exponent taken out, a power of two
};

// From scores to probabilities relative to the row's maximum so far, rescaling what was summed.
// `bias` is that of the strip's first query and the tile's first key.
template <int kDim>
__device__ inline void softmax_step(float (&scores)[kScoreTiles][4], float (&sums)[kDim / 8][4],
                                    const float* bias, float scale, int keys, uint32_t kept,
                                    Softmax* s) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const float* row_bias = bias - (lane / 4 + 8 * h);
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
      sums[n][2 * h] *= factor;
      sums[n][2 * h + 1] *= factor;
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
                                 float scale, const Softmax& s, const float (&sums)[kDim / 8][4]) {
  const int lane = threadIdx.x % kWarp;
  float factor[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float sum = s.normalizer[h];
    sum += __shfl_xor_sync(~0u, sum, 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
    factor[h] = scale / sum;
    const int row = first + lane / 4 + 8 * h;
    if (lane % 4 == 0 && row < b.length) {
      p.lse[b.head * p.tokens + b.start + row] = (s.reference[h] + log2f(sum)) * kLn2;
    }
  }
  T* out = static_cast<T*>(p.out) + (b.row(p.heads) + b.head) * p.head_dim;
  write_strip<T, kDim>(sums, factor, out, p.heads * p.head_dim, first, b.length, p.head_dim);
}

template <typename T, int kDim>
__device__ inline void forward_tile(const AttentionParams& p, const AttentionBlock& b) {
  using Tile = AttentionTile<T, kDim>;
  constexpr int kM = kStrips<T, kDim>, kRows = kQueries<T, kDim>;
  T* queries = dynamic_shared<T>();
  T* keys = queries + kM * Tile::kElements;  // [stages, 2]: keys and values
  float* bias = reinterpret_cast<float*>(keys + 2 * kStages<T> * Tile::kElements);
  const int64_t stride = 3 * p.heads * p.head_dim;
  const auto copy_keys = [&](int first) {
    T* to = keys + first / kTileRows % kStages<T> * 2 * Tile::kElements;
    copy_tile<T, kDim>(to, qkv_rows<T>(p, b, 1), stride, first, b.length, p.head_dim);
    copy_tile<T, kDim>(to + Tile::kElements, qkv_rows<T>(p, b, 2), stride, first, b.length,
                       p.head_dim);
    cp_async_commit();
  };
  copy_tile<T, kDim, kRows>(queries, qkv_rows<T>(p, b, 0), stride, b.first, b.length, p.head_dim);
  copy_keys(0);

  const AttentionDropout dropout = attention_dropout(p);
  const float scale = rsqrtf(static_cast<float>(p.head_dim)) * kLog2E;
  const int first = threadIdx.x / kWarp * 16 * kM;  // this warp's rows of the tile
  const bool active = b.first + first < b.length;
  Softmax s[kM];
  float sums[kM][kDim / 8][4] = {};
  for (int key = 0; key < b.length; key += kTileRows) {
    load_bias<kRows>(bias, p, b.head, b.first, key);
    cp_async_wait<0>();
    __syncthreads();  // this tile and its bias have come; nobody reads the other stage any more
    if (kStages<T> == 2 && key + kTileRows < b.length) copy_keys(key + kTileRows);
    if (active) {
      const T* tile = keys + key / kTileRows % kStages<T> * 2 * Tile::kElements;
      float scores[kM][kScoreTiles][4] = {};
      add_scores<T, kDim>(scores, queries + first * Tile::kStride, tile);
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        const int strip = first + 16 * m;
        const uint32_t kept = kept_by_query(dropout, b, b.first + strip, key);
        softmax_step<kDim>(scores[m], sums[m], bias + (kRows - 1) - strip, scale, b.length - key,
                           kept, &s[m]);
      }
      add_weighted<T, kDim>(sums, scores, tile + Tile::kElements, b.length - key);
    }
    __syncthreads();
    if (kStages<T> == 1 && key + kTileRows < b.length) copy_keys(key + kTileRows);
  }
#pragma unroll
  for (int m = 0; m < kM; ++m) {
    write_out<T, kDim>(p, b, b.first + first + 16 * m, dropout.scale, s[m], sums[m]);
  }
}

// Blocks a multiprocessor that the registers shall allow.
template <typename T, int kDim>
constexpr int kBlocks = kStrips<T, kDim> == 1 && kDim <= 32 ? 3 : 2;

template <typename T, int kDim>
__global__ void __launch_bounds__(kAttentionThreads, kBlocks<T, kDim>)
    forward_kernel(AttentionParams p) {
  for_tiles<kQueries<T, kDim>>(p, [&](const AttentionBlock& b) { forward_tile<T, kDim>(p, b); });
}

}  // namespace

int attention_cuda(const AttentionParams& p, void* stream) {
  return for_type_and_head_dim(p, [&]<typename T, int kDim>() {
    return launch_attention(forward_kernel<T, kDim>,
                            attention_grid(p, attention_blocks(p, kQueries<T, kDim>)),
                            kForwardBytes<T, kDim>, stream, p);
  });
}

SharedMemory attention_shared_memory_cuda(const AttentionParams& p) {
  return shared_memory(p, [&]<typename T, int kDim>() { return kForwardBytes<T, kDim>; });
}

}  // namespace metro
