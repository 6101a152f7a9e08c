// metro::cuda::launch, dynamic_shared and what of the CUDA runtime the launchers call.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <tuple>

#include "emulation/scheduler.h"

namespace metro::emulation {
// cudaErrorInvalidConfiguration or cudaErrorInvalidValue where a GPU would refuse the launch.
cudaError_t check_launch(const void* kernel, dim3 grid, dim3 block, size_t shared_bytes);
}  // namespace metro::emulation

namespace metro::cuda {

template <typename T>
T* dynamic_shared() {
  return reinterpret_cast<T*>(emulation::dynamic_shared_memory());
}

template <typename... Params, typename... Args>
cudaError_t launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes, void*,
                   Args&&... args) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return cudaSuccess;
  const cudaError_t error =
      emulation::check_launch(reinterpret_cast<const void*>(kernel), grid, block, shared_bytes);
  if (error != cudaSuccess) return error;
  struct Call {
    void (*kernel)(Params...);
    std::tuple<Params...> params;
  } call{kernel, std::tuple<Params...>(static_cast<Args&&>(args)...)};
  const auto run = [](void* context) {
    const Call& c = *static_cast<const Call*>(context);
    std::apply(c.kernel, c.params);
  };
  emulation::run_grid(grid, block, shared_bytes, {run, &call});
  return cudaSuccess;
}

}  // namespace metro::cuda

template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute attribute, int value) {
  return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), attribute, value);
}
template <typename Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel* kernel, int threads,
                                                          size_t shared_bytes) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessor(
      blocks, reinterpret_cast<const void*>(kernel), threads, shared_bytes);
}
