// Running a kernel family on the device of its tensors. Used by the *_op.cpp files only.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include "common/tensor_checks.h"

#ifdef METRO_WITH_CUDA
// Weak, so that one binary loads in a CPU-only torch, where the symbol does not exist.
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);
#endif

namespace metro {

// The current CUDA stream of the tensor's device.
void* current_stream(const char* op, const Tensor& t);
// Throws the CUDA runtime's message when `error` (a cudaError_t) is not cudaSuccess.
void check_cuda(const char* op, int error);

}  // namespace metro

// Runs family_cpu(params), or on a CUDA tensor family_cuda(params, stream) on the tensor's device
// and current stream. METRO_RUN_CPU is for families that have no CUDA kernel.
#ifdef METRO_WITH_CUDA
#define METRO_RUN(op, tensor, family, params)                                              \
  do {                                                                                     \
    if ((tensor).is_cuda()) {                                                              \
      const torch::stable::accelerator::DeviceGuard guard((tensor).get_device_index());    \
      ::metro::check_cuda(op, family##_cuda(params, ::metro::current_stream(op, tensor))); \
    } else {                                                                               \
      family##_cpu(params);                                                                \
    }                                                                                      \
  } while (0)
#else
#define METRO_RUN(op, tensor, family, params) METRO_RUN_CPU(op, tensor, family, params)
#endif

#define METRO_RUN_CPU(op, tensor, family, params)      \
  do {                                                 \
    if ((tensor).is_cuda()) ::metro::fail_no_cuda(op); \
    family##_cpu(params);                              \
  } while (0)
