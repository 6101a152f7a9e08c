// csrc/common/cuda_mma.cuh for the emulation, by the fragment layouts that its head describes.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#include "emulation/scheduler.h"

namespace metro::emulation {

struct Fragments {
  float c[4];
  uint32_t a[4];
  uint32_t b[2];
};

// The k-th 16-bit element of a register.
template <typename T>
float element(uint32_t word, int k) {
  const uint16_t bits = static_cast<uint16_t>(word >> (16 * k));
  T value;
  memcpy(&value, &bits, 2);
  return static_cast<float>(value);
}

inline float tf32(uint32_t word) {
  word &= ~0x1fffu;
  float value;
  memcpy(&value, &word, 4);
  return value;
}

// To float32, what does not fit cut off.
inline float toward_zero(double x) {
  const float nearest = static_cast<float>(x);
  return std::fabs(nearest) > std::fabs(x) && std::isfinite(nearest) ? nextafterf(nearest, 0.0f)
                                                                     : nearest;
}

// c[16][8] += a[16][k] b[k][8]. As on tensor cores (Fasi et al., PeerJ CS 7:e330) the products are
// exact and their sum with c is cut off, not rounded; that GPUs may cut the terms off before, a few
// bits further down, is not shown.
template <int K>
void multiply(const float (&a)[16][K], const float (&b)[K][8], Exchange& e) {
  for (int lane = 0; lane < 32; ++lane) {
    Fragments f = e.get<Fragments>(lane);
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + 8 * (i / 2), col = lane % 4 * 2 + i % 2;
      double sum = f.c[i];
      for (int k = 0; k < K; ++k) sum += static_cast<double>(a[row][k]) * b[k][col];
      f.c[i] = toward_zero(sum);
    }
    e.put(lane, f);
  }
}

template <typename T>
void finish_16(Exchange& e) {
  float a[16][16], b[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const Fragments f = e.get<Fragments>(lane);
    const int group = lane / 4, member = lane % 4;
    for (int k = 0; k < 2; ++k) {
      for (int i = 0; i < 4; ++i) {
        a[group + 8 * (i % 2)][2 * member + 8 * (i / 2) + k] = element<T>(f.a[i], k);
      }
      for (int i = 0; i < 2; ++i) b[2 * member + 8 * i + k][group] = element<T>(f.b[i], k);
    }
  }
  multiply<16>(a, b, e);
}

inline void finish_tf32(Exchange& e) {
  float a[16][8], b[8][8];
  for (int lane = 0; lane < 32; ++lane) {
    const Fragments f = e.get<Fragments>(lane);
    const int group = lane / 4, member = lane % 4;
    for (int i = 0; i < 4; ++i) a[group + 8 * (i % 2)][member + 4 * (i / 2)] = tf32(f.a[i]);
    for (int i = 0; i < 2; ++i) b[member + 4 * i][group] = tf32(f.b[i]);
  }
  multiply<8>(a, b, e);
}

inline void multiply(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                     const char* what, void (*finish)(Exchange&)) {
  Fragments f;
  memcpy(f.c, c, sizeof(c));
  memcpy(f.a, a, sizeof(a));
  memcpy(f.b, b, sizeof(b));
  Exchange& e = meet(0xffffffffu, {what, __FILE__, __LINE__}, &f, sizeof(f), finish);
  f = e.get<Fragments>(lane());
  leave(e);
  memcpy(c, f.c, sizeof(c));
}

struct Row {
  uint16_t items[8];
};

inline void load_matrices(uint32_t (&r)[4], const void* shared_row, bool transposed) {
  const char* what = transposed ? "ldmatrix.trans" : "ldmatrix";
  check_shared(what, shared_row, 16);
  const Row row = *static_cast<const Row*>(shared_row);
  Exchange& e = meet(0xffffffffu, {what, __FILE__, __LINE__}, &row, sizeof(row));
  const int group = lane() / 4, member = lane() % 4;
  for (int m = 0; m < 4; ++m) {
    uint16_t pair[2];
    for (int k = 0; k < 2; ++k) {
      const int from_row = transposed ? 2 * member + k : group;
      const int from_col = transposed ? group : 2 * member + k;
      pair[k] = e.get<Row>(8 * m + from_row).items[from_col];
    }
    memcpy(&r[m], pair, 4);
  }
  leave(e);
}

}  // namespace metro::emulation

namespace metro::cuda {

inline void cp_async_16(void* shared, const void* global, bool valid) {
  emulation::check_shared("cp_async_16", shared, 16);
  unsigned char bytes[16] = {};
  if (valid) {
    if (reinterpret_cast<uintptr_t>(global) % 16 != 0) {
      emulation::fail("cp_async_16: the global address is no multiple of 16");
    }
    memcpy(bytes, global, 16);
  }
  emulation::async_copy(shared, bytes);
}
inline void cp_async_commit() { emulation::async_commit(); }
template <int N>
inline void cp_async_wait() {
  emulation::async_wait(N);
}

inline void ldmatrix_x4(uint32_t (&r)[4], const void* shared_row) {
  emulation::load_matrices(r, shared_row, false);
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* shared_row) {
  emulation::load_matrices(r, shared_row, true);
}

template <typename T>
inline void mma_16x8x16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulation::multiply(c, a, b, "mma_16x8x16", emulation::finish_16<T>);
}
inline void mma_16x8x8_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulation::multiply(c, a, b, "mma_16x8x8_tf32", emulation::finish_tf32);
}

inline float exp2_approx(float x) {
  const float y = exp2f(std::fpclassify(x) == FP_SUBNORMAL ? 0.0f : x);
  return std::fpclassify(y) == FP_SUBNORMAL ? 0.0f : y;
}

}  // namespace metro::cuda
