// Forward: for each (sequence, head) the keys and values are packed once; a tile of 64 queries then
// passes over the key tiles in strips of 4 queries: scores, online softmax, product with values.
#include "attention/attention_tiles.h"

namespace metro::METRO_CPU_NS {
namespace {

// The reference of the online softmax follows the running maximum only when that has risen this
// far (in powers of two): a row is hardly ever rescaled, and the probabilities stay below 2^8.
constexpr float kSlack = 8.0f;
constexpr float kLowest = -1e30f;

// What a query tile keeps between key tiles.
template <typename U>
struct QueryTile {
  alignas(64) U queries[kTile * kAttentionMaxHeadDim];   // [kTile, units of head_dim]
  alignas(64) float sums[kTile * kAttentionMaxHeadDim];  // [kTile, dim]: Σ prob · v
  alignas(64) vf normalizer[kTile];                      // Σ prob, by lane
  float reference[kTile];                                // the exponent taken out of prob
};

template <typename U>
struct KeyTile {
  const U* keys;    // [units of head_dim, kTile]
  const U* values;  // [kTile / kDepth, dim]
  int64_t first;    // the first key's position
  int64_t count;
};

struct Geometry {
  int64_t units;  // of head_dim
  int64_t dim;    // head_dim rounded up to whole vectors
  float scale;    // of scores, log2 e included
};

template <typename U>
inline void raise_reference(QueryTile<U>* tile, int64_t row, float highest, int64_t dim) {
  const vf factor = exp2(set(tile->reference[row] - highest));
  tile->reference[row] = highest;
  tile->normalizer[row] *= factor;
  float* sums = tile->sums + row * dim;
  for (int64_t col = 0; col < dim; col += kLanes) store(sums + col, load(sums + col) * factor);
}

// Turns a row of scores [key.count] into probabilities relative to the row's reference. `bias` is
// that of the first key. kFull: a whole tile of keys, whose vectors then stay in registers.
template <bool kFull, typename U>
inline void softmax_row(const Geometry& g, const KeyTile<U>& key, const float* scores,
                        const float* bias, const AttentionDropout& dropout, uint64_t kept,
                        int64_t row, QueryTile<U>* tile, U* probs) {
  const int vectors = kFull ? kTileVectors : static_cast<int>((key.count + kLanes - 1) / kLanes);
  vf x[kTileVectors];
  vf top = set(kLowest);
  for (int v = 0; v < vectors; ++v) {
    x[v] = fma(load(scores + v * kLanes), set(g.scale), load(bias + v * kLanes));
    if (!kFull) x[v] = select(lanes_below(v * kLanes, key.count), x[v], set(-__builtin_inff()));
    top = max(top, x[v]);
  }
  if (any(top > tile->reference[row] + kSlack)) {
    raise_reference(tile, row, reduce_max(top), g.dim);
  }
  const vf reference = set(tile->reference[row]);
  vf sum = tile->normalizer[row];
  for (int v = 0; v < vectors; ++v) {
    const vf prob = exp2(x[v] - reference);
    sum += prob;
    store_column_units(probs, v * kLanes, dropout.on ? keep(prob, kept, v) : prob);
  }
  tile->normalizer[row] = sum;
}

template <typename U>
void process_tile(const Geometry& g, const Item& item, const KeyTile<U>& key, int64_t first_query,
                  int64_t queries, const float* bias, const AttentionDropout& dropout,
                  QueryTile<U>* tile) {
  alignas(64) float scores[kStripRows * kTile];
  alignas(64) U probs[kStripRows * kTile];
  constexpr int64_t kRowUnits = kTile / kDepth<U>;
  const int64_t depth = (key.count + kDepth<U> - 1) / kDepth<U>;
  for (int64_t row = 0; row < queries; row += kStripRows) {
    multiply_tile<U>({tile->queries + row * g.units, g.units, 1}, key.keys, kTile, g.units, scores,
                     kTile, kStripRows, key.count, false);
    const int64_t query = first_query + row;
    KeptBits kept{};
    if (dropout.on) kept = kept_keys(dropout, key.first, item.start + query, item.head);
    const auto softmax = key.count == kTile ? softmax_row<true, U> : softmax_row<false, U>;
    for (int64_t r = 0; r < kStripRows; ++r) {
      softmax(g, key, scores + r * kTile, bias + key.first - (query + r) + item.padded, dropout,
              kept.row[r], row + r, tile, probs + r * kRowUnits);
    }
    multiply_tile<U>({probs, kRowUnits, 1}, key.values, g.dim, depth, tile->sums + row * g.dim,
                     g.dim, kStripRows, g.dim, true);
  }
}

template <typename T, typename U>
void write_rows(const AttentionParams& p, const Item& item, int64_t first_query, int64_t queries,
                int64_t dim, float scale, const QueryTile<U>& tile) {
  for (int64_t row = 0; row < queries; ++row) {
    const int64_t token = item.start + first_query + row;
    const float normalizer = reduce_add(tile.normalizer[row]);
    p.lse[item.head * p.tokens + token] = (tile.reference[row] + log2f(normalizer)) * kLn2;
    T* out = static_cast<T*>(p.out) + (token * p.heads + item.head) * p.head_dim;
    const vf factor = set(scale / normalizer);
    for (int64_t col = 0; col < p.head_dim; col += kLanes) {
      store_upto(out + col, load(tile.sums + row * dim + col) * factor, p.head_dim - col);
    }
  }
}

template <typename T, typename U>
void pack_keys_and_values(const AttentionParams& p, const Geometry& g, const Item& item, U* keys,
                          U* values) {
  const int64_t stride = 3 * p.heads * p.head_dim;
  alignas(64) U rows[kTile * kAttentionMaxHeadDim];
  for (int64_t first = 0; first < item.length; first += kTile) {
    const int64_t count = item.length - first < kTile ? item.length - first : kTile;
    const int64_t padded = attention_pad(count, kAttentionPad);
    pack_rows(qkv_rows<T>(p, item, 1) + first * stride, stride, count, padded, p.head_dim, rows,
              g.units);
    transpose_units(rows, g.units, padded, g.units, keys + first * g.units, kTile);
    pack_depth(qkv_rows<T>(p, item, 2) + first * stride, stride, count, padded, p.head_dim,
               values + first / kDepth<U> * g.dim, g.dim);
  }
}

template <typename T>
void forward_item(const AttentionParams& p, const Item& item, void* scratch) {
  using U = typename UnitOf<T>::type;
  const Geometry g{p.head_dim / kDepth<U>, attention_pad(p.head_dim, kLanes),
                   score_scale(p) * kLog2E};
  U* keys = static_cast<U*>(scratch);
  const int64_t matrix = attention_pad(item.length, kTile) * g.dim;
  U* values = keys + matrix;
  float* bias = reinterpret_cast<float*>(values + matrix);
  pack_keys_and_values<T>(p, g, item, keys, values);
  load_bias(p, item, bias);
  const AttentionDropout dropout = attention_dropout(p);
  const int64_t stride = 3 * p.heads * p.head_dim;
  QueryTile<U> tile;
  for (int64_t query = 0; query < item.length; query += kTile) {
    const int64_t queries = item.length - query < kTile ? item.length - query : kTile;
    const int64_t padded = attention_pad(queries, kStripRows);
    pack_rows(qkv_rows<T>(p, item, 0) + query * stride, stride, queries, padded, p.head_dim,
              tile.queries, g.units);
    for (int64_t i = 0; i < padded * g.dim; ++i) tile.sums[i] = 0.0f;
    for (int64_t row = 0; row < padded; ++row) {
      tile.normalizer[row] = vf{};
      tile.reference[row] = kLowest;
    }
    for (int64_t key = 0; key < item.length; key += kTile) {
      const int64_t count = item.length - key < kTile ? item.length - key : kTile;
      const KeyTile<U> key_tile{keys + key * g.units, values + key / kDepth<U> * g.dim, key, count};
      process_tile(g, item, key_tile, query, padded, bias, dropout, &tile);
    }
    write_rows<T>(p, item, query, queries, g.dim, dropout.scale, tile);
  }
}

}  // namespace

void attention(const AttentionParams& p) {
  for_each_item(p, false, [&](const Item& item, void* scratch) {
    p.dtype == DType::kFloat32 ? forward_item<float>(p, item, scratch)
                               : forward_item<bf16>(p, item, scratch);
  });
}

}  // namespace metro::METRO_CPU_NS
