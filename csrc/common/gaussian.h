// The standard normal distribution function and density from one exponential.
//
//   φ(x) = exp(-x²/2) / √(2π)
//   Φ(-a) = exp(-a²/2) · P(t),  t = 1 / (1 + 0.35 a),  a ≥ 0
//
// P is a polynomial of degree 9 without constant term, fitted by reweighted least squares to
// Φ(-a)·exp(a²/2) on [0, 13]; its relative error there is 4e-8, so the tails keep full relative
// precision, which 0.5·(1 + erf(x/√2)) loses for negative x. The CUDA kernels use the same
// polynomial.
#pragma once

#include "common/simd.h"

namespace metro::METRO_CPU_NS {

struct Gaussian {
  vf cdf;
  vf pdf;
};

inline Gaussian gaussian(vf x) {
  const vf a = max(x, -x);
  const vf e = exp(-0.5f * a * a);
  const vf t = 1.0f / fma(set(0.35f), a, set(1.0f));
  vf poly = set(-0.029094132f);
  poly = fma(poly, t, set(0.14371519f));
  poly = fma(poly, t, set(-0.2551739f));
  poly = fma(poly, t, set(0.1585435f));
  poly = fma(poly, t, set(-0.02266518f));
  poly = fma(poly, t, set(0.10531471f));
  poly = fma(poly, t, set(0.119883284f));
  poly = fma(poly, t, set(0.13985468f));
  poly = fma(poly, t, set(0.13962184f));
  const vf tail = poly * t * e;
  return {select(x < 0.0f, tail, 1.0f - tail), 0.398942280f * e};
}

}  // namespace metro::METRO_CPU_NS
