// mask_tokens in three launches: every token's draw (a thread a token), the choice of the positions
// (one block: a radix selection of four passes over 5 bytes a token, which lie in L2, four tokens a
// thread at a time, and one pass that numbers the selected tokens in their order), and what the
// selected tokens become (a thread a slot). replace_tokens in two: all tokens (17 bytes each), then
// the slots (33 bytes each): 0.6 MB at 32K tokens, a fraction of a microsecond, so that wider
// accesses than a warp's whole lines would gain nothing beside the launches. All arithmetic is on
// integers, so that the results are those of the CPU kernels bit for bit.
#include "common/cuda_launch.cuh"
#include "common/philox.h"
#include "corruption/corruption.h"

namespace metro {
namespace {

using cuda::ceil_div;
using cuda::kWarp;
using cuda::launch;

constexpr int kThreads = 256;
constexpr int kSelectThreads = 1024;
constexpr int kSelectWarps = kSelectThreads / kWarp;
constexpr int kDigits = 256;  // of one radix pass
constexpr unsigned kAll = 0xffffffffu;

__device__ inline int64_t global_thread() {
  return static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
}

__device__ inline Philox4 draw(uint64_t seed, int64_t t) {
  const uint64_t index = static_cast<uint64_t>(t);
  return philox(seed, static_cast<uint32_t>(index), static_cast<uint32_t>(index >> 32),
                counter_word(Purpose::kMask, 0), 0);
}

__global__ void __launch_bounds__(kThreads) draw_kernel(MaskTokensParams p) {
  const int64_t t = global_thread();
  if (t >= p.length) return;
  const int64_t token = p.tokens[t];
  p.order[t] = draw(static_cast<uint64_t>(*p.seed), t).word[0];
  bool maskable = true;
  for (int64_t k = 0; k < p.special_count; ++k) maskable = maskable && token != p.special[k];
  p.maskable[t] = maskable;
  p.masked[t] = token;
}

// Selected are the maskable tokens of an order below `pivot`, and the first `ties` equal to it.
struct Cut {
  uint32_t pivot;
  int64_t ties;
};

// The sum of `x` over the threads of the block, in every thread. `shared` holds kSelectWarps.
__device__ inline int block_sum(int x, int* shared) {
  for (int mask = kWarp / 2; mask > 0; mask /= 2) x += __shfl_xor_sync(kAll, x, mask);
  if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = x;
  __syncthreads();
  int sum = 0;
  for (int w = 0; w < kSelectWarps; ++w) sum += shared[w];
  return sum;
}

// The digit that holds the left-th token, and which of its tokens that is; one lane finds it.
struct Digit {
  bool here;
  uint32_t digit;
  int64_t left;
};

// One warp, eight digits a lane; `left` is at least 1 and at most the sum of the histogram.
__device__ inline Digit find_digit(const int* histogram, int64_t left) {
  constexpr int kOwn = kDigits / kWarp;
  const int lane = threadIdx.x;
  int own = 0;
  for (int i = 0; i < kOwn; ++i) own += histogram[lane * kOwn + i];
  int through = own;  // the sum over this lane and those before it
  for (int step = 1; step < kWarp; step *= 2) {
    const int before = __shfl_up_sync(kAll, through, step);
    through += lane >= step ? before : 0;
  }
  if (left > through || left <= through - own) return {};
  left -= through - own;
  uint32_t digit = static_cast<uint32_t>(lane * kOwn);
  while (left > histogram[digit]) left -= histogram[digit++];
  return {true, digit, left};
}

// Adds the digits at `shift` of the maskable tokens whose order begins with `prefix`.
__device__ inline void add_digits(const MaskTokensParams& p, int shift, uint64_t prefix,
                                  int* histogram) {
  constexpr int kOwn = 4;  // 16 bytes of `order`, which torch aligns
  const auto add = [&](uint64_t order, uint8_t maskable) {
    if (maskable && order >> (shift + 8) == prefix) {
      atomicAdd(&histogram[(order >> shift) & (kDigits - 1)], 1);
    }
  };
  const int64_t whole = p.length / kOwn;
#pragma unroll 2
  for (int64_t i = threadIdx.x; i < whole; i += kSelectThreads) {
    const uint4 order = reinterpret_cast<const uint4*>(p.order)[i];
    const uchar4 maskable = reinterpret_cast<const uchar4*>(p.maskable)[i];
    add(order.x, maskable.x);
    add(order.y, maskable.y);
    add(order.z, maskable.z);
    add(order.w, maskable.w);
  }
  const int64_t t = whole * kOwn + threadIdx.x;
  if (t < p.length) add(p.order[t], p.maskable[t]);
}

// Radix selection of the count-th smallest order, eight bits a pass; the first pass counts the
// maskable tokens too.
__device__ inline Cut find_cut(const MaskTokensParams& p) {
  __shared__ int warp_sums[kSelectWarps];
  __shared__ int histogram[kDigits];
  __shared__ uint32_t shared_prefix;
  __shared__ int64_t shared_left;
  uint64_t prefix = 0;
  int64_t left = p.count;
  for (int shift = 24; shift >= 0; shift -= 8) {
    if (threadIdx.x < kDigits) histogram[threadIdx.x] = 0;
    __syncthreads();
    add_digits(p, shift, prefix, histogram);
    __syncthreads();
    if (shift == 24) {
      const int own = threadIdx.x < kDigits ? histogram[threadIdx.x] : 0;
      if (block_sum(own, warp_sums) <= p.count) return {UINT32_MAX, p.length};
    }
    if (threadIdx.x < kWarp) {
      const Digit found = find_digit(histogram, left);
      if (found.here) {
        shared_prefix = static_cast<uint32_t>(prefix << 8 | found.digit);
        shared_left = found.left;
      }
    }
    __syncthreads();
    prefix = shared_prefix;
    left = shared_left;
  }
  return {static_cast<uint32_t>(prefix), left};
}

// Tokens in rounds of one a thread; a ballot and the warps' totals number those of a round.
__global__ void __launch_bounds__(kSelectThreads) select_kernel(MaskTokensParams p) {
  __shared__ int below_totals[2][kSelectWarps];
  __shared__ int tie_totals[2][kSelectWarps];
  const Cut cut = find_cut(p);
  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;
  const unsigned earlier = (1u << lane) - 1u;
  int64_t slot_base = 0;
  int64_t ties_left = cut.ties;
  int buffer = 0;  // alternates, so that one barrier a round is enough
  for (int64_t first = 0; first < p.length && slot_base < p.count; first += kSelectThreads) {
    const int64_t t = first + threadIdx.x;
    const bool maskable = t < p.length && p.maskable[t];
    const uint32_t order = maskable ? p.order[t] : 0;
    const bool below = maskable && order < cut.pivot;
    const bool tie = maskable && order == cut.pivot;
    const unsigned below_mask = __ballot_sync(kAll, below);
    const unsigned tie_mask = __ballot_sync(kAll, tie);
    if (lane == 0) {
      below_totals[buffer][warp] = __popc(below_mask);
      tie_totals[buffer][warp] = __popc(tie_mask);
    }
    __syncthreads();
    int64_t below_rank = __popc(below_mask & earlier), tie_rank = __popc(tie_mask & earlier);
    int64_t below_all = 0, tie_all = 0;
    for (int w = 0; w < kSelectWarps; ++w) {
      below_rank += w < warp ? below_totals[buffer][w] : 0;
      tie_rank += w < warp ? tie_totals[buffer][w] : 0;
      below_all += below_totals[buffer][w];
      tie_all += tie_totals[buffer][w];
    }
    const int64_t taken = tie_rank < ties_left ? tie_rank : ties_left;
    const int64_t slot = slot_base + below_rank + taken;
    if ((below || (tie && tie_rank < ties_left)) && slot < p.count) {
      p.position[slot] = t;
      p.target[slot] = p.tokens[t];
    }
    const int64_t taken_all = tie_all < ties_left ? tie_all : ties_left;
    slot_base += below_all + taken_all;
    ties_left -= taken_all;
    buffer ^= 1;
  }
  for (int64_t slot = slot_base + threadIdx.x; slot < p.count; slot += kSelectThreads) {
    p.position[slot] = 0;
    p.target[slot] = kIgnoredTarget;
  }
}

// The n-th id that is not special.
__device__ inline int64_t ordinary_id(const MaskTokensParams& p, int64_t n) {
  for (int64_t k = 0; k < p.special_count && p.special[k] <= n; ++k) ++n;
  return n;
}

__global__ void __launch_bounds__(kThreads) mask_kernel(MaskTokensParams p) {
  const int64_t slot = global_thread();
  if (slot >= p.count || p.target[slot] == kIgnoredTarget) return;
  const int64_t t = p.position[slot];
  const Philox4 drawn = draw(static_cast<uint64_t>(*p.seed), t);
  if (drawn.word[1] < p.mask_threshold) {
    p.masked[t] = p.mask_id;
  } else if (drawn.word[1] < p.random_threshold) {
    const uint64_t scaled =
        static_cast<uint64_t>(drawn.word[2]) * static_cast<uint64_t>(p.ordinary);
    p.masked[t] = ordinary_id(p, static_cast<int64_t>(scaled >> 32));
  }
}

__global__ void __launch_bounds__(kThreads) copy_kernel(ReplaceTokensParams p) {
  const int64_t t = global_thread();
  if (t >= p.length) return;
  const int64_t token = p.tokens[t];
  p.corrupted[t] = token;
  p.label[t] = token == p.pad_id ? 255 : 0;
}

__global__ void __launch_bounds__(kThreads) replace_kernel(ReplaceTokensParams p) {
  const int64_t slot = global_thread();
  if (slot >= p.count || p.target[slot] == kIgnoredTarget) return;
  const int64_t t = p.position[slot], token = p.tokens[t];
  p.corrupted[t] = p.sample[slot];
  if (token != p.pad_id) p.label[t] = p.sample[slot] != token;
}

template <typename Params>
cudaError_t launch_over(void (*kernel)(Params), int64_t items, const Params& p, void* stream) {
  return launch(kernel, dim3(static_cast<unsigned>(ceil_div(items, kThreads))), dim3(kThreads), 0,
                stream, p);
}

}  // namespace

int mask_tokens_cuda(const MaskTokensParams& p, void* stream) {
  cudaError_t error = launch_over(draw_kernel, p.length, p, stream);
  if (error != cudaSuccess || p.count == 0) return error;
  error = launch(select_kernel, dim3(1), dim3(kSelectThreads), 0, stream, p);
  if (error != cudaSuccess) return error;
  return launch_over(mask_kernel, p.count, p, stream);
}

int replace_tokens_cuda(const ReplaceTokensParams& p, void* stream) {
  const cudaError_t error = launch_over(copy_kernel, p.length, p, stream);
  if (error != cudaSuccess) return error;
  return launch_over(replace_kernel, p.count, p, stream);
}

}  // namespace metro
