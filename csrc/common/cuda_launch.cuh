// The one way to launch a kernel. The CPU emulation of the execution model replaces it, so that
// the kernels themselves stay plain CUDA C++ without <<<>>>.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace metro::cuda {

constexpr int kWarp = 32;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// An extent of a grid. What does not fit is no small number by accident: the launch refuses it.
inline unsigned grid_extent(int64_t blocks) {
  return blocks <= INT32_MAX ? static_cast<unsigned>(blocks) : UINT32_MAX;
}

// The most shared memory that a block can have on the current device.
inline int64_t shared_memory_limit() {
  int device = 0, bytes = 0;
  const bool known = cudaGetDevice(&device) == cudaSuccess &&
                     cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin,
                                            device) == cudaSuccess;
  return known ? bytes : 48 * 1024;
}

#ifndef METRO_EMULATE_CUDA
// The block's dynamic shared memory, as many bytes as the launch asked for. Static shared memory is
// declared in the kernels themselves, which stand in an unnamed namespace.
template <typename T>
__device__ inline T* dynamic_shared() {
  extern __shared__ __align__(128) unsigned char metro_dynamic_shared[];
  return reinterpret_cast<T*>(metro_dynamic_shared);
}

// Launches on `stream` and returns the launch's error; an empty grid is a success.
template <typename... Params, typename... Args>
cudaError_t launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes,
                   void* stream, Args&&... args) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return cudaSuccess;
  kernel<<<grid, block, shared_bytes, static_cast<cudaStream_t>(stream)>>>(
      static_cast<Args&&>(args)...);
  return cudaGetLastError();
}
#endif

}  // namespace metro::cuda
