// One chunk of rows of the CPU operator: what its passes share.
#pragma once

#include "common/panel_gemm.h"
#include "vocab_head/vocab_head.h"

namespace metro::METRO_CPU_NS {

static_assert(kRowAlignment % kLanes == 0);
static_assert(kSampleTile % kSumLanes == 0 && kSampleTile % 2 == 0);

struct Chunk {
  const VocabHeadParams& p;
  int64_t first;  // row of the whole
  int64_t rows;

  int64_t stride() const { return p.work.row_stride; }
  int64_t tiles() const { return (p.vocab + kSampleTile - 1) / kSampleTile; }
  int64_t tile_columns(int64_t tile) const {
    const int64_t left = p.vocab - tile * kSampleTile;
    return left < kSampleTile ? left : kSampleTile;
  }
  int64_t panels() const { return (p.width + kPanel - 1) / kPanel; }
  bool is_first() const { return first == 0; }

  template <typename T>
  T* logits(int64_t column) const {
    return static_cast<T*>(p.work.logits) + column * stride();
  }
  template <typename T>
  const T* weight(int64_t column) const {
    return static_cast<const T*>(p.weight) + column * p.width;
  }
  template <typename T>
  const T* hidden(int64_t row) const {
    return static_cast<const T*>(p.hidden) + (first + row) * p.width;
  }
  float* figure(int64_t tile, TileFigure which) const {
    return p.work.tiles + (tile * kTileFigures + which) * stride();
  }
};

// The logits of the chunk are there, and lse: turns them into their gradient and multiplies it on.
void vocab_head_gradients(const Chunk& chunk);

}  // namespace metro::METRO_CPU_NS
