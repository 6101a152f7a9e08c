// Products of small packed tiles, C += A·B, for the CPU kernels: float32 accumulators in registers.
//
// The operands are arrays of 32-bit units along the depth (the summed index): one float32, or, with
// AVX-512 BF16, a Pair of neighbouring bf16 numbers that one instruction multiplies and adds.
// bf16 data on a machine without that instruction is converted to float32 when it is packed.
//
// A may lie with any strides, since each unit is broadcast; B is [depth units, columns], columns
// contiguous and padded to kLanes; C is float32 with contiguous columns.
#pragma once

#include "common/simd.h"

namespace metro::METRO_CPU_NS {

struct Pair {
  uint32_t bits;  // the number of even depth in the low half
};

template <typename T>
struct UnitOf {
  using type = float;
};
#ifdef __AVX512BF16__
template <>
struct UnitOf<bf16> {
  using type = Pair;
};
#endif

template <typename U>
constexpr int kDepth = 1;  // numbers in a unit
template <>
constexpr int kDepth<Pair> = 2;

// A strip of kStripRows rows of C by kStripVectors vectors of columns stays in registers: 16
// accumulators of 32 registers with AVX-512, 8 of 16 otherwise; enough to hide the latency.
constexpr int kStripRows = 4;
#ifdef __AVX512F__
constexpr int kStripVectors = 4;
#else
constexpr int kStripVectors = 2;
#endif

inline vf multiply_add(float a, const float* b, vf c) { return fma(set(a), load(b), c); }

#ifdef __AVX512BF16__
inline vf multiply_add(Pair a, const Pair* b, vf c) {
  const __m512i left = _mm512_set1_epi32(static_cast<int>(a.bits));
  return (vf)_mm512_dpbf16_ps((__m512)c, (__m512bh)left, (__m512bh)_mm512_loadu_si512(b));
}
#endif

// The left operand: unit u of row r is at[r · row + u · unit].
template <typename U>
struct Left {
  const U* at;
  int64_t row;
  int64_t unit;
};

template <int kVectors, typename U>
inline void multiply_block(Left<U> a, const U* b, int64_t b_stride, int64_t units, float* c,
                           int64_t c_stride, bool add) {
  vf sums[kStripRows][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kStripRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      sums[r][v] = add ? load(c + r * c_stride + v * kLanes) : vf{};
    }
  }
  for (int64_t u = 0; u < units; ++u) {
    const U* left = a.at + u * a.unit;
    const U* right = b + u * b_stride;
#pragma GCC unroll 8
    for (int r = 0; r < kStripRows; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        sums[r][v] = multiply_add(left[r * a.row], right + v * kLanes, sums[r][v]);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kStripRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) store(c + r * c_stride + v * kLanes, sums[r][v]);
  }
}

// c [kStripRows, vectors · kLanes] = (add ? c : 0) + a·b, vectors ≤ kStripVectors.
template <typename U>
inline void multiply_strip(Left<U> a, const U* b, int64_t b_stride, int64_t units, float* c,
                           int64_t c_stride, int64_t vectors, bool add) {
  static_assert(kStripVectors <= 4);
  if (vectors == 1) return multiply_block<1>(a, b, b_stride, units, c, c_stride, add);
  if (vectors == 2) return multiply_block<2>(a, b, b_stride, units, c, c_stride, add);
#ifdef __AVX512F__
  if (vectors == 3) return multiply_block<3>(a, b, b_stride, units, c, c_stride, add);
  multiply_block<4>(a, b, b_stride, units, c, c_stride, add);
#endif
}

// c [rows, columns] = (add ? c : 0) + a·b; rows are rounded up to kStripRows and columns to kLanes,
// so both operands and c must be padded that far. Columns go outermost: a block of b stays in L1.
template <typename U>
inline void multiply_tile(Left<U> a, const U* b, int64_t b_stride, int64_t units, float* c,
                          int64_t c_stride, int64_t rows, int64_t columns, bool add) {
  const int64_t vectors = (columns + kLanes - 1) / kLanes;
  for (int64_t v = 0; v < vectors; v += kStripVectors) {
    const int64_t block = vectors - v < kStripVectors ? vectors - v : kStripVectors;
    for (int64_t r = 0; r < rows; r += kStripRows) {
      const Left<U> strip{a.at + r * a.row, a.row, a.unit};
      multiply_strip(strip, b + v * kLanes, b_stride, units, c + r * c_stride + v * kLanes,
                     c_stride, block, add);
    }
  }
}

// ---- Packing ----

// out [padded_rows, columns] with the depth along the columns = rows of x, then zero rows.
inline void pack_rows(const float* x, int64_t x_stride, int64_t rows, int64_t padded_rows,
                      int64_t columns, float* out, int64_t out_stride) {
  for (int64_t r = 0; r < padded_rows; ++r) {
    if (r < rows) {
      memcpy(out + r * out_stride, x + r * x_stride, static_cast<size_t>(columns) * 4);
    } else {
      memset(out + r * out_stride, 0, static_cast<size_t>(columns) * 4);
    }
  }
}

inline void pack_rows(const bf16* x, int64_t x_stride, int64_t rows, int64_t padded_rows,
                      int64_t columns, float* out, int64_t out_stride) {
  for (int64_t r = 0; r < padded_rows; ++r) {
    for (int64_t col = 0; col < columns; col += kLanes) {
      const int64_t left = columns - col;
      const vf value = r < rows ? load_upto(x + r * x_stride + col, left) : vf{};
      store_upto(out + r * out_stride + col, value, left);
    }
  }
}

// `columns` must be even; out_stride counts units, columns numbers.
inline void pack_rows(const bf16* x, int64_t x_stride, int64_t rows, int64_t padded_rows,
                      int64_t columns, Pair* out, int64_t out_stride) {
  for (int64_t r = 0; r < padded_rows; ++r) {
    if (r < rows) {
      memcpy(out + r * out_stride, x + r * x_stride, static_cast<size_t>(columns) * 2);
    } else {
      memset(out + r * out_stride, 0, static_cast<size_t>(columns) * 2);
    }
  }
}

// out [padded_rows / kDepth<U>, out_stride] with the depth along the rows of x; the columns up to
// out_stride and the rows past the end are zero.
template <typename T>
inline void pack_depth(const T* x, int64_t x_stride, int64_t rows, int64_t padded_rows,
                       int64_t columns, float* out, int64_t out_stride) {
  pack_rows(x, x_stride, rows, padded_rows, columns, out, out_stride);
  for (int64_t r = 0; r < padded_rows; ++r) {
    for (int64_t col = columns; col < out_stride; ++col) out[r * out_stride + col] = 0.0f;
  }
}

// The first n (all of them when n ≥ kLanes) 16-bit numbers, zero-extended; the rest 0.
inline vu load_halves(const bf16* p, int64_t n) {
  if (n >= kLanes) return load_u16(p);
  uint16_t lanes[kLanes] = {};
  for (int64_t i = 0; i < n; ++i) lanes[i] = p[i].bits;
  return load_u16(lanes);
}

inline void pack_depth(const bf16* x, int64_t x_stride, int64_t rows, int64_t padded_rows,
                       int64_t columns, Pair* out, int64_t out_stride) {
  for (int64_t r = 0; r < padded_rows; r += 2) {
    const bf16* even = x + r * x_stride;
    for (int64_t col = 0; col < out_stride; col += kLanes) {
      const int64_t left = columns - col;
      const vu low = load_halves(even + col, r < rows ? left : 0);
      const vu high = load_halves(even + x_stride + col, r + 1 < rows ? left : 0);
      const vu both = low | (high << 16);
      memcpy(out + r / 2 * out_stride + col, &both, sizeof(both));
    }
  }
}

// out [units, rows] = x [rows, units] transposed; rows and units multiples of 4.
template <typename U>
inline void transpose_units(const U* x, int64_t x_stride, int64_t rows, int64_t units, U* out,
                            int64_t out_stride) {
  typedef uint32_t v4 __attribute__((vector_size(16)));
  for (int64_t r = 0; r < rows; r += 4) {
    for (int64_t u = 0; u < units; u += 4) {
      v4 row[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) memcpy(&row[i], x + (r + i) * x_stride + u, 16);
      const v4 a = __builtin_shufflevector(row[0], row[1], 0, 4, 1, 5);
      const v4 b = __builtin_shufflevector(row[0], row[1], 2, 6, 3, 7);
      const v4 c = __builtin_shufflevector(row[2], row[3], 0, 4, 1, 5);
      const v4 d = __builtin_shufflevector(row[2], row[3], 2, 6, 3, 7);
      const v4 column[4] = {
          __builtin_shufflevector(a, c, 0, 1, 4, 5), __builtin_shufflevector(a, c, 2, 3, 6, 7),
          __builtin_shufflevector(b, d, 0, 1, 4, 5), __builtin_shufflevector(b, d, 2, 3, 6, 7)};
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) memcpy(out + (u + i) * out_stride + r, &column[i], 16);
    }
  }
}

// ---- Results as operands of the next product ----

// Columns [col, col + kLanes) of rows `row` (even) and `row` + 1, as units along the rows: for a
// product that sums over rows.
inline void store_row_units(float* out, int64_t stride, int64_t row, int64_t col, vf even, vf odd) {
  store(out + row * stride + col, even);
  store(out + (row + 1) * stride + col, odd);
}

#ifdef __AVX512BF16__
inline void store_row_units(Pair* out, int64_t stride, int64_t row, int64_t col, vf even, vf odd) {
  const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)even));
  const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)odd));
  _mm512_storeu_si512(out + row / 2 * stride + col,
                      _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
}
#endif

// The same columns of one row, which starts at `out`, as units along the columns.
inline void store_column_units(float* out, int64_t col, vf x) { store(out + col, x); }
inline void store_column_units(Pair* out, int64_t col, vf x) {
  store(reinterpret_cast<bf16*>(out) + col, x);
}

}  // namespace metro::METRO_CPU_NS
