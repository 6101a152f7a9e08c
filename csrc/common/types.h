// The element types of activations and matrices.
#pragma once

#include <cstdint>

namespace metro {

enum class DType { kFloat32, kBFloat16, kFloat16 };

// The storage type of bfloat16 on the CPU: 16 bits, converted to float32 on load.
struct bf16 {
  uint16_t bits;
};

}  // namespace metro
