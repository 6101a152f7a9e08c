// Products with one operand packed in panels, C += A·B, at the rate of the multiply-add units.
//
// B is cut into panels of kPanel columns, [depth units, kPanel] each and contiguous, so that a
// block of kBlockUnits of depth stays in L1 and is met by every row of A. A lies as it is, since
// each of its units is broadcast. Units are those of tile_gemm.h: one float32, or a Pair of bf16.
#pragma once

#include "common/tile_gemm.h"

namespace metro::METRO_CPU_NS {

// Six rows by a panel's vectors: 24 accumulators of 32 registers with AVX-512, 12 of 16 otherwise,
// for a load of the panel by six multiplications.
constexpr int64_t kPanel = kStripVectors * kLanes;
constexpr int64_t kBlockUnits = 128;  // 32 KB of a panel with AVX-512, of 48 KB of L1

template <int kRows, int kVectors, typename U>
inline void multiply_rows(Left<U> a, const U* panel, int64_t units, float* c, bool add) {
  vf sums[kRows][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) sums[r][v] = add ? load(c + r * kPanel + v * kLanes) : vf{};
  }
  for (int64_t u = 0; u < units; ++u) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const U left = a.at[r * a.row + u * a.unit];
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        sums[r][v] = multiply_add(left, panel + u * kPanel + v * kLanes, sums[r][v]);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) store(c + r * kPanel + v * kLanes, sums[r][v]);
  }
}

// kVectors of a panel's vectors; rows are rounded up to an even number.
template <int kVectors, typename U>
inline void multiply_vectors(Left<U> a, int64_t rows, const U* panel, int64_t units, float* c,
                             bool add) {
  int64_t r = 0;
  const auto left = [&] { return Left<U>{a.at + r * a.row, a.row, a.unit}; };
  for (; r + 6 <= rows; r += 6)
    multiply_rows<6, kVectors>(left(), panel, units, c + r * kPanel, add);
  for (; r + 4 <= rows; r += 4)
    multiply_rows<4, kVectors>(left(), panel, units, c + r * kPanel, add);
  for (; r < rows; r += 2) multiply_rows<2, kVectors>(left(), panel, units, c + r * kPanel, add);
}

// c [rows, kPanel] = (add ? c : 0) + a·panel, of which the first `columns` matter. Rows are rounded
// up to an even number: a and c must reach that far.
template <typename U>
inline void multiply_panel(Left<U> a, int64_t rows, const U* panel, int64_t units, float* c,
                           int64_t columns, bool add) {
  static_assert(kStripVectors == 2 || kStripVectors == 4);
  const int64_t vectors = (columns + kLanes - 1) / kLanes;
  if (vectors == 1) return multiply_vectors<1>(a, rows, panel, units, c, add);
  if (vectors == 2) return multiply_vectors<2>(a, rows, panel, units, c, add);
#ifdef __AVX512F__
  if (vectors == 3) return multiply_vectors<3>(a, rows, panel, units, c, add);
  multiply_vectors<4>(a, rows, panel, units, c, add);
#endif
}

// Asks for memory that the next product will need, into L2: the machine does not see it coming
// where a product reads short pieces of many rows. Slice `index` of `slices` of the bytes, so that
// a loop can spread them over its turns.
inline void prefetch(const void* from, int64_t bytes, int64_t index = 0, int64_t slices = 1) {
  constexpr int64_t kLine = 64;
  const int64_t lines = (bytes + kLine - 1) / kLine;
  const char* at = static_cast<const char*>(from);
  for (int64_t i = lines * index / slices; i < lines * (index + 1) / slices; ++i) {
    __builtin_prefetch(at + i * kLine, 0, 2);
  }
}

// ---- Packing ----

template <typename U>
inline int64_t units_of(int64_t numbers) {
  return (numbers + kDepth<U> - 1) / kDepth<U>;
}

inline void set_unit(float* unit, float even, float) { *unit = even; }
inline void set_unit(float* unit, bf16 even, bf16) { *unit = bf16_to_float(even); }
inline void set_unit(Pair* unit, bf16 even, bf16 odd) {
  unit->bits = static_cast<uint32_t>(even.bits) | static_cast<uint32_t>(odd.bits) << 16;
}

// panel [units_of(columns), kPanel]: the columns of x [rows, columns] as depth, its rows as
// columns.
template <typename T, typename U>
inline void pack_transposed(const T* x, int64_t stride, int64_t rows, int64_t columns, U* panel) {
  for (int64_t u = 0; u < units_of<U>(columns); ++u) {
    const int64_t even = u * kDepth<U>, odd = even + 1;
    for (int64_t r = 0; r < kPanel; ++r) {
      const T* row = x + r * stride;
      set_unit(panel + u * kPanel + r, r < rows ? row[even] : T{},
               r < rows && odd < columns ? row[odd] : T{});
    }
  }
}

// panel [units_of(rows), kPanel]: the rows of x [rows, columns] as depth.
template <typename T, typename U>
inline void pack_panel(const T* x, int64_t stride, int64_t rows, int64_t columns, U* panel) {
  pack_depth(x, stride, rows, units_of<U>(rows) * kDepth<U>, columns < kPanel ? columns : kPanel,
             panel, kPanel);
}

// The rows of x [rows, columns] as units along the columns, [padded rows, stride units].
template <typename T, typename U>
inline void pack_left(const T* x, int64_t x_stride, int64_t rows, int64_t padded, int64_t columns,
                      U* out, int64_t stride) {
  for (int64_t r = 0; r < padded; ++r) {
    const T* row = x + r * x_stride;
    for (int64_t u = 0; u < units_of<U>(columns); ++u) {
      const int64_t even = u * kDepth<U>, odd = even + 1;
      set_unit(out + r * stride + u, r < rows ? row[even] : T{},
               r < rows && odd < columns ? row[odd] : T{});
    }
  }
}

}  // namespace metro::METRO_CPU_NS
