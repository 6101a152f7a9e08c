#include "common/cuda_glue.h"

#ifdef METRO_WITH_CUDA
#include <cuda_runtime_api.h>

namespace metro {

void* current_stream(const char* op, const Tensor& t) {
  METRO_CHECK(aoti_torch_get_current_cuda_stream != nullptr, op,
              "a CUDA tensor was given, but the torch that is loaded has no CUDA support");
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return stream;
}

void check_cuda(const char* op, int error) {
  METRO_CHECK(error == cudaSuccess, op,
              "CUDA error: ", cudaGetErrorString(static_cast<cudaError_t>(error)));
}

}  // namespace metro
#endif
