// A launcher for each element type, by the type that the parameters name.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "common/types.h"

namespace metro::cuda {

// launch(T{}) for the type of `dtype`; the result is the launcher's.
template <typename Launch>
inline cudaError_t by_dtype(DType dtype, const Launch& launch) {
  switch (dtype) {
    case DType::kFloat32:
      return launch(float{});
    case DType::kBFloat16:
      return launch(__nv_bfloat16{});
    case DType::kFloat16:
      return launch(__half{});
  }
  return cudaErrorInvalidValue;
}

}  // namespace metro::cuda
