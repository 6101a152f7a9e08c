// Forward: a block a row. Its warps walk the sample tiles of the logits' tile, eight logits a lane,
// one exponential a logit (two when samples have a temperature of their own); the lanes' sums stay
// in shared memory, and a thread a sample tile turns them into what that tile bids. The exact bid
// of the scheme in vocab_head.h is computed for tiles only that could win, and a token is drawn at
// most once a tile of logits. Backward: a block owns a strip of columns and a block of rows, as in
// gelu_cuda.cu.
//
// The cost at N = 10240, H = 768, V = 65536 in bf16 on an H200 (4.8 TB/s, some 700 TFLOP/s in
// matrix products of this shape). Products: 1.03 TFLOP each, 1.47 ms. The logits are 1.34 GB,
// written by the product and read here: 0.28 ms; the gradient reads and writes them: 0.56 ms.
//  - A tile that stays in L2 (20 MB: 1024 columns) would save little of these, since L2 is hardly
//    faster than this memory, and its products fill the 132 multiprocessors badly: 320 blocks of
//    128 × 256, 2.4 waves, and 24 blocks for the weight's gradient [1024, 768]. At 256 MB a tile is
//    11008 columns: 26 waves, and 258 blocks, 1.95 waves, for the weight's gradient.
//  - Each tile's part of grad_hidden is rounded to bf16 and added in float32: 94 MB a tile, for six
//    tiles 0.13 ms. With 1024 columns it would be 6 GB.
//  - Few rows (N = 614) take tiles of 16384 columns, 20 MB, which do stay in L2.
// Backward needs the logits a second time: 4 products for 3 of useful work. Without the fourth the
// forward pass would have to leave grad_weight itself, which is right only if grad_nll is the same
// for every row; this operator takes any. So 3.09 TFLOP of useful work cost at least 5.9 ms of
// products and about 1 ms of passes: some 450 TFLOP/s, estimated, not yet run on a GPU.
#include "common/cuda_launch.cuh"
#include "common/cuda_vector.cuh"
#include "common/philox.h"
#include "vocab_head/vocab_head.h"

namespace metro {
namespace {

using cuda::ceil_div;
using cuda::from_float;
using cuda::kWarp;
using cuda::launch;
using cuda::load;
using cuda::store;
using cuda::to_float;

constexpr int kItems = 8;  // logits a lane: a warp covers a sample tile
static_assert(kItems * kWarp == kSampleTile);
constexpr unsigned kAll = 0xffffffffu;
constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarp;
constexpr int kTiles = kMaxCudaTile / kSampleTile;
constexpr int kGradThreads = 256;
constexpr int kGradWarps = kGradThreads / kWarp;

// Logits of a lane: `left` columns of the tile are left from its first on; -inf beyond.
template <typename T, bool kWide>
__device__ inline void load_logits(const T* logits, const float* bias, int64_t left,
                                   float (&z)[kItems]) {
  float b[kItems];
  if (kWide) {
#pragma unroll
    for (int i = 0; i < kItems; ++i) z[i] = -INFINITY;
    if (left <= 0) return;
    load<kItems>(logits, z);
    load<kItems>(bias, b);
#pragma unroll
    for (int i = 0; i < kItems; ++i) z[i] += b[i];
  } else {
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      z[i] = i < left ? to_float(logits[i]) + bias[i] : -INFINITY;
    }
  }
}

__device__ inline float largest(const float (&z)[kItems]) {
  float high = -3.402823466e38f;  // as on the CPU: never -inf, and NaN is passed over
#pragma unroll
  for (int i = 0; i < kItems; ++i) high = fmaxf(high, z[i]);
  return high;
}

__device__ inline float warp_max(float x) {
  for (int mask = kWarp / 2; mask > 0; mask /= 2) x = fmaxf(x, __shfl_xor_sync(kAll, x, mask));
  return x;
}

__device__ inline float warp_sum(float x) {
  for (int mask = kWarp / 2; mask > 0; mask /= 2) x += __shfl_xor_sync(kAll, x, mask);
  return x;
}

// exp of common/simd.h, the same bits: no contraction but the written ones.
__device__ inline float exact_exp(float x) {
  const bool underflow = x < -87.0f;
  x = x > 88.0f ? 88.0f : x;
  const float shift = 12582912.0f;
  const float shifted = fmaf(x, 1.44269504f, shift);
  const float n = shifted - shift;
  float r = fmaf(n, -0.693359375f, x);
  r = fmaf(n, 2.12194440e-4f, r);
  float poly = 1.38145583e-3f;
  poly = fmaf(poly, r, 8.36870955e-3f);
  poly = fmaf(poly, r, 4.16683881e-2f);
  poly = fmaf(poly, r, 1.66665207e-1f);
  poly = fmaf(poly, r, 4.99999935e-1f);
  poly = __fadd_rn(fmaf(__fmul_rn(poly, r), r, r), 1.0f);
  const uint32_t scale = (__float_as_uint(shifted) << 23) + 0x3f800000u;
  return underflow ? 0.0f : __fmul_rn(poly, __uint_as_float(scale));
}

// What the warps of a block share.
struct Shared {
  float partial[kTiles][kWarp + 1];  // lanes' sums of a sample tile, relative to its reference
  float reference[kTiles];
  float bid[kTiles];
  float weights[kSampleTile];
  float warp_high[kWarps];
  float warp_total[kWarps];
  int64_t warp_first[kWarps];
};

template <typename T, bool kWide>
struct Row {
  const VocabHeadTileParams& p;
  const T* logits;    // [cols]
  const float* bias;  // [cols]
  int64_t row;

  // The lane's logits of a sample tile.
  __device__ void at(int64_t tile, float (&z)[kItems]) const {
    const int64_t column = tile * kSampleTile + (threadIdx.x % kWarp) * kItems;
    load_logits<T, kWide>(logits + column, bias + column, p.cols - column, z);
  }
};

// Words of a sample tile's draw.
template <typename R>
__device__ inline Philox4 draw(const R& r, int64_t tile) {
  return philox(static_cast<uint64_t>(*r.p.seed), static_cast<uint32_t>(r.row),
                static_cast<uint32_t>(r.p.begin / kSampleTile + tile),
                counter_word(Purpose::kSample, r.p.draw), 0);
}

// One warp: the weights of a sample tile into shared memory, and what the tile bids.
template <typename R>
__device__ inline float exact_bid(const R& r, int64_t tile, Shared& s) {
  const int lane = threadIdx.x % kWarp;
  float z[kItems];
  r.at(tile, z);
  const float high = warp_max(largest(z));
  __syncwarp();
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    s.weights[lane * kItems + i] =
        exact_exp(__fmul_rn(__fsub_rn(z[i], high), r.p.inverse_temperature));
  }
  __syncwarp();
  float sum = 0.0f;  // of every sixteenth weight; lanes 16 to 31 repeat the others
  for (int i = lane % kSumLanes; i < kSampleTile; i += kSumLanes) sum += s.weights[i];
  for (int mask = kSumLanes / 2; mask > 0; mask /= 2) sum += __shfl_xor_sync(kAll, sum, mask);
  const float scaled = __fmul_rn(high, r.p.inverse_temperature);
  return __fadd_rn(__fadd_rn(scaled, natural_log(sum)), gumbel(draw(r, tile).word[0]));
}

// Step 2 of the sampling scheme, by one thread, in the CPU's order.
__device__ inline int64_t draw_token(const float* weights, int64_t n, float u) {
  float total = 0.0f;
  for (int64_t i = 0; i < n; ++i) total += weights[i];
  const float threshold = __fmul_rn(u, total);
  float running = 0.0f;
  for (int64_t i = 0; i < n; ++i) {
    running += weights[i];
    if (running > threshold || running == total) return i;
  }
  return 0;
}

// How far a bid by the fast exponential may be off, with room to spare.
__device__ inline float margin(float bid) { return 1e-4f + 1e-6f * fabsf(bid); }

// One warp: the winner among the sample tiles, if one outbids the earlier tiles of logits.
template <typename R>
__device__ inline void sample_row(const R& r, int tiles, Shared& s, VocabRow* state) {
  const int lane = threadIdx.x % kWarp;
  float best = state->best;
  float floor = -INFINITY;
  for (int t = lane; t < tiles; t += kWarp) floor = fmaxf(floor, s.bid[t] - margin(s.bid[t]));
  floor = fmaxf(warp_max(floor), best);
  int winner = -1, last = -1;
  for (int t = 0; t < tiles; ++t) {
    if (!(s.bid[t] + margin(s.bid[t]) >= floor)) continue;
    const float bid = exact_bid(r, t, s);
    last = t;
    if (bid > best) {
      best = bid;
      winner = t;
    }
  }
  if (winner < 0) return;
  if (last != winner) exact_bid(r, winner, s);
  state->best = best;
  if (lane == 0) {
    const int64_t first = static_cast<int64_t>(winner) * kSampleTile;
    const int64_t n = r.p.cols - first < kSampleTile ? r.p.cols - first : kSampleTile;
    state->sample = r.p.begin + first + draw_token(s.weights, n, uniform(draw(r, winner).word[1]));
  }
}

__device__ inline void finish_row(const VocabHeadTileParams& p, int64_t row,
                                  const VocabRow& state) {
  const int64_t target = p.target[row];
  const bool ignored = target == kIgnoredTarget;
  const float lse = state.max + logf(state.sum);
  p.lse[row] = lse;
  p.nll[row] = ignored ? 0.0f : lse - state.target_logit;
  p.hit[row] = !ignored && state.argmax == target;
  if (p.seed) p.sample[row] = state.sample;
}

// How far a logit may stand above the reference before the latter is raised: e^20 · 256 is finite.
constexpr float kHeadroom = 20.0f;

template <typename T, bool kWide>
__global__ void __launch_bounds__(kThreads) tile_kernel(VocabHeadTileParams p) {
  __shared__ Shared s;
  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;
  const int64_t row = blockIdx.x;
  const Row<T, kWide> r{p, static_cast<const T*>(p.logits) + row * p.cols, p.bias + p.begin, row};
  const int tiles = static_cast<int>((p.cols + kSampleTile - 1) / kSampleTile);
  const bool sampled = p.seed != nullptr;
  const bool own_scale = sampled && p.inverse_temperature != 1.0f;
  VocabRow state = p.begin == 0 ? VocabRow{-INFINITY, 0.0f, 0.0f, -INFINITY, 0, 0} : p.state[row];

  const float headroom = kHeadroom / fmaxf(1.0f, p.inverse_temperature);
  float reference = -INFINITY, total = 0.0f, lane_high = -INFINITY;
  int lane_tile = 0;
  for (int t = warp; t < tiles; t += kWarps) {
    float z[kItems];
    r.at(t, z);
    const float high = largest(z);
    if (high > lane_high) {
      lane_high = high;
      lane_tile = t;
    }
    if (__any_sync(kAll, high > reference + headroom)) {  // seldom after the first tile
      const float raised = fmaxf(reference, warp_max(high));
      total *= __expf(reference - raised);
      reference = raised;
    }
    float sum = 0.0f, scaled = 0.0f;
#pragma unroll
    for (int i = 0; i < kItems; ++i) sum += __expf(z[i] - reference);
    total += sum;
    if (own_scale) {
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        scaled += __expf((z[i] - reference) * p.inverse_temperature);
      }
    }
    if (sampled) {
      s.partial[t][lane] = own_scale ? scaled : sum;
      if (lane == 0) s.reference[t] = reference;
    }
  }

  // The row's maximum, the first column that has it, and the sum relative to it.
  const float high = warp_max(lane_high);
  if (lane == 0) s.warp_high[warp] = high;
  __syncthreads();
  float row_high = s.warp_high[0];
  for (int w = 1; w < kWarps; ++w) row_high = fmaxf(row_high, s.warp_high[w]);
  int64_t first = INT64_MAX;
  if (lane_high == row_high) {
    const int64_t column = static_cast<int64_t>(lane_tile) * kSampleTile + lane * kItems;
    float z[kItems];
    load_logits<T, kWide>(r.logits + column, r.bias + column, p.cols - column, z);
#pragma unroll
    for (int i = kItems - 1; i >= 0; --i) first = z[i] == row_high ? column + i : first;
  }
  for (int mask = kWarp / 2; mask > 0; mask /= 2) {
    const int64_t other = __shfl_xor_sync(kAll, first, mask);
    first = other < first ? other : first;
  }
  const float part = warp_sum(total == 0.0f ? 0.0f : total * __expf(reference - row_high));
  if (lane == 0) {
    s.warp_first[warp] = first;
    s.warp_total[warp] = part;
  }
  for (int t = threadIdx.x; sampled && t < tiles; t += kThreads) {
    float sum = 0.0f;
    for (int l = 0; l < kWarp; ++l) sum += s.partial[t][l];
    const float log_sum = sum > 1e-37f ? natural_log(sum) : sum >= 0.0f ? -INFINITY : sum;
    s.bid[t] = s.reference[t] * p.inverse_temperature + log_sum + gumbel(draw(r, t).word[0]);
  }
  __syncthreads();
  if (warp != 0) return;

  if (sampled) sample_row(r, tiles, s, &state);
  if (lane != 0) return;
  float sum = 0.0f;
  for (int w = 0; w < kWarps; ++w) {
    sum += s.warp_total[w];
    first = s.warp_first[w] < first ? s.warp_first[w] : first;
  }
  if (row_high > state.max) {
    state.sum = state.sum * expf(state.max - row_high) + sum;
    state.max = row_high;
    state.argmax = p.begin + (first == INT64_MAX ? 0 : first);
  } else {
    state.sum += sum * expf(row_high - state.max);
  }
  const int64_t at = p.target[row] - p.begin;
  if (at >= 0 && at < p.cols) state.target_logit = to_float(r.logits[at]) + r.bias[at];
  if (p.begin + p.cols == p.vocab) {
    finish_row(p, row, state);
  } else {
    p.state[row] = state;
  }
}

template <typename T, bool kWide>
__global__ void __launch_bounds__(kGradThreads) grad_kernel(VocabHeadGradParams p) {
  __shared__ float shared[kGradWarps][kSampleTile];
  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kSampleTile + lane * kItems;
  const int64_t left = p.cols - column;
  const int64_t begin = p.rows * blockIdx.y / gridDim.y;
  const int64_t end = p.rows * (blockIdx.y + 1) / gridDim.y;
  float sums[kItems] = {};
  for (int64_t row = begin + warp; row < end && left > 0; row += kGradWarps) {
    T* logits = static_cast<T*>(p.logits) + row * p.cols + column;
    const int64_t target = p.target[row];
    const float scale = target == kIgnoredTarget ? 0.0f : p.grad_nll[row];
    float grad[kItems] = {};
    if (scale != 0.0f) {
      load_logits<T, kWide>(logits, p.bias + p.begin + column, left, grad);
      const float lse = p.lse[row];
      const int64_t at = target - p.begin - column;
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        grad[i] = scale * (__expf(grad[i] - lse) - (at == i ? 1.0f : 0.0f));
        sums[i] += grad[i];
      }
    }
    if (kWide) {
      store<kItems>(logits, grad);
    } else {
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        if (i < left) logits[i] = from_float<T>(grad[i]);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kItems; ++i) shared[warp][lane * kItems + i] = sums[i];
  __syncthreads();
  const int64_t own = static_cast<int64_t>(blockIdx.x) * kSampleTile + threadIdx.x;
  if (own >= p.cols) return;
  float sum = 0.0f;
  for (int w = 0; w < kGradWarps; ++w) sum += shared[w][threadIdx.x];
  p.partials[blockIdx.y * p.cols + own] = sum;
}
static_assert(kGradThreads == kSampleTile);

__global__ void __launch_bounds__(kGradThreads)
    column_sum_kernel(const float* partials, float* out, int64_t blocks, int64_t cols) {
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kGradThreads + threadIdx.x;
  if (column >= cols) return;
  float sum = 0.0f;
  for (int64_t block = 0; block < blocks; ++block) sum += partials[block * cols + column];
  out[column] = sum;
}

// No __restrict__: for float32, `sum` and `out` are the same memory.
template <typename T, int N>
__global__ void __launch_bounds__(kGradThreads) accumulate_kernel(VocabHeadAccumulateParams p) {
  const int64_t at = (static_cast<int64_t>(blockIdx.x) * kGradThreads + threadIdx.x) * N;
  if (at >= p.count) return;
  float x[N];
  load<N>(static_cast<const T*>(p.product) + at, x);
  if (!p.first) {
    float sum[N];
    load<N>(p.sum + at, sum);
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] += sum[i];
  }
  store<N>(p.sum + at, x);
  if (p.last) store<N>(static_cast<T*>(p.out) + at, x);
}

template <typename T>
cudaError_t tile_pass(const VocabHeadTileParams& p, void* stream) {
  const bool wide = p.cols % kItems == 0 && cuda::vector_width<T>(p.cols, p.logits, p.bias) > 1;
  return launch(wide ? tile_kernel<T, true> : tile_kernel<T, false>,
                dim3(static_cast<unsigned>(p.rows)), dim3(kThreads), 0, stream, p);
}

template <typename T>
cudaError_t grad_tile(const VocabHeadGradParams& p, void* stream) {
  const bool wide = p.cols % kItems == 0 && cuda::vector_width<T>(p.cols, p.logits, p.bias) > 1;
  const unsigned strips = static_cast<unsigned>(ceil_div(p.cols, kSampleTile));
  const unsigned blocks = static_cast<unsigned>(vocab_head_row_blocks(p.rows));
  const cudaError_t error = launch(wide ? grad_kernel<T, true> : grad_kernel<T, false>,
                                   dim3(strips, blocks), dim3(kGradThreads), 0, stream, p);
  if (error != cudaSuccess) return error;
  return launch(column_sum_kernel, dim3(strips), dim3(kGradThreads), 0, stream,
                static_cast<const float*>(p.partials), p.grad_bias + p.begin,
                static_cast<int64_t>(blocks), p.cols);
}

template <typename T>
cudaError_t accumulate(const VocabHeadAccumulateParams& p, void* stream) {
  constexpr int kWidth = 16 / sizeof(T);
  const bool wide = cuda::vector_width<T>(p.count, p.product, p.sum, p.out) == kWidth;
  const int64_t threads = wide ? ceil_div(p.count, kWidth) : p.count;
  return launch(wide ? accumulate_kernel<T, kWidth> : accumulate_kernel<T, 1>,
                dim3(static_cast<unsigned>(ceil_div(threads, kGradThreads))), dim3(kGradThreads), 0,
                stream, p);
}

}  // namespace

#define METRO_BY_DTYPE(function, p, stream)      \
  switch ((p).dtype) {                           \
    case DType::kFloat32:                        \
      return function<float>(p, stream);         \
    case DType::kBFloat16:                       \
      return function<__nv_bfloat16>(p, stream); \
    case DType::kFloat16:                        \
      return function<__half>(p, stream);        \
  }                                              \
  return cudaErrorInvalidValue

int vocab_head_tile_pass_cuda(const VocabHeadTileParams& p, void* stream) {
  METRO_BY_DTYPE(tile_pass, p, stream);
}

int vocab_head_grad_tile_cuda(const VocabHeadGradParams& p, void* stream) {
  METRO_BY_DTYPE(grad_tile, p, stream);
}

int vocab_head_accumulate_cuda(const VocabHeadAccumulateParams& p, void* stream) {
  METRO_BY_DTYPE(accumulate, p, stream);
}

}  // namespace metro
