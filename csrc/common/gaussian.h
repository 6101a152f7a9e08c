// GELU and its slope from the standard normal distribution's lower tail, which takes one
// exponential. With a = |z|:
//
//   φ(a) = exp(-a²/2) / √(2π)
//   Φ(-a) = exp(-a²/2) · P(t),  t = 1 / (1 + c·a)
//   z·Φ(z) = max(z, 0) - a·Φ(-a)
//   Φ(z) + z·φ(z) = u for z < 0, 1 - u otherwise;  u = Φ(-a) - a·φ(a)
//
// P is a polynomial without constant term, fitted by reweighted least squares to Φ(-a)·exp(a²/2) on
// [0, 13]. So the tails keep full relative precision, which 0.5·(1 + erf(z/√2)) loses for negative
// z. For results kept in float32 its degree is 9 (relative error 4e-8; the CUDA kernels use the
// same), for bf16, which rounds by 2e-3, 6 (7e-6).
#pragma once

#include "common/simd.h"

namespace metro::METRO_CPU_NS {

template <int N>
struct Tail {
  Group<N> a;      // |z|, at most kFarthest
  Group<N> e;      // exp(-a²/2)
  Group<N> ratio;  // Φ(-a) / e
};

// Here exp(-a²/2) is 2^-127.02, which has become 0; so has the tail of an infinity, then.
constexpr float kFarthest = 13.27f;

constexpr float kTailDegree9[] = {-0.029094132f, 0.14371519f,  -0.2551739f,
                                  0.1585435f,    -0.02266518f, 0.10531471f,
                                  0.119883284f,  0.13985468f,  0.13962184f};
constexpr float kTailDegree6[] = {-0.07793068f, 0.21854725f, -0.01982423f,
                                  0.14575218f,  0.11334737f, 0.12011155f};

template <int N, int M, int E>
inline Tail<N> lower_tail(const Group<N>& z, float c, const float (&tail)[M],
                          const float (&exponential)[E]) {
  // In this order a NaN stays one.
  const Group<N> a = each<N>([&](int i) { return min(set(kFarthest), magnitude(z.v[i])); });
  const Group<N> square = each<N>([&](int i) { return a.v[i] * a.v[i]; });
  const Group<N> e = exp2_of_multiple(square, -0.721347520f, exponential);
  const Group<N> t = each<N>([&](int i) { return reciprocal(fma(set(c), a.v[i], set(1.0f))); });
  const Group<N> poly = polynomial(tail, t);
  return {a, e, each<N>([&](int i) { return poly.v[i] * t.v[i]; })};
}

// T: what the results are kept in.
template <typename T, int N>
inline Tail<N> lower_tail(const Group<N>& z) {
  if constexpr (sizeof(T) == 4) return lower_tail(z, 0.35f, kTailDegree9, kExp2Degree5);
  return lower_tail(z, 0.3f, kTailDegree6, kExp2Degree4);
}

template <typename T, int N>
inline Group<N> gelu(const Group<N>& z) {
  const Tail<N> tail = lower_tail<T>(z);
  return each<N>(
      [&](int i) { return fma(-tail.a.v[i], tail.e.v[i] * tail.ratio.v[i], max(vf{}, z.v[i])); });
}

template <typename T, int N>
inline Group<N> gelu_slope(const Group<N>& z) {
  const Tail<N> tail = lower_tail<T>(z);
  return each<N>([&](int i) {
    const vf u = tail.e.v[i] * fma(tail.a.v[i], set(-0.398942280f), tail.ratio.v[i]);
    return select(z.v[i] < 0.0f, u, 1.0f - u);
  });
}

}  // namespace metro::METRO_CPU_NS
