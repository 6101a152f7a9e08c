// Gradients of one chunk, a block of tiles at a time: the tiles' logits turn into their gradient,
// and while that is in L2 it makes their rows of the weight's gradient; then every column panel of
// the hidden states' gradient takes the block. Threads share out tiles and then panels, never the
// terms of one sum: results do not depend on their number.
#include "common/parallel.h"
#include "vocab_head/vocab_head_cpu.h"

namespace metro::METRO_CPU_NS {
namespace {

// Rows of grad_hidden that a task takes, at most: a packed block of the weight serves them all.
constexpr int64_t kTaskRows = 192;

template <typename T, typename U>
struct Units;

// Where the logits are float32 the gradient serves both products as it lies.
template <>
struct Units<float, float> {
  static float* along_vocab(const Chunk& c, int64_t block, int64_t column) {
    return c.logits<float>(block + column);
  }
  static Left<float> along_rows(const Chunk& c, int64_t block, int64_t column) {
    return {along_vocab(c, block, column), c.stride(), 1};
  }
  static void put(const Chunk& c, int64_t block, int64_t column, int64_t row, vf even, vf odd) {
    store(along_vocab(c, block, column) + row, even);
    if (block + column + 1 < c.p.vocab) store(along_vocab(c, block, column + 1) + row, odd);
  }
};

// Rounded to bf16 first, as with the instructions for it, so that both give the same gradient.
template <>
struct Units<bf16, float> {
  static float* along_vocab(const Chunk& c, int64_t, int64_t column) {
    return static_cast<float*>(c.p.work.grad_units) + column * c.stride();
  }
  static Left<float> along_rows(const Chunk& c, int64_t block, int64_t column) {
    return {along_vocab(c, block, column), c.stride(), 1};
  }
  static void put(const Chunk& c, int64_t block, int64_t column, int64_t row, vf even, vf odd) {
    bf16 rounded[kLanes];
    store(rounded, even);
    store(along_vocab(c, block, column) + row, load(rounded));
    store(rounded, odd);
    store(along_vocab(c, block, column + 1) + row, load(rounded));
  }
};

#ifdef __AVX512BF16__
template <>
struct Units<bf16, Pair> {
  static Pair* along_vocab(const Chunk& c, int64_t, int64_t column) {
    return static_cast<Pair*>(c.p.work.grad_units) + column / 2 * c.stride();
  }
  static Left<Pair> along_rows(const Chunk& c, int64_t block, int64_t column) {
    return {reinterpret_cast<const Pair*>(c.logits<bf16>(block + column)), c.stride() / 2, 1};
  }
  static void put(const Chunk& c, int64_t block, int64_t column, int64_t row, vf even, vf odd) {
    store(c.logits<bf16>(block + column) + row, even);
    if (block + column + 1 < c.p.vocab) store(c.logits<bf16>(block + column + 1) + row, odd);
    store_row_units(along_vocab(c, block, 0) + row, c.stride(), column, 0, even, odd);
  }
};
#endif

// ---- The logits' gradient ----

void prepare_rows(const Chunk& c) {
  for (int64_t row = 0; row < c.stride(); ++row) {
    const bool counts = row < c.rows && c.p.target[c.first + row] != kIgnoredTarget;
    c.p.work.row_lse[row] = counts ? c.p.lse[c.first + row] : 0.0f;
    c.p.work.row_target[row] = counts ? static_cast<int32_t>(c.p.target[c.first + row]) : -1;
  }
}

// kLanes rows of one column: nothing of a row that is ignored or that pads the chunk.
template <typename T>
vf gradient(const Chunk& c, int64_t column, int64_t row, float scale) {
  vi target;
  memcpy(&target, c.p.work.row_target + row, sizeof(target));
  const vf logit = load(c.logits<T>(column) + row) + c.p.bias[column];
  const vf softmax = exp(logit - load(c.p.work.row_lse + row));
  const vf one = select(target == static_cast<int32_t>(column), set(1.0f), vf{});
  return select(target >= 0, scale * (softmax - one), vf{});
}

// A tile: columns [from, from + n) of the block that begins at `block`.
template <typename T, typename U>
void make_gradient(const Chunk& c, int64_t block, int64_t from, int64_t n) {
  const float scale = *c.p.scale;
  for (int64_t i = from; i < from + n; i += 2) {
    const int64_t column = block + i;
    const bool has_odd = i + 1 < from + n;
    vf even_sum{}, odd_sum{};
    for (int64_t row = 0; row < c.stride(); row += kLanes) {
      const vf even = gradient<T>(c, column, row, scale);
      const vf odd = has_odd ? gradient<T>(c, column + 1, row, scale) : vf{};
      even_sum += even;
      odd_sum += odd;
      Units<T, U>::put(c, block, i, row, even, odd);
    }
    float* grad_bias = c.p.grad_bias + column;
    grad_bias[0] = (c.is_first() ? 0.0f : grad_bias[0]) + reduce_add(even_sum);
    if (has_odd) grad_bias[1] = (c.is_first() ? 0.0f : grad_bias[1]) + reduce_add(odd_sum);
  }
}

// ---- The weight's gradient ----

// Panels of kPanel columns, the chunk's rows as depth.
template <typename T, typename U>
void pack_hidden_rows(const Chunk& c) {
  const int64_t units = units_of<U>(c.rows);
  U* packed = static_cast<U*>(c.p.work.hidden_rows);
  parallel_for(0, c.panels(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel) {
      pack_panel(c.hidden<T>(0) + panel * kPanel, c.p.width, c.rows, c.p.width - panel * kPanel,
                 packed + panel * units * kPanel);
    }
  });
}

// Rows of grad_weight that are multiplied at a time, and columns: a square of sums that stays in L2
// until its rows go out whole.
constexpr int64_t kOutRows = 64;
constexpr int64_t kOutPanels = 16;

// out [rows, columns] = (add ? out : 0) + sums [panels, kOutRows, kPanel].
template <typename T>
void store_rows(T* out, int64_t stride, const float* sums, int64_t rows, int64_t columns,
                bool add) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t column = 0; column < columns; column += kLanes) {
      const int64_t panel = column / kPanel;
      T* to = out + i * stride + column;
      vf sum = load(sums + (panel * kOutRows + i) * kPanel + column % kPanel);
      if (add) sum += load_upto(to, columns - column);
      store_upto(to, sum, columns - column);
    }
  }
}

// `n` ≤ kOutRows rows of grad_weight; the last of an odd number of them is multiplied with whatever
// stands behind it, which is within the scratch, and dropped.
template <typename T, typename U>
void add_weight_gradient(const Chunk& c, int64_t block, int64_t from, int64_t n) {
  const int64_t units = units_of<U>(c.rows), width = c.p.width;
  const Left<U> left = Units<T, U>::along_rows(c, block, from);
  float sums[kOutPanels * kOutRows * kPanel];
  for (int64_t first = 0; first < c.panels(); first += kOutPanels) {
    const int64_t begin = first * kPanel;
    const int64_t panels = c.panels() - first < kOutPanels ? c.panels() - first : kOutPanels;
    T* out = static_cast<T*>(c.p.grad_weight) + (block + from) * width + begin;
    const bool add = c.p.accumulate || !c.is_first();
    for (int64_t i = 0; i < panels; ++i) {
      if (add) prefetch(out, n * width * static_cast<int64_t>(sizeof(T)), i, panels);
      const U* packed = static_cast<const U*>(c.p.work.hidden_rows) + (first + i) * units * kPanel;
      const int64_t left_over = width - (first + i) * kPanel;
      for (int64_t at = 0; at < units; at += kBlockUnits) {
        const int64_t depth = units - at < kBlockUnits ? units - at : kBlockUnits;
        multiply_panel({left.at + at, left.row, left.unit}, n, packed + at * kPanel, depth,
                       sums + i * kOutRows * kPanel, left_over < kPanel ? left_over : kPanel,
                       at > 0);
      }
    }
    const int64_t columns = width - begin < panels * kPanel ? width - begin : panels * kPanel;
    store_rows(out, width, sums, n, columns, add);
  }
}

// ---- The hidden states' gradient ----

// Adds `n` columns of the vocabulary to a panel of columns of the rows [row, row + rows).
template <typename T, typename U>
void add_hidden_gradient(const Chunk& c, int64_t block, int64_t n, int64_t panel, int64_t row,
                         int64_t rows) {
  const int64_t columns = c.p.width - panel * kPanel;
  float* out = c.p.work.grad_hidden + (panel * c.stride() + row) * kPanel;
  U packed[kBlockUnits * kPanel];
  for (int64_t at = 0; at < n; at += kBlockUnits * kDepth<U>) {
    const int64_t most = kBlockUnits * kDepth<U>, depth = n - at < most ? n - at : most;
    pack_panel(c.weight<T>(block + at) + panel * kPanel, c.p.width, depth, columns, packed);
    for (int64_t i = at + most; i < n && i < at + 2 * most; ++i) {
      prefetch(c.weight<T>(block + i) + panel * kPanel, kPanel * static_cast<int64_t>(sizeof(T)));
    }
    const Left<U> left{Units<T, U>::along_vocab(c, block, at) + row, 1, c.stride()};
    multiply_panel(left, rows, packed, units_of<U>(depth), out, columns < kPanel ? columns : kPanel,
                   block > 0 || at > 0);
  }
}

template <typename T>
void store_hidden_gradient(const Chunk& c) {
  parallel_for(0, c.rows, 16, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      T* out = static_cast<T*>(c.p.grad_hidden) + (c.first + row) * c.p.width;
      for (int64_t column = 0; column < c.p.width; column += kLanes) {
        const int64_t panel = column / kPanel;
        const float* sum = c.p.work.grad_hidden + (panel * c.stride() + row) * kPanel;
        store_upto(out + column, load(sum + column % kPanel), c.p.width - column);
      }
    }
  });
}

template <typename T>
void run(const Chunk& c) {
  using U = typename UnitOf<T>::type;
  prepare_rows(c);
  pack_hidden_rows<T, U>(c);
  const int64_t row_tasks = (c.rows + kTaskRows - 1) / kTaskRows;
  for (int64_t tile = 0; tile < c.tiles(); tile += c.p.work.block_tiles) {
    const int64_t block = tile * kSampleTile;
    const int64_t left = c.tiles() - tile;
    const int64_t tiles = left < c.p.work.block_tiles ? left : c.p.work.block_tiles;
    parallel_for(0, tiles, 1, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        const int64_t n = c.tile_columns(tile + t);
        make_gradient<T, U>(c, block, t * kSampleTile, n);
        for (int64_t i = 0; i < n; i += kOutRows) {
          add_weight_gradient<T, U>(c, block, t * kSampleTile + i,
                                    n - i < kOutRows ? n - i : kOutRows);
        }
      }
    });
    const int64_t vocab_left = c.p.vocab - block;
    const int64_t n = vocab_left < tiles * kSampleTile ? vocab_left : tiles * kSampleTile;
    parallel_for(0, c.panels() * row_tasks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t row = task % row_tasks * kTaskRows;
        const int64_t rows = c.rows - row < kTaskRows ? c.rows - row : kTaskRows;
        add_hidden_gradient<T, U>(c, block, n, task / row_tasks, row, rows);
      }
    });
  }
  store_hidden_gradient<T>(c);
}

}  // namespace

void vocab_head_gradients(const Chunk& chunk) {
  chunk.p.dtype == DType::kFloat32 ? run<float>(chunk) : run<bf16>(chunk);
}

}  // namespace metro::METRO_CPU_NS
