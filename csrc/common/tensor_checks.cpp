#include "common/tensor_checks.h"

#include <vector>

namespace metro {

const char* dtype_name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Short:
      return "int16";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Bool:
      return "bool";
    default:
      return "another dtype";
  }
}

namespace {

std::string shape_string(const int64_t* sizes, size_t dims) {
  std::ostringstream out;
  out << '[';
  for (size_t i = 0; i < dims; ++i) {
    out << (i ? ", " : "");
    if (sizes[i] < 0) {
      out << '*';
    } else {
      out << sizes[i];
    }
  }
  out << ']';
  return out.str();
}

}  // namespace

std::string shape_string(const Tensor& t) {
  const auto sizes = t.sizes();
  return shape_string(sizes.data(), sizes.size());
}

void check_shape(const char* op, const char* name, const Tensor& t,
                 std::initializer_list<int64_t> shape) {
  const auto sizes = t.sizes();
  bool same = sizes.size() == shape.size();
  for (size_t i = 0; same && i < shape.size(); ++i) {
    const int64_t expected = shape.begin()[i];
    same = expected < 0 || expected == sizes[i];
  }
  METRO_CHECK(same, op, name, " must have shape ", shape_string(shape.begin(), shape.size()),
              ", found ", shape_string(t));
}

void check_same_shape(const char* op, const char* name, const Tensor& t, const Tensor& reference,
                      const char* reference_name) {
  METRO_CHECK(shape_string(t) == shape_string(reference), op, name, " must have the shape of ",
              reference_name, " ", shape_string(reference), ", found ", shape_string(t));
}

void check_dtype(const char* op, const char* name, const Tensor& t, ScalarType expected) {
  METRO_CHECK(t.scalar_type() == expected, op, name, " must be ", dtype_name(expected), ", found ",
              dtype_name(t.scalar_type()));
}

void check_floating(const char* op, const char* name, const Tensor& t) {
  const ScalarType dtype = t.scalar_type();
  const bool on_cuda = t.is_cuda();
  METRO_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 ||
                  (on_cuda && dtype == ScalarType::Half),
              op, name, " must be float32", on_cuda ? ", float16" : "", " or bfloat16, found ",
              dtype_name(dtype));
}

void check_same_device(const char* op, const char* name, const Tensor& t, const Tensor& reference,
                       const char* reference_name) {
  const auto describe = [](const Tensor& x) {
    return x.is_cuda() ? "cuda:" + std::to_string(x.get_device_index())
                       : std::string(x.is_cpu() ? "cpu" : "another device");
  };
  METRO_CHECK(t.is_cuda() == reference.is_cuda() && t.is_cpu() == reference.is_cpu() &&
                  t.get_device_index() == reference.get_device_index(),
              op, name, " must be on the device of ", reference_name, " (", describe(reference),
              "), found ", describe(t));
}

void check_seed(const char* op, const Tensor& seed, const Tensor& reference) {
  check_dtype(op, "seed", seed, ScalarType::Long);
  METRO_CHECK(seed.numel() == 1, op, "seed must hold one int64, found shape ", shape_string(seed));
  check_same_device(op, "seed", seed, reference, "the data");
}

void fail_no_cuda(const char* op) {
#ifdef METRO_WITH_CUDA
  fail(op, "there is no CUDA kernel for this operator yet; move its arguments to the CPU");
#else
  fail(op,
       "this build has no CUDA kernels; install the CUDA toolkit (nvcc on the PATH) and rebuild "
       "with `pip install --no-build-isolation .`, or move the arguments to the CPU");
#endif
}

Tensor contiguous_aligned(const Tensor& t) {
  const Tensor whole = torch::stable::contiguous(t);
  const bool aligned = reinterpret_cast<uintptr_t>(whole.const_data_ptr()) % 16 == 0;
  return aligned ? whole : torch::stable::clone(whole);
}

Tensor empty_on(const Tensor& reference, std::initializer_list<int64_t> shape, ScalarType dtype) {
  const std::vector<int64_t> sizes(shape);
  return torch::stable::new_empty(
      reference, torch::headeronly::IntHeaderOnlyArrayRef(sizes.data(), sizes.size()), dtype);
}

}  // namespace metro
