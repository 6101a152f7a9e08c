// 16-byte loads and stores of the activation types, computed on in float32.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace metro::cuda {

template <typename T>
__device__ inline float to_float(T x) {
  return static_cast<float>(x);
}

template <typename T>
__device__ inline T from_float(float x) {
  return static_cast<T>(x);
}

template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

template <>
__device__ inline __half from_float<__half>(float x) {
  return __float2half_rn(x);
}

// N consecutive elements, moved by the widest accesses their size allows (16 bytes).
template <typename T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Pack {
  T items[N];
};

template <int N, typename T>
__device__ inline void load(const T* from, float (&to)[N]) {
  const Pack<T, N> pack = *reinterpret_cast<const Pack<T, N>*>(from);
#pragma unroll
  for (int i = 0; i < N; ++i) to[i] = to_float(pack.items[i]);
}

template <int N, typename T>
__device__ inline void store(T* to, const float (&from)[N]) {
  Pack<T, N> pack;
#pragma unroll
  for (int i = 0; i < N; ++i) pack.items[i] = from_float<T>(from[i]);
  *reinterpret_cast<Pack<T, N>*>(to) = pack;
}

// How many elements of T one 16-byte access holds, if rows of `cols` elements and every pointer
// allow it; else 1.
template <typename T, typename... Pointers>
inline int vector_width(int64_t cols, const Pointers*... pointers) {
  constexpr int kWidth = 16 / sizeof(T);
  const bool aligned = ((reinterpret_cast<uintptr_t>(pointers) % 16 == 0) && ...);
  return aligned && cols % kWidth == 0 ? kWidth : 1;
}

}  // namespace metro::cuda
