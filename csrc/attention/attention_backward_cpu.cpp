// Backward: for each (sequence, head) the query side is packed once; a tile of 64 keys then passes
// over the query tiles. grad_k and grad_v of the key tile stay in L2, grad_q is accumulated in
// float32 in scratch memory. Probabilities and their gradients are made in strips of 4 queries.
//
// The bias gradient of a row of scores is a contiguous piece of a vector over j - i, shifted by one
// from row to row. Adding neighbouring rows to one vector would load what was just stored at
// another alignment, which stalls; so query i adds to bank i mod 16, where all accesses are aligned
// alike, and the banks are summed, shifted, at the end of the item.
#include "attention/attention_tiles.h"

namespace metro::METRO_CPU_NS {
namespace {

constexpr int64_t kBanks = kAttentionDiagonalBanks;
static_assert(kBanks % kLanes == 0 && kTile % kBanks == 0);

// The packed matrices of a (sequence, head), in scratch memory, one tile of kTile rows after
// another, and its vectors.
template <typename U>
struct Packed {
  U* queries;        // tiles [kTile, units]
  U* queries_depth;  // tiles [kTile / kDepth, dim]
  U* grads;          // grad_out, like queries
  U* grads_depth;
  float* grad_queries;  // tiles [kTile, dim]
  float* bias;          // see load_bias
  float* banks;         // [kBanks, bank_stride]
  float* lse;           // [padded], times log2 e; inf past the end, so that the probability is 0
  float* delta;         // [padded]
};

struct Geometry {
  int64_t units;  // of head_dim
  int64_t dim;    // head_dim rounded up to whole vectors
  float scale;    // of scores, without log2 e
  int64_t bank_stride;
};

template <typename U>
struct KeyTile {
  alignas(64) U keys[kTile * kAttentionMaxHeadDim];        // [units of head_dim, kTile]
  alignas(64) U values[kTile * kAttentionMaxHeadDim];      // like keys
  alignas(64) U keys_depth[kTile * kAttentionMaxHeadDim];  // [kTile / kDepth, dim]
  alignas(64) float grad_keys[kTile * kAttentionMaxHeadDim];
  alignas(64) float grad_values[kTile * kAttentionMaxHeadDim];
  int64_t first;
  int64_t count;
};

// What a tile of scores hands to the three products that follow.
template <typename U>
struct ScoreTile {
  alignas(64) U probs[kTile * kTile];             // [kTile / kDepth queries, kTile keys]
  alignas(64) U grad_scores[kTile * kTile];       // like probs
  alignas(64) U grad_scores_rows[kTile * kTile];  // [queries, kTile / kDepth keys]; unused when
                                                  // a unit is one number: grad_scores is that
};

template <typename U>
Packed<U> lay_out(const Geometry& g, const Item& item, void* scratch) {
  const int64_t matrix = item.padded * g.dim;
  U* units = static_cast<U*>(scratch);
  Packed<U> packed{units,
                   units + matrix,
                   units + 2 * matrix,
                   units + 3 * matrix,
                   reinterpret_cast<float*>(units + 4 * matrix),
                   nullptr,
                   nullptr,
                   nullptr,
                   nullptr};
  packed.bias = packed.grad_queries + matrix;
  packed.banks = packed.bias + g.bank_stride;
  packed.lse = packed.banks + kBanks * g.bank_stride;
  packed.delta = packed.lse + item.padded;
  return packed;
}

// A (sequence, head) and all that is fixed while it is worked on.
template <typename U>
struct Work {
  const AttentionBackwardParams& p;
  Item item;
  Geometry g;
  Packed<U> packed;
  AttentionDropout dropout;
};

// Σ_c a[c] · b[c]
template <typename T>
inline float dot(const T* a, const T* b, int64_t n) {
  vf sum{};
  for (int64_t c = 0; c < n; c += kLanes) {
    sum = fma(load_upto(a + c, n - c), load_upto(b + c, n - c), sum);
  }
  return reduce_add(sum);
}

template <typename T, typename U>
void pack_queries(const AttentionBackwardParams& p, const Geometry& g, const Item& item,
                  const Packed<U>& to) {
  const AttentionParams& f = p.forward;
  const int64_t stride = f.heads * f.head_dim;
  const int64_t offset = (item.start * f.heads + item.head) * f.head_dim;
  const T* queries = qkv_rows<T>(f, item, 0);
  const T* grads = static_cast<const T*>(p.grad_out) + offset;
  const T* out = static_cast<const T*>(f.out) + offset;
  for (int64_t i = 0; i < item.padded; i += kTile) {
    const int64_t count = item.length - i < kTile ? item.length - i : kTile;
    const int64_t padded = attention_pad(count, kAttentionPad);
    const int64_t depth_at = i / kDepth<U> * g.dim;
    pack_rows(queries + i * 3 * stride, 3 * stride, count, padded, f.head_dim,
              to.queries + i * g.units, g.units);
    pack_depth(queries + i * 3 * stride, 3 * stride, count, padded, f.head_dim,
               to.queries_depth + depth_at, g.dim);
    pack_rows(grads + i * stride, stride, count, padded, f.head_dim, to.grads + i * g.units,
              g.units);
    pack_depth(grads + i * stride, stride, count, padded, f.head_dim, to.grads_depth + depth_at,
               g.dim);
  }
  const float* lse = f.lse + item.head * f.tokens + item.start;
  for (int64_t i = 0; i < item.padded; ++i) {
    const bool real = i < item.length;
    to.lse[i] = real ? lse[i] * kLog2E : __builtin_inff();
    to.delta[i] = real ? dot(grads + i * stride, out + i * stride, f.head_dim) : 0.0f;
  }
}

template <typename T, typename U>
void pack_keys(const AttentionParams& p, const Geometry& g, const Item& item, int64_t first,
               KeyTile<U>* to) {
  const int64_t stride = 3 * p.heads * p.head_dim;
  const int64_t left = item.length - first;
  to->first = first;
  to->count = left < kTile ? left : kTile;
  const int64_t padded = attention_pad(to->count, kAttentionPad);
  alignas(64) U rows[kTile * kAttentionMaxHeadDim];
  const T* keys = qkv_rows<T>(p, item, 1) + first * stride;
  pack_rows(keys, stride, to->count, padded, p.head_dim, rows, g.units);
  transpose_units(rows, g.units, padded, g.units, to->keys, kTile);
  pack_depth(keys, stride, to->count, padded, p.head_dim, to->keys_depth, g.dim);
  const T* values = qkv_rows<T>(p, item, 2) + first * stride;
  pack_rows(values, stride, to->count, padded, p.head_dim, rows, g.units);
  transpose_units(rows, g.units, padded, g.units, to->values, kTile);
}

// One strip of queries: from scores and gradients of probabilities [kStripRows, kTile] to the strip
// of `tile` from `row` on. `query` counts from the start of the sequence. kFull: a whole tile of
// keys.
template <bool kFull, typename U>
void finish_strip(const Work<U>& work, const KeyTile<U>& key, int64_t query, int64_t row,
                  const float* scores, const float* grad_probs, ScoreTile<U>* tile) {
  const auto& [p, item, g, packed, dropout] = work;
  const int vectors = kFull ? kTileVectors : static_cast<int>((key.count + kLanes - 1) / kLanes);
  const vf scale = set(g.scale * kLog2E);
  const bool drop = dropout.on, with_bias = p.forward.bias != nullptr;
  KeptBits kept{};
  if (drop) kept = kept_keys(dropout, key.first, item.start + query, item.head);
  for (int r = 0; r < kStripRows; r += 2) {
    const float* bias[2];
    float* bank_sums[2];
    vf lse[2], delta[2];
    for (int k = 0; k < 2; ++k) {
      const int64_t i = query + r + k;
      const int64_t bank = i % kBanks;
      bias[k] = packed.bias + key.first + item.padded - i;
      bank_sums[k] = packed.banks + bank * g.bank_stride + key.first + item.padded - (i - bank);
      lse[k] = set(packed.lse[i]);
      delta[k] = set(packed.delta[i]);
    }
    for (int v = 0; v < vectors; ++v) {
      const int64_t col = v * kLanes;
      vf probs[2], grad_scores[2];
      for (int k = 0; k < 2; ++k) {
        const int64_t at = (r + k) * kTile + col;
        vf prob = exp2(fma(load(scores + at), scale, load(bias[k] + col)) - lse[k]);
        if (!kFull) prob = select(lanes_below(col, key.count), prob, vf{});
        vf grad_prob = load(grad_probs + at);
        probs[k] = prob;
        if (drop) {
          probs[k] = keep(prob * dropout.scale, kept.row[r + k], v);
          grad_prob = keep(grad_prob * dropout.scale, kept.row[r + k], v);
        }
        grad_scores[k] = prob * (grad_prob - delta[k]);
        if constexpr (kDepth<U> > 1) {
          U* rows = tile->grad_scores_rows + (row + r + k) * (kTile / kDepth<U>);
          store_column_units(rows, col, grad_scores[k]);
        }
        if (with_bias) store(bank_sums[k] + col, load(bank_sums[k] + col) + grad_scores[k]);
      }
      store_row_units(tile->probs, kTile, row + r, col, probs[0], probs[1]);
      store_row_units(tile->grad_scores, kTile, row + r, col, grad_scores[0], grad_scores[1]);
    }
  }
}

template <typename U>
void process_tile(const Work<U>& work, int64_t first_query, KeyTile<U>* key) {
  const auto& [p, item, g, packed, dropout] = work;
  ScoreTile<U> tile;
  alignas(64) float scores[kStripRows * kTile];
  alignas(64) float grad_probs[kStripRows * kTile];
  const int64_t left = item.length - first_query;
  const int64_t queries = attention_pad(left < kTile ? left : kTile, kStripRows);
  for (int64_t row = 0; row < queries; row += kStripRows) {
    const int64_t at = (first_query + row) * g.units;
    multiply_tile<U>({packed.queries + at, g.units, 1}, key->keys, kTile, g.units, scores, kTile,
                     kStripRows, key->count, false);
    multiply_tile<U>({packed.grads + at, g.units, 1}, key->values, kTile, g.units, grad_probs,
                     kTile, kStripRows, key->count, false);
    const auto finish = key->count == kTile ? finish_strip<true, U> : finish_strip<false, U>;
    finish(work, *key, first_query + row, row, scores, grad_probs, &tile);
  }
  const int64_t query_units = queries / kDepth<U>;
  const int64_t key_units = (key->count + kDepth<U> - 1) / kDepth<U>;
  const int64_t depth_at = first_query / kDepth<U> * g.dim;
  multiply_tile<U>({tile.probs, 1, kTile}, packed.grads_depth + depth_at, g.dim, query_units,
                   key->grad_values, g.dim, key->count, g.dim, true);
  multiply_tile<U>({tile.grad_scores, 1, kTile}, packed.queries_depth + depth_at, g.dim,
                   query_units, key->grad_keys, g.dim, key->count, g.dim, true);
  const U* rows = kDepth<U> > 1 ? tile.grad_scores_rows : tile.grad_scores;
  multiply_tile<U>({rows, kTile / kDepth<U>, 1}, key->keys_depth, g.dim, key_units,
                   packed.grad_queries + first_query * g.dim, g.dim, queries, g.dim,
                   key->first > 0);
}

// grad_qkv[part] of `count` rows from position `first` on = sums · scale.
template <typename T>
void write_rows(const AttentionBackwardParams& p, const Geometry& g, const Item& item, int part,
                int64_t first, int64_t count, const float* sums, float scale) {
  const AttentionParams& f = p.forward;
  for (int64_t row = 0; row < count; ++row) {
    const int64_t token = item.start + first + row;
    T* out = static_cast<T*>(p.grad_qkv) + ((token * 3 + part) * f.heads + item.head) * f.head_dim;
    for (int64_t col = 0; col < f.head_dim; col += kLanes) {
      store_upto(out + col, load(sums + row * g.dim + col) * scale, f.head_dim - col);
    }
  }
}

// The item's gradient by relative position from its banks.
void write_bias_partial(const AttentionBackwardParams& p, const Geometry& g, const Item& item,
                        const float* banks) {
  float* out = p.bias_partials + item.head * 2 * p.forward.tokens + 2 * item.start;
  const int64_t count = 2 * item.length - 1;
  for (int64_t x = 0; x < count; ++x) out[x] = 0.0f;
  for (int64_t bank = 0; bank < kBanks; ++bank) {
    const float* sums = banks + bank * g.bank_stride + item.padded + bank - (item.length - 1);
    for (int64_t x = 0; x < count; ++x) out[x] += sums[x];
  }
}

template <typename T>
void backward_item(const AttentionBackwardParams& p, const Item& item, void* scratch) {
  using U = typename UnitOf<T>::type;
  const AttentionParams& f = p.forward;
  const Geometry g{f.head_dim / kDepth<U>, attention_pad(f.head_dim, kLanes), score_scale(f),
                   2 * item.padded + kAttentionPad};
  const Packed<U> packed = lay_out<U>(g, item, scratch);
  const Work<U> work{p, item, g, packed, attention_dropout(f)};
  pack_queries<T>(p, g, item, packed);
  load_bias(f, item, packed.bias);
  for (int64_t x = 0; x < kBanks * g.bank_stride; ++x) packed.banks[x] = 0.0f;
  KeyTile<U> key;
  for (int64_t first = 0; first < item.length; first += kTile) {
    pack_keys<T>(f, g, item, first, &key);
    for (int64_t i = 0; i < kTile * g.dim; ++i) key.grad_keys[i] = key.grad_values[i] = 0.0f;
    for (int64_t query = 0; query < item.length; query += kTile) {
      process_tile(work, query, &key);
    }
    write_rows<T>(p, g, item, 1, first, key.count, key.grad_keys, g.scale);
    write_rows<T>(p, g, item, 2, first, key.count, key.grad_values, 1.0f);
  }
  write_rows<T>(p, g, item, 0, 0, item.length, packed.grad_queries, g.scale);
  if (f.bias != nullptr) write_bias_partial(p, g, item, packed.banks);
}

// grad_bias of a head: the partial vectors in the order of the sequences.
void sum_bias_partials(const AttentionBackwardParams& p, int64_t head) {
  const AttentionParams& f = p.forward;
  const int64_t width = 2 * f.max_seqlen - 1;
  float* out = p.grad_bias + head * width;
  for (int64_t x = 0; x < width; ++x) out[x] = 0.0f;
  for (int64_t s = 0; s < f.sequences; ++s) {
    const int64_t start = f.cu_seqlens[s];
    const int64_t length = f.cu_seqlens[s + 1] - start;
    const float* partial = p.bias_partials + head * 2 * f.tokens + 2 * start;
    for (int64_t x = 0; x < 2 * length - 1; ++x) out[x + f.max_seqlen - length] += partial[x];
  }
}

}  // namespace

void attention_backward(const AttentionBackwardParams& p) {
  const AttentionParams& f = p.forward;
  for_each_item(f, true, [&](const Item& item, void* scratch) {
    f.dtype == DType::kFloat32 ? backward_item<float>(p, item, scratch)
                               : backward_item<bf16>(p, item, scratch);
  });
  if (f.bias == nullptr) return;
  parallel_for(0, f.heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t head = begin; head < end; ++head) sum_bias_partials(p, head);
  });
}

}  // namespace metro::METRO_CPU_NS
