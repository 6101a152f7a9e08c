// Shuffles, votes and reductions of a warp.
#pragma once

#include <cstdint>

#include "emulation/scheduler.h"

namespace metro::emulation {

struct Shuffle {
  const char* file = __builtin_FILE();
  int line = __builtin_LINE();
};

// The value of `source`, a lane of the mask.
template <typename T>
T shuffle(uint32_t mask, T value, int source, Place place) {
  if ((mask >> lane() & 1u) != 0 && (mask >> source & 1u) == 0) {
    fail("%s at %s:%d reads lane %d, which is not in the mask 0x%08x", place.what, place.file,
         place.line, source, mask);
  }
  Exchange& e = meet(mask, place, &value, sizeof(T));  // refuses a caller outside its mask
  const T result = e.get<T>(source);
  leave(e);
  return result;
}

// Folds the values of the mask's lanes.
template <typename T, typename Op>
T fold(uint32_t mask, T value, Place place, Op op) {
  Exchange& e = meet(mask, place, &value, sizeof(T));
  T result{};
  bool first = true;
  for (int i = 0; i < 32; ++i) {
    if ((mask >> i & 1u) == 0) continue;
    result = first ? e.get<T>(i) : op(result, e.get<T>(i));
    first = false;
  }
  leave(e);
  return result;
}

}  // namespace metro::emulation

#define METRO_PLACE {__func__, at.file, at.line}

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32,
              metro::emulation::Shuffle at = {}) {
  const int base = metro::emulation::lane() & ~(width - 1);
  return metro::emulation::shuffle(mask, value, base + (source & (width - 1)), METRO_PLACE);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32,
                  metro::emulation::Shuffle at = {}) {
  const int lane = metro::emulation::lane(), source = lane ^ bits;
  const bool inside = source < (lane & ~(width - 1)) + width;
  return metro::emulation::shuffle(mask, value, inside ? source : lane, METRO_PLACE);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32,
                 metro::emulation::Shuffle at = {}) {
  const int lane = metro::emulation::lane(), source = lane - static_cast<int>(delta);
  const bool inside = source >= (lane & ~(width - 1));
  return metro::emulation::shuffle(mask, value, inside ? source : lane, METRO_PLACE);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32,
                   metro::emulation::Shuffle at = {}) {
  const int lane = metro::emulation::lane(), source = lane + static_cast<int>(delta);
  const bool inside = source < (lane & ~(width - 1)) + width;
  return metro::emulation::shuffle(mask, value, inside ? source : lane, METRO_PLACE);
}
inline void __syncwarp(unsigned mask = 0xffffffffu, metro::emulation::Shuffle at = {}) {
  metro::emulation::leave(metro::emulation::meet(mask, METRO_PLACE, nullptr, 0));
}
inline unsigned __ballot_sync(unsigned mask, int predicate, metro::emulation::Shuffle at = {}) {
  const uint32_t bit = predicate ? 1u << metro::emulation::lane() : 0u;
  return metro::emulation::fold(mask, bit, METRO_PLACE, [](auto a, auto b) { return a | b; });
}
inline int __any_sync(unsigned mask, int predicate, metro::emulation::Shuffle at = {}) {
  return metro::emulation::fold(mask, predicate != 0, METRO_PLACE,
                                [](bool a, bool b) { return a || b; });
}
inline int __all_sync(unsigned mask, int predicate, metro::emulation::Shuffle at = {}) {
  return metro::emulation::fold(mask, predicate != 0, METRO_PLACE,
                                [](bool a, bool b) { return a && b; });
}

#define METRO_REDUCE(name, expression)                                                  \
  template <typename T>                                                                 \
  T name(unsigned mask, T value, metro::emulation::Shuffle at = {}) {                   \
    return metro::emulation::fold(mask, value, METRO_PLACE,                             \
                                  [](T a, T b) { return static_cast<T>(expression); }); \
  }
METRO_REDUCE(__reduce_add_sync, a + b)
METRO_REDUCE(__reduce_min_sync, a < b ? a : b)
METRO_REDUCE(__reduce_max_sync, a > b ? a : b)
METRO_REDUCE(__reduce_and_sync, a& b)
METRO_REDUCE(__reduce_or_sync, a | b)
METRO_REDUCE(__reduce_xor_sync, a ^ b)
#undef METRO_REDUCE
#undef METRO_PLACE
