// Arithmetic intrinsics, cached loads and stores, and atomics: exact where the GPU's are
// approximate. Threads never run at the same time, so that an atomic is a plain update.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

using std::max;
using std::min;

namespace metro::emulation {
template <typename To, typename From>
To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}
}  // namespace metro::emulation

inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline float __frsqrt_rn(float x) { return 1.0f / sqrtf(x); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __saturatef(float x) { return x > 1.0f ? 1.0f : x > 0.0f ? x : 0.0f; }
inline unsigned __float_as_uint(float x) { return metro::emulation::bit_cast<unsigned>(x); }
inline int __float_as_int(float x) { return metro::emulation::bit_cast<int>(x); }
inline float __uint_as_float(unsigned x) { return metro::emulation::bit_cast<float>(x); }
inline float __int_as_float(int x) { return metro::emulation::bit_cast<float>(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(static_cast<uint64_t>(a) * b >> 32);
}

template <typename T>
T __ldg(const T* p) {
  return *p;
}
template <typename T>
T __ldcs(const T* p) {
  return *p;
}
template <typename T>
T __ldcg(const T* p) {
  return *p;
}
template <typename T>
void __stcs(T* p, T value) {
  *p = value;
}
template <typename T>
void __stcg(T* p, T value) {
  *p = value;
}
inline void __threadfence() {}
inline void __threadfence_block() {}

#define METRO_ATOMIC(name, expression)       \
  template <typename T>                      \
  T name(T* at, std::type_identity_t<T> b) { \
    const T a = *at;                         \
    *at = static_cast<T>(expression);        \
    return a;                                \
  }
METRO_ATOMIC(atomicAdd, a + b)
METRO_ATOMIC(atomicSub, a - b)
METRO_ATOMIC(atomicMin, a < b ? a : b)
METRO_ATOMIC(atomicMax, a > b ? a : b)
METRO_ATOMIC(atomicExch, b)
METRO_ATOMIC(atomicAnd, a& b)
METRO_ATOMIC(atomicOr, a | b)
METRO_ATOMIC(atomicXor, a ^ b)
METRO_ATOMIC(atomicInc, a >= b ? 0 : a + 1)
#undef METRO_ATOMIC
template <typename T>
T atomicCAS(T* at, std::type_identity_t<T> expected, std::type_identity_t<T> desired) {
  const T old = *at;
  if (old == expected) *at = desired;
  return old;
}
