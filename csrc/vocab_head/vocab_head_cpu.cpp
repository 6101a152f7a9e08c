// Forward, a chunk of rows at a time: the logits of a sample tile for all rows of the chunk, and
// while they are in L2 what the tile contributes to each row; then the rows, from their tiles.
#include "vocab_head/vocab_head_cpu.h"

#include <cfloat>
#include <cmath>

#include "common/parallel.h"
#include "common/philox_simd.h"

namespace metro::METRO_CPU_NS {
namespace {

// ---- Logits ----

// Panels of up to kPanel rows, the width as depth.
template <typename T, typename U>
void pack_hidden(const Chunk& c) {
  const int64_t units = units_of<U>(c.p.width);
  U* packed = static_cast<U*>(c.p.work.hidden_columns);
  parallel_for(0, (c.rows + kPanel - 1) / kPanel, 1, [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel) {
      const int64_t row = panel * kPanel;
      pack_transposed(c.hidden<T>(row), c.p.width, c.rows - row, c.p.width,
                      packed + panel * units * kPanel);
    }
  });
}

// The weight of a tile as units along the width, without a copy where it lies so already.
inline bool lies_in_units(const float*, const float*, int64_t) { return true; }
inline bool lies_in_units(const bf16*, const float*, int64_t) { return false; }
inline bool lies_in_units(const bf16*, const Pair*, int64_t width) { return width % 2 == 0; }

// Rows of the weight that are multiplied at a time: they stay in L2 for all panels of hidden
// states.
constexpr int64_t kWeightRows = 64;

// out [n, kPanel] = logits of `n` ≤ kWeightRows columns for a panel of rows.
template <typename T, typename U>
void multiply_logits(const Chunk& c, int64_t column, int64_t n, int64_t panel, float* out) {
  const int64_t units = units_of<U>(c.p.width), width = c.p.width;
  const int64_t rows = c.rows - panel * kPanel;
  const U* packed = static_cast<const U*>(c.p.work.hidden_columns) + panel * units * kPanel;
  const T* weight = c.weight<T>(column);
  // The last of an odd number of rows has no neighbour to be multiplied with.
  const bool direct = lies_in_units(weight, static_cast<U*>(nullptr), width) && n % 2 == 0;
  U copy[kWeightRows * kBlockUnits];
  for (int64_t at = 0; at < units; at += kBlockUnits) {
    const int64_t depth = units - at < kBlockUnits ? units - at : kBlockUnits;
    Left<U> left{reinterpret_cast<const U*>(weight) + at, units, 1};
    if (!direct) {
      const int64_t begin = at * kDepth<U>, most = depth * kDepth<U>;
      pack_left(weight + begin, width, n, (n + 1) / 2 * 2,
                width - begin < most ? width - begin : most, copy, kBlockUnits);
      left = {copy, kBlockUnits, 1};
    }
    multiply_panel(left, n, packed + at * kPanel, depth, out, rows < kPanel ? rows : kPanel,
                   at > 0);
  }
}

template <typename T, typename U>
void make_logits(const Chunk& c, int64_t tile) {
  float product[kWeightRows * kPanel];
  const int64_t end = tile * kSampleTile + c.tile_columns(tile);
  const int64_t panels = (c.rows + kPanel - 1) / kPanel;
  for (int64_t begin = tile * kSampleTile; begin < end; begin += kWeightRows) {
    const int64_t n = end - begin < kWeightRows ? end - begin : kWeightRows;
    const int64_t left = c.p.vocab - begin - n;
    const int64_t next = (left < kWeightRows ? left : kWeightRows) * c.p.width;
    for (int64_t panel = 0; panel < panels; ++panel) {
      prefetch(c.weight<T>(begin + n), next * static_cast<int64_t>(sizeof(T)), panel, panels);
      multiply_logits<T, U>(c, begin, n, panel, product);
      const int64_t row = panel * kPanel;
      const int64_t width = c.stride() - row < kPanel ? c.stride() - row : kPanel;
      for (int64_t i = 0; i < n; ++i) {
        T* logits = c.logits<T>(begin + i) + row;
        for (int64_t j = 0; j < width; j += kLanes)
          store(logits + j, load(product + i * kPanel + j));
      }
    }
  }
}

// ---- What a tile contributes ----

// Σ exp((z - high) · scale) for kLanes rows, in kSumLanes partial sums each.
inline vf sum_exp(const vf* z, int64_t n, vf high, float scale) {
  vf sums[kSumLanes] = {};
  int64_t i = 0;
  for (; i + kSumLanes <= n; i += kSumLanes) {
    for (int64_t j = 0; j < kSumLanes; ++j) sums[j] += exp((z[i + j] - high) * scale);
  }
  for (int64_t j = 0; i + j < n; ++j) sums[j] += exp((z[i + j] - high) * scale);
  for (int64_t width = kSumLanes / 2; width > 0; width /= 2) {
    for (int64_t j = 0; j < width; ++j) sums[j] += sums[j + width];
  }
  return sums[0];
}

// Step 1 of the sampling scheme: what the tile bids in kLanes rows.
inline vf bid(const VocabHeadParams& p, int64_t row, int64_t tile, vf high, vf sum) {
  const Philox4v random = philox(
      static_cast<uint64_t>(*p.seed), set_u(static_cast<uint32_t>(row)) + iota(),
      set_u(static_cast<uint32_t>(tile)), set_u(counter_word(Purpose::kSample, p.draw)), vu{});
  float sums[kLanes], bids[kLanes];
  uint32_t noise[kLanes];
  store(sums, sum);
  memcpy(noise, &random.word[0], sizeof(noise));
  const vf scaled = high * p.inverse_temperature;
  for (int i = 0; i < kLanes; ++i) {
    bids[i] = scaled[i] + natural_log(sums[i]) + gumbel(noise[i]);
  }
  return load(bids);
}

template <typename T>
void fold_tile(const Chunk& c, int64_t tile) {
  const VocabHeadParams& p = c.p;
  const bool own_scale = p.seed != nullptr && p.inverse_temperature != 1.0f;
  const int64_t n = c.tile_columns(tile);
  const T* logits = c.logits<T>(tile * kSampleTile);
  const float* bias = p.bias + tile * kSampleTile;
  vf z[kSampleTile];
  for (int64_t row = 0; row < c.stride(); row += kLanes) {
    // At least -FLT_MAX, so that `z - high` is never inf - inf, even where all logits are -inf.
    vf high = set(-FLT_MAX);
    for (int64_t i = 0; i < n; ++i) {
      z[i] = load(logits + i * c.stride() + row) + bias[i];
      high = max(z[i], high);
    }
    const vf sum = sum_exp(z, n, high, 1.0f);
    store(c.figure(tile, kTileMax) + row, high);
    store(c.figure(tile, kTileSum) + row, sum);
    if (p.seed == nullptr) continue;
    const vf weight = own_scale ? sum_exp(z, n, high, p.inverse_temperature) : sum;
    store(c.figure(tile, kTileBid) + row, bid(p, c.first + row, tile, high, weight));
  }
}

// ---- Rows ----

// The logits of one row in a tile; returns their number.
template <typename T>
int64_t gather(const Chunk& c, int64_t row, int64_t tile, float* z) {
  const int64_t n = c.tile_columns(tile);
  for (int64_t i = 0; i < n; ++i) {
    const int64_t column = tile * kSampleTile + i;
    z[i] = to_float(c.logits<T>(column)[row]) + c.p.bias[column];
  }
  return n;
}

// Step 2 of the sampling scheme: one token of a tile by inverse CDF.
template <typename T>
int64_t draw_token(const Chunk& c, int64_t row, int64_t tile) {
  float weights[kSampleTile];
  const int64_t n = gather<T>(c, row, tile, weights);
  for (int64_t i = n; i < kSampleTile; ++i) weights[i] = -INFINITY;
  const float high = c.figure(tile, kTileMax)[row];
  for (int64_t i = 0; i < kSampleTile; i += kLanes) {
    store(weights + i, exp((load(weights + i) - high) * c.p.inverse_temperature));
  }
  float total = 0.0f;
  for (int64_t i = 0; i < n; ++i) total += weights[i];
  const Philox4 random =
      philox(static_cast<uint64_t>(*c.p.seed), static_cast<uint32_t>(c.first + row),
             static_cast<uint32_t>(tile), counter_word(Purpose::kSample, c.p.draw), 0);
  const float threshold = uniform(random.word[1]) * total;
  float running = 0.0f;
  for (int64_t i = 0; i < n; ++i) {
    running += weights[i];
    // u < 1, but u · total may round up to total, which no running sum exceeds.
    if (running > threshold || running == total) return tile * kSampleTile + i;
  }
  return tile * kSampleTile;  // only NaN
}

// Whether the target's logit is the row's largest and no earlier one equals it.
template <typename T>
bool is_hit(const Chunk& c, int64_t row, int64_t target, float logit, float high) {
  if (logit != high) return false;
  const int64_t tile = target / kSampleTile;
  for (int64_t t = 0; t < tile; ++t) {
    if (c.figure(t, kTileMax)[row] == high) return false;
  }
  float z[kSampleTile];
  gather<T>(c, row, tile, z);
  for (int64_t i = 0; i < target - tile * kSampleTile; ++i) {
    if (z[i] == high) return false;
  }
  return true;
}

template <typename T>
void finish_row(const Chunk& c, int64_t row, float high, float sum) {
  const VocabHeadParams& p = c.p;
  const int64_t at = c.first + row, target = p.target[at];
  const float lse = high + logf(sum);
  p.lse[at] = lse;
  p.nll[at] = 0.0f;
  p.hit[at] = 0;
  if (target != kIgnoredTarget) {
    const float logit = to_float(c.logits<T>(target)[row]) + p.bias[target];
    p.nll[at] = lse - logit;
    p.hit[at] = is_hit<T>(c, row, target, logit, high);
  }
  if (p.seed == nullptr) return;
  float best = -INFINITY;
  int64_t winner = -1;
  for (int64_t t = 0; t < c.tiles(); ++t) {
    if (c.figure(t, kTileBid)[row] > best) {
      best = c.figure(t, kTileBid)[row];
      winner = t;
    }
  }
  p.sample[at] = winner < 0 ? 0 : draw_token<T>(c, row, winner);
}

template <typename T>
void finish_rows(const Chunk& c, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; row += kLanes) {
    vf high = set(-FLT_MAX), sum{};
    for (int64_t t = 0; t < c.tiles(); ++t) high = max(load(c.figure(t, kTileMax) + row), high);
    for (int64_t t = 0; t < c.tiles(); ++t) {
      sum += load(c.figure(t, kTileSum) + row) * exp(load(c.figure(t, kTileMax) + row) - high);
    }
    for (int64_t lane = 0; lane < kLanes && row + lane < c.rows; ++lane) {
      finish_row<T>(c, row + lane, high[lane], sum[lane]);
    }
  }
}

template <typename T>
void run(const VocabHeadParams& p) {
  using U = typename UnitOf<T>::type;
  for (int64_t first = 0; first < p.rows; first += p.chunk_rows) {
    const int64_t left = p.rows - first;
    const Chunk chunk{p, first, left < p.chunk_rows ? left : p.chunk_rows};
    pack_hidden<T, U>(chunk);
    parallel_for(0, chunk.tiles(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t tile = begin; tile < end; ++tile) {
        make_logits<T, U>(chunk, tile);
        fold_tile<T>(chunk, tile);
      }
    });
    parallel_for(0, (chunk.rows + kLanes - 1) / kLanes, 1, [&](int64_t begin, int64_t end) {
      finish_rows<T>(chunk, begin * kLanes, end * kLanes);
    });
    if (p.scale != nullptr) vocab_head_gradients(chunk);
  }
}

}  // namespace

void vocab_head(const VocabHeadParams& p) {
  p.dtype == DType::kFloat32 ? run<float>(p) : run<bf16>(p);
}

}  // namespace metro::METRO_CPU_NS
