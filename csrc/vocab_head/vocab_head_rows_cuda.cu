// What each row of logits says: its log-sum-exp, loss, hit and sample. A block a row. Its warps
// walk the sample tiles, eight logits a lane, one exponential a logit (two when samples have a
// temperature of their own); the lanes' sums stay in shared memory, and a thread a sample tile
// turns them into what that tile bids. The exact bid of the scheme in vocab_head.h is computed for
// tiles only that could win, and a token is drawn at most once a group of tiles.
//
// The whole operator at N = 10240, H = 768, V = 65536 in bf16 on an H200 (4.8 TB/s, 50 MB of L2,
// some 750 TFLOP/s in products of this shape), estimated, not yet run on a GPU. Three products of
// 1.03 TFLOP, 1.37 ms each: 4.1 ms. What else there is depends on the rows R of a chunk:
//  - R = 256: the chunk's logits, 34 MB, stay in L2. But the weight's gradient is then made of 40
//    products of depth 256, which read and write 100 MB each: 42 us of memory against 34 of
//    arithmetic, 1.7 ms in all, and twice that if they were added up in float32.
//  - R = N: one product for the weight's gradient and nothing added up, but N x V is held: 1.34 GB.
//  - R = 3456, a chunk of 453 MB (kCudaChunkElements): three products for it, of which two add to
//    what is there: 0.5 GB, 0.1 ms, under the arithmetic. The logits go through memory: this pass
//    reads them, 0.28 ms, the gradient reads and writes them, 0.56 ms; that the products do so too
//    is hidden by their arithmetic. The hidden states' gradient [3456, 768] has 81 tiles of 128 x
//    256 for 132 multiprocessors; with the depth of 65536 cuBLAS can split it.
// So about 5.1 ms, 600 TFLOP/s of useful work; chunks in L2 would take 5.8 ms and more launches.
// Few rows (N = 614) are one chunk of 80 MB.
//
// float32 sums of the weight's gradient across chunks would double their traffic and need a buffer
// of 201 MB; in bf16 it is rounded once a chunk, at most kMaxChunks times.
#include "common/cuda_launch.cuh"
#include "common/philox.h"
#include "vocab_head/vocab_head_cuda.cuh"

namespace metro {
namespace {

using cuda::kWarp;
using cuda::launch;
using cuda::to_float;
using cuda::warp_max;
using cuda::warp_sum;
using vocab::kItems;
using vocab::load_logits;

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarp;
constexpr int kTiles = 64;  // sample tiles of a group: 9 KB of partial sums

// What a row carries from group to group.
struct VocabRow {
  float max;           // of the logits so far
  float sum;           // sum of exp(logit - max)
  float target_logit;  // once its group has passed
  float best;          // largest bid so far
  int64_t argmax;      // first index of max
  int64_t sample;      // the token drawn in the tile of `best`
};

__device__ inline float largest(const float (&z)[kItems]) {
  float high = -3.402823466e38f;  // as on the CPU: never -inf, and NaN is passed over
#pragma unroll
  for (int i = 0; i < kItems; ++i) high = fmaxf(high, z[i]);
  return high;
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

// What the warps of a block share; `row` is warp 0's.
struct Shared {
  VocabRow row;
  float partial[kTiles][kWarp + 1];  // lanes' sums of a sample tile, relative to its reference
  float reference[kTiles];
  float bid[kTiles];
  float weights[kSampleTile];
  float warp_high[kWarps];
  float warp_total[kWarps];
  int64_t warp_first[kWarps];
};

// A group of up to kTiles sample tiles of one row.
template <typename T, bool kWide>
struct Group {
  const VocabHeadRowsParams& p;
  const T* logits;    // [cols]
  const float* bias;  // [cols]
  int64_t row;
  int64_t begin;  // column of the row
  int64_t cols;

  // The lane's logits of a sample tile.
  __device__ void at(int64_t tile, float (&z)[kItems]) const {
    const int64_t column = tile * kSampleTile + (threadIdx.x % kWarp) * kItems;
    load_logits<T, kWide>(logits + column, bias + column, cols - column, z);
  }
};

// Words of a sample tile's draw.
template <typename G>
__device__ inline Philox4 draw(const G& g, int64_t tile) {
  return philox(static_cast<uint64_t>(*g.p.seed), static_cast<uint32_t>(g.p.first_row + g.row),
                static_cast<uint32_t>(g.begin / kSampleTile + tile),
                counter_word(Purpose::kSample, g.p.draw), 0);
}

// One warp: the weights of a sample tile into shared memory, and what the tile bids.
template <typename G>
__device__ inline float exact_bid(const G& g, int64_t tile, Shared& s) {
  const int lane = threadIdx.x % kWarp;
  float z[kItems];
  g.at(tile, z);
  const float high = warp_max(largest(z));
  __syncwarp();
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    s.weights[lane * kItems + i] =
        exact_exp(__fmul_rn(__fsub_rn(z[i], high), g.p.inverse_temperature));
  }
  __syncwarp();
  float sum = 0.0f;  // of every sixteenth weight; lanes 16 to 31 repeat the others
  for (int i = lane % kSumLanes; i < kSampleTile; i += kSumLanes) sum += s.weights[i];
  for (int mask = kSumLanes / 2; mask > 0; mask /= 2)
    sum += __shfl_xor_sync(cuda::kAllLanes, sum, mask);
  const float scaled = __fmul_rn(high, g.p.inverse_temperature);
  return __fadd_rn(__fadd_rn(scaled, natural_log(sum)), gumbel(draw(g, tile).word[0]));
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

// One warp: the winner among the sample tiles, if one outbids those of the earlier groups.
template <typename G>
__device__ inline void sample_row(const G& g, int tiles, Shared& s) {
  const int lane = threadIdx.x % kWarp;
  float best = s.row.best;
  float floor = -INFINITY;
  for (int t = lane; t < tiles; t += kWarp) floor = fmaxf(floor, s.bid[t] - margin(s.bid[t]));
  floor = fmaxf(warp_max(floor), best);
  int winner = -1, last = -1;
  for (int t = 0; t < tiles; ++t) {
    if (!(s.bid[t] + margin(s.bid[t]) >= floor)) continue;
    const float bid = exact_bid(g, t, s);
    last = t;
    if (bid > best) {
      best = bid;
      winner = t;
    }
  }
  if (winner < 0) return;
  if (last != winner) exact_bid(g, winner, s);
  if (lane == 0) {
    s.row.best = best;
    const int64_t first = static_cast<int64_t>(winner) * kSampleTile;
    const int64_t n = g.cols - first < kSampleTile ? g.cols - first : kSampleTile;
    s.row.sample = g.begin + first + draw_token(s.weights, n, uniform(draw(g, winner).word[1]));
  }
}

__device__ inline void finish_row(const VocabHeadRowsParams& p, int64_t row,
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
__device__ inline void fold_group(const Group<T, kWide>& g, Shared& s) {
  const VocabHeadRowsParams& p = g.p;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int tiles = static_cast<int>((g.cols + kSampleTile - 1) / kSampleTile);
  const bool sampled = p.seed != nullptr;
  const bool own_scale = sampled && p.inverse_temperature != 1.0f;
  const float headroom = kHeadroom / fmaxf(1.0f, p.inverse_temperature);
  float reference = -INFINITY, total = 0.0f, lane_high = -INFINITY;
  int lane_tile = 0;
  for (int t = warp; t < tiles; t += kWarps) {
    float z[kItems];
    g.at(t, z);
    const float high = largest(z);
    if (high > lane_high) {
      lane_high = high;
      lane_tile = t;
    }
    if (__any_sync(cuda::kAllLanes, high > reference + headroom)) {  // seldom after the first tile
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
    load_logits<T, kWide>(g.logits + column, g.bias + column, g.cols - column, z);
#pragma unroll
    for (int i = kItems - 1; i >= 0; --i) first = z[i] == row_high ? column + i : first;
  }
  for (int mask = kWarp / 2; mask > 0; mask /= 2) {
    const int64_t other = __shfl_xor_sync(cuda::kAllLanes, first, mask);
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
    s.bid[t] = s.reference[t] * p.inverse_temperature + log_sum + gumbel(draw(g, t).word[0]);
  }
  __syncthreads();
  if (warp != 0) return;

  if (sampled) sample_row(g, tiles, s);
  if (lane != 0) return;
  VocabRow* state = &s.row;
  float sum = 0.0f;
  for (int w = 0; w < kWarps; ++w) {
    sum += s.warp_total[w];
    first = s.warp_first[w] < first ? s.warp_first[w] : first;
  }
  if (row_high > state->max) {
    state->sum = state->sum * expf(state->max - row_high) + sum;
    state->max = row_high;
    state->argmax = g.begin + (first == INT64_MAX ? 0 : first);
  } else {
    state->sum += sum * expf(row_high - state->max);
  }
  const int64_t at = p.target[g.row] - g.begin;
  if (at >= 0 && at < g.cols) state->target_logit = to_float(g.logits[at]) + g.bias[at];
}

template <typename T, bool kWide>
__global__ void __launch_bounds__(kThreads) rows_kernel(VocabHeadRowsParams p) {
  __shared__ Shared s;
  const int64_t row = blockIdx.x;
  const T* logits = static_cast<const T*>(p.logits) + row * p.vocab;
  if (threadIdx.x == 0) s.row = {-INFINITY, 0.0f, 0.0f, -INFINITY, 0, 0};
  for (int64_t begin = 0; begin < p.vocab; begin += kTiles * kSampleTile) {
    const int64_t left = p.vocab - begin;
    const int64_t cols = left < kTiles * kSampleTile ? left : kTiles * kSampleTile;
    if (begin > 0) __syncthreads();  // warp 0 is done with the group before
    fold_group(Group<T, kWide>{p, logits + begin, p.bias + begin, row, begin, cols}, s);
  }
  if (threadIdx.x == 0) finish_row(p, row, s.row);
}

template <typename T>
cudaError_t run(const VocabHeadRowsParams& p, void* stream) {
  const bool wide = vocab::loads_wide<T>(p.vocab, p.logits, p.bias);
  return launch(wide ? rows_kernel<T, true> : rows_kernel<T, false>,
                dim3(static_cast<unsigned>(p.rows)), dim3(kThreads), 0, stream, p);
}

}  // namespace

int vocab_head_rows_cuda(const VocabHeadRowsParams& p, void* stream) {
  return cuda::by_dtype(p.dtype, [&](auto type) { return run<decltype(type)>(p, stream); });
}

}  // namespace metro
