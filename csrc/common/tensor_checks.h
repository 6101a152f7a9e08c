// Argument checks and small helpers for the *_op.cpp files, the only ones that see tensors.
// Every message names the operator, the argument, what was expected and what was found.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include "common/cpu_isa.h"
#include "common/types.h"

namespace metro {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename... Parts>
[[noreturn]] inline void fail(const char* op, const Parts&... parts) {
  std::ostringstream message;
  message << "metro::" << op << ": ";
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

#define METRO_CHECK(condition, op, ...)               \
  do {                                                \
    if (!(condition)) ::metro::fail(op, __VA_ARGS__); \
  } while (0)

const char* dtype_name(ScalarType dtype);
std::string shape_string(const Tensor& t);

// An extent of -1 in `shape` accepts any size.
void check_shape(const char* op, const char* name, const Tensor& t,
                 std::initializer_list<int64_t> shape);
void check_dtype(const char* op, const char* name, const Tensor& t, ScalarType expected);
// float32 or bfloat16; float16 too on CUDA.
void check_floating(const char* op, const char* name, const Tensor& t);
void check_same_device(const char* op, const char* name, const Tensor& t, const Tensor& reference,
                       const char* reference_name);
void check_same_shape(const char* op, const char* name, const Tensor& t, const Tensor& reference,
                      const char* reference_name);
// A key of the counter-based random generator: one int64 on the device of the data.
void check_seed(const char* op, const Tensor& seed, const Tensor& reference);
// Raised for a CUDA tensor where this build or this operator has no CUDA kernel.
[[noreturn]] void fail_no_cuda(const char* op);

// `t`, or a copy of it, contiguous and on a 16-byte boundary, which a view of a part of a tensor
// may miss: for kernels that have no path for anything else.
Tensor contiguous_aligned(const Tensor& t);

Tensor empty_on(const Tensor& reference, std::initializer_list<int64_t> shape, ScalarType dtype);

// The element type of a tensor that check_floating accepted.
inline DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    default:
      return DType::kFloat32;
  }
}

template <typename T>
const T* data(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

template <typename T>
T* mutable_data(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

// Registers `function` for both devices; it decides by the device of its arguments.
#define METRO_REGISTER(ops)                            \
  STABLE_TORCH_LIBRARY_IMPL(metro, CPU, m) { ops(m); } \
  STABLE_TORCH_LIBRARY_IMPL(metro, CUDA, m) { ops(m); }

}  // namespace metro
