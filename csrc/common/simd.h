// Vectors of float32 for the CPU kernels, on the compilers' vector extensions: 16 lanes with
// AVX-512, 8 with AVX2, 4 otherwise. Everything lives in METRO_CPU_NS, one namespace per
// instruction set, so that the linker never mixes versions (see cpu_isa.h); for the same reason
// kernels use no templates of the standard library.
//
// Storage types (float, bf16) are converted to float32 on load and rounded to nearest even on
// store; all arithmetic is float32.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/types.h"

#ifdef __AVX2__
// GCC 12 warns about the undefined values inside its own AVX-512 intrinsics (GCC bug 105593).
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

#ifndef METRO_CPU_NS
#define METRO_CPU_NS cpu_portable
#endif

namespace metro::METRO_CPU_NS {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float vf __attribute__((vector_size(kLanes * 4)));
typedef int32_t vi __attribute__((vector_size(kLanes * 4)));
typedef uint32_t vu __attribute__((vector_size(kLanes * 4)));
typedef uint16_t vu16 __attribute__((vector_size(kLanes * 2)));

inline vf set(float x) { return x - vf{}; }
inline vu set_u(uint32_t x) { return x - vu{}; }
inline vf bits_to_float(vu x) { return (vf)x; }
inline vu float_to_bits(vf x) { return (vu)x; }

// mask ? a : b, for the masks (all ones or all zeros per lane) that comparisons give.
inline vf select(vi mask, vf a, vf b) { return mask ? a : b; }
// b where either is NaN, as in the instruction.
inline vf max(vf a, vf b) {
#if defined(__AVX512F__)
  return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#else
  return a > b ? a : b;
#endif
}
inline vf min(vf a, vf b) {
#if defined(__AVX512F__)
  return (vf)_mm512_min_ps((__m512)a, (__m512)b);
#else
  return a < b ? a : b;
#endif
}

inline vf magnitude(vf x) { return bits_to_float(float_to_bits(x) & 0x7fffffffu); }

// a · b + c, rounded once where the machine has a fused multiply-add.
inline vf fma(vf a, vf b, vf c) {
#if defined(__AVX512F__)
  return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

inline float bf16_to_float(bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float out;
  memcpy(&out, &bits, 4);
  return out;
}

inline bf16 float_to_bf16(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  if (x != x) return bf16{0x7fc0};
  return bf16{static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) { return bf16_to_float(x); }
inline void from_float(float* out, float x) { *out = x; }
inline void from_float(bf16* out, float x) { *out = float_to_bf16(x); }

inline vf load(const float* p) {
  vf out;
  memcpy(&out, p, sizeof(out));
  return out;
}

// kLanes 16-bit numbers, zero-extended. One instruction; __builtin_convertvector makes several.
inline vu load_u16(const void* p) {
#if defined(__AVX512F__)
  return (vu)_mm512_cvtepu16_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(p)));
#elif defined(__AVX2__)
  return (vu)_mm256_cvtepu16_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p)));
#else
  vu16 half;
  memcpy(&half, p, sizeof(half));
  return __builtin_convertvector(half, vu);
#endif
}

inline vf load(const bf16* p) { return (vf)(load_u16(p) << 16); }

inline void store(float* p, vf x) { memcpy(p, &x, sizeof(x)); }

inline void store(bf16* p, vf x) {
#if defined(__AVX512BF16__)
  const __m256bh half = _mm512_cvtneps_pbh((__m512)x);
  memcpy(p, &half, sizeof(half));
#else
  vu bits = (vu)x;
  bits = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  bits = (x != x) ? set_u(0x7fc0) : bits;
  const vu16 half = __builtin_convertvector(bits, vu16);
  memcpy(p, &half, sizeof(half));
#endif
}

// The first n < kLanes elements; the other lanes are `fill`.
template <typename T>
inline vf load_partial(const T* p, int64_t n, float fill = 0.0f) {
  float lanes[kLanes];
  for (int i = 0; i < kLanes; ++i) lanes[i] = fill;
  for (int64_t i = 0; i < n; ++i) lanes[i] = to_float(p[i]);
  return load(lanes);
}

template <typename T>
inline void store_partial(T* p, vf x, int64_t n) {
  float lanes[kLanes];
  store(lanes, x);
  for (int64_t i = 0; i < n; ++i) from_float(p + i, lanes[i]);
}

template <typename T>
inline vf load_upto(const T* p, int64_t n, float fill = 0.0f) {
  return n >= kLanes ? load(p) : load_partial(p, n, fill);
}

template <typename T>
inline void store_upto(T* p, vf x, int64_t n) {
  if (n >= kLanes) {
    store(p, x);
  } else {
    store_partial(p, x, n);
  }
}

// 1 / x for normal x, to 2 ulp: the machine's estimate and one Newton step.
inline vf reciprocal(vf x) {
#if defined(__AVX512F__)
  const vf estimate = (vf)_mm512_rcp14_ps((__m512)x);
#elif defined(__AVX2__)
  const vf estimate = (vf)_mm256_rcp_ps((__m256)x);
#else
  return 1.0f / x;
#endif
#if defined(__AVX2__)
  return fma(estimate, fma(-x, estimate, set(1.0f)), estimate);
#endif
}

// N vectors that take each step of a computation together. One long chain of dependent instructions
// after another would fill the processor's scheduler before it has seen the next chain.
template <int N>
struct Group {
  vf v[N];
};

// f(i) for each of the N.
template <int N, typename F>
inline Group<N> each(const F& f) {
  Group<N> out;
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) out.v[i] = f(i);
  return out;
}

// coefficients[0] · xᴹ⁻¹ + ... + coefficients[M - 1]
template <int N, int M>
inline Group<N> polynomial(const float (&coefficients)[M], const Group<N>& x) {
  Group<N> sum = each<N>([&](int) { return set(coefficients[0]); });
#pragma GCC unroll 16
  for (int k = 1; k < M; ++k) {
    sum = each<N>([&](int i) { return fma(sum.v[i], x.v[i], set(coefficients[k])); });
  }
  return sum;
}

constexpr float kExp2Degree5[] = {1.32647273e-3f, 9.67151299e-3f, 5.55073359e-2f,
                                  2.40222424e-1f, 6.93147004e-1f, 1.0f};
constexpr float kExp2Degree4[] = {9.57012e-3f, 5.59179e-2f, 2.40247443e-1f, 6.93121806e-1f,
                                  9.99999262e-1f};

// 2^(factor · x), for products from -127.5 (which gives 0) to 120. NaN stays NaN. The relative
// error is 1e-7 with the polynomial of degree 5, 3e-6 with that of degree 4.
template <int N, int M>
inline Group<N> exp2_of_multiple(const Group<N>& x, float factor, const float (&coefficients)[M]) {
  const vf shift = set(12582912.0f + 127.0f);  // 1.5 · 2²³ + exponent bias
  const Group<N> shifted = each<N>([&](int i) { return fma(x.v[i], set(factor), shift); });
  const Group<N> r = each<N>([&](int i) { return fma(x.v[i], set(factor), shift - shifted.v[i]); });
  const Group<N> poly = polynomial(coefficients, r);
  return each<N>(
      [&](int i) { return poly.v[i] * bits_to_float(float_to_bits(shifted.v[i]) << 23); });
}

// 2^x for x ≤ 120, relative error 1e-7; 0 below -127. NaN stays NaN.
inline vf exp2(vf x) {
  return exp2_of_multiple(Group<1>{{max(set(-127.0f), x)}}, 1.0f, kExp2Degree5).v[0];
}

// The halves are added (compared) first, then quarters, and so on: the same order with and without
// AVX-512.
inline float reduce_add(vf x) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)x);
#else
  float lanes[kLanes];
  store(lanes, x);
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  }
  return lanes[0];
#endif
}

inline float reduce_max(vf x) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)x);
#else
  float lanes[kLanes];
  store(lanes, x);
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i)
      lanes[i] = lanes[i] > lanes[i + width] ? lanes[i] : lanes[i + width];
  }
  return lanes[0];
#endif
}

// e^x to 2 ulp for x ≤ 88; 0 below -87. Cody-Waite reduction x = n·ln 2 + r, |r| ≤ ln 2 / 2, and a
// minimax polynomial for (e^r - 1 - r) / r² (relative error of e^r below 4e-9).
inline vf exp(vf x) {
  const vi underflow = x < -87.0f;
  x = min(set(88.0f), x);             // in this order a NaN stays one
  const vf shift = set(12582912.0f);  // 1.5 · 2²³: adding it rounds to an integer
  const vf shifted = fma(x, set(1.44269504f), shift);
  const vf n = shifted - shift;
  vf r = fma(n, set(-0.693359375f), x);
  r = fma(n, set(2.12194440e-4f), r);
  vf poly = set(1.38145583e-3f);
  poly = fma(poly, r, set(8.36870955e-3f));
  poly = fma(poly, r, set(4.16683881e-2f));
  poly = fma(poly, r, set(1.66665207e-1f));
  poly = fma(poly, r, set(4.99999935e-1f));
  poly = fma(poly * r, r, r) + 1.0f;
  const vu scale = (float_to_bits(shifted) << 23) + 0x3f800000u;
  return select(underflow, vf{}, poly * bits_to_float(scale));
}

}  // namespace metro::METRO_CPU_NS
