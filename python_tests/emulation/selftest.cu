// Kernels for test_emulation.py: each primitive alone, and the mistakes that must be caught.
#include "common/cuda_launch.cuh"
#include "common/cuda_mma.cuh"
#include "emulation/entry.h"

namespace metro {
namespace {

using namespace cuda;

__global__ void shuffle_kernel(const int* x, int* out) {
  const int lane = threadIdx.x % 32;
  const int v = x[threadIdx.x];
  int* o = out + threadIdx.x * 10;
  o[0] = __shfl_xor_sync(0xffffffffu, v, 5);
  o[1] = __shfl_down_sync(0xffffffffu, v, 3);
  o[2] = __shfl_up_sync(0xffffffffu, v, 3, 16);
  o[3] = __shfl_sync(0xffffffffu, v, lane + 7, 8);
  o[4] = static_cast<int>(__ballot_sync(0xffffffffu, v % 3 == 0));
  o[5] = __any_sync(0xffffffffu, v == 40);
  o[6] = __all_sync(0xffffffffu, v >= 32);
  o[7] = __reduce_add_sync(0xffffffffu, v);
  o[8] = 0;
  if (lane % 2 == 0) o[8] = __shfl_xor_sync(0x55555555u, v, 2);
  __syncwarp();
  o[9] = __syncthreads_count(v % 5 == 0);
}

// Reads what other warps wrote, with and without the barrier between.
__global__ void exchange_kernel(int* out, bool with_barrier) {
  __shared__ int values[64];
  values[threadIdx.x] = static_cast<int>(threadIdx.x);
  if (with_barrier) __syncthreads();
  out[threadIdx.x] = values[63 - threadIdx.x];
}

__global__ void atomic_kernel(float* sum, int* most) {
  atomicAdd(sum, 0.5f);
  atomicMax(most, static_cast<int>(threadIdx.x * blockIdx.x));
}

template <int kWait>
__global__ void copy_kernel(const float* from, float* to) {
  float* shared = dynamic_shared<float>();
  const int at = threadIdx.x * 4;
  cp_async_16(shared + at, from + at, threadIdx.x != 1);
  cp_async_commit();
  cp_async_16(shared + 128 + at, from + 128 + at, true);
  cp_async_commit();
  cp_async_wait<kWait>();
  __syncthreads();
  for (int i = 0; i < 4; ++i) {
    to[at + i] = shared[at + i];
    to[128 + at + i] = shared[128 + at + i];
  }
}

__global__ void ldmatrix_kernel(const uint16_t* from, uint32_t* plain, uint32_t* transposed) {
  __shared__ __align__(16) uint16_t rows[32][8];
  for (int i = 0; i < 8; ++i) rows[threadIdx.x][i] = from[threadIdx.x * 8 + i];
  __syncthreads();
  uint32_t r[4];
  ldmatrix_x4(r, rows[threadIdx.x]);
  for (int i = 0; i < 4; ++i) plain[threadIdx.x * 4 + i] = r[i];
  ldmatrix_x4_trans(r, rows[threadIdx.x]);
  for (int i = 0; i < 4; ++i) transposed[threadIdx.x * 4 + i] = r[i];
}

// c[16][8] += a[16][16] b[16][8] in the way a kernel does it: ldmatrix, mma, and the accumulator's
// own layout.
template <typename T>
__global__ void mma_kernel(const T* a, const T* b, float* c) {
  __shared__ __align__(16) T sa[16][16], sb[16][8];
  const int lane = static_cast<int>(threadIdx.x);
  for (int i = lane; i < 256; i += 32) sa[i / 16][i % 16] = a[i];
  for (int i = lane; i < 128; i += 32) sb[i / 8][i % 8] = b[i];
  __syncwarp();
  uint32_t fa[4], fb[4];
  ldmatrix_x4(fa, &sa[lane % 16][lane / 16 * 8]);
  ldmatrix_x4_trans(fb, sb[lane % 16]);
  const uint32_t fb2[2] = {fb[0], fb[1]};
  float fc[4];
  for (int i = 0; i < 4; ++i) fc[i] = c[(lane / 4 + 8 * (i / 2)) * 8 + lane % 4 * 2 + i % 2];
  mma_16x8x16<T>(fc, fa, fb2);
  for (int i = 0; i < 4; ++i) c[(lane / 4 + 8 * (i / 2)) * 8 + lane % 4 * 2 + i % 2] = fc[i];
}

// c[16][8] += a[16][8] b[8][8].
__global__ void mma_tf32_kernel(const uint32_t* a, const uint32_t* b, float* c) {
  const int lane = static_cast<int>(threadIdx.x), group = lane / 4, member = lane % 4;
  uint32_t fa[4], fb[2];
  for (int i = 0; i < 4; ++i) fa[i] = a[(group + 8 * (i % 2)) * 8 + member + 4 * (i / 2)];
  for (int i = 0; i < 2; ++i) fb[i] = b[(member + 4 * i) * 8 + group];
  float fc[4];
  for (int i = 0; i < 4; ++i) fc[i] = c[(group + 8 * (i / 2)) * 8 + member * 2 + i % 2];
  mma_16x8x8_tf32(fc, fa, fb);
  for (int i = 0; i < 4; ++i) c[(group + 8 * (i / 2)) * 8 + member * 2 + i % 2] = fc[i];
}

__global__ void exp2_kernel(const float* x, float* out) {
  out[threadIdx.x] = exp2_approx(x[threadIdx.x]);
}

__global__ void mistake_kernel(int which, int* out) {
  __shared__ int values[64];
  int* dynamic = dynamic_shared<int>();
  const int t = static_cast<int>(threadIdx.x);
  switch (which) {
    case 0:  // half of a warp passes another barrier
      if (t < 16) {
        __syncthreads();
      } else {
        __syncthreads();
      }
      break;
    case 1:  // a thread misses the barrier
      if (t != 5) __syncthreads();
      break;
    case 2:  // a lane of the mask has gone
      if (t % 32 != 3) out[t] = __shfl_xor_sync(0xffffffffu, t, 1);
      break;
    case 3:  // the caller is not in its own mask
      out[t] = __shfl_xor_sync(0x0000ffffu, t, 1);
      break;
    case 4:  // reads a lane beside the mask
      if (t % 32 < 16) out[t] = __shfl_xor_sync(0x0000ffffu, t, 16);
      break;
    case 5:  // static shared memory, one beyond
      values[t + 1] = t;
      break;
    case 6:  // dynamic shared memory, one beyond
      dynamic[t + 1] = t;
      break;
    case 7:  // device memory, one beyond
      out[t + 1] = t;
      break;
    case 8: {  // a row that is not in shared memory
      alignas(16) uint16_t row[8] = {};
      uint32_t r[4];
      ldmatrix_x4(r, row);
      break;
    }
    case 9:  // signed overflow
      out[t] = 0x7fffffff + t;
      break;
    case 10:  // a misaligned vector access
      reinterpret_cast<int2*>(out + 1)[0] = {t, t};
      break;
    case 11:  // two warp operations at once
      if (t % 32 < 16) {
        out[t] = __shfl_xor_sync(0xffffffffu, t, 1);
      } else {
        out[t] = static_cast<int>(__ballot_sync(0xffffffffu, t));
      }
      break;
  }
}

__global__ void nothing_kernel() {}

}  // namespace
}  // namespace metro

using metro::cuda::launch;
using namespace metro;

METRO_ENTRY(shuffles) {
  return launch(shuffle_kernel, dim3(1), dim3(64), 0, nullptr, in.data<const int>("x"),
                in.data<int>("out"));
}
METRO_ENTRY(exchange) {
  return launch(exchange_kernel, dim3(2), dim3(64), 0, nullptr, in.data<int>("out"),
                in.integer("with_barrier") != 0);
}
METRO_ENTRY(atomics) {
  return launch(atomic_kernel, dim3(3), dim3(40), 0, nullptr, in.data<float>("sum"),
                in.data<int>("most"));
}
METRO_ENTRY(copies) {
  const auto kernel = in.integer("in_flight") == 0   ? copy_kernel<0>
                      : in.integer("in_flight") == 1 ? copy_kernel<1>
                                                     : copy_kernel<2>;
  return launch(kernel, dim3(1), dim3(32), 1024, nullptr, in.data<const float>("source"),
                in.data<float>("target"));
}
METRO_ENTRY(ldmatrix) {
  return launch(ldmatrix_kernel, dim3(1), dim3(32), 0, nullptr, in.data<const uint16_t>("source"),
                in.data<uint32_t>("plain"), in.data<uint32_t>("transposed"));
}
METRO_ENTRY(mma) {
  if (in.dtype() == DType::kFloat32) {
    return launch(mma_tf32_kernel, dim3(1), dim3(32), 0, nullptr, in.data<const uint32_t>("a"),
                  in.data<const uint32_t>("b"), in.data<float>("c"));
  }
  if (in.dtype() == DType::kFloat16) {
    return launch(mma_kernel<__half>, dim3(1), dim3(32), 0, nullptr, in.data<const __half>("a"),
                  in.data<const __half>("b"), in.data<float>("c"));
  }
  return launch(mma_kernel<__nv_bfloat16>, dim3(1), dim3(32), 0, nullptr,
                in.data<const __nv_bfloat16>("a"), in.data<const __nv_bfloat16>("b"),
                in.data<float>("c"));
}
METRO_ENTRY(exp2) {
  return launch(exp2_kernel, dim3(1), dim3(static_cast<unsigned>(in.integer("count"))), 0, nullptr,
                in.data<const float>("x"), in.data<float>("out"));
}
METRO_ENTRY(mistake) {
  return launch(mistake_kernel, dim3(1), dim3(64), 256, nullptr,
                static_cast<int>(in.integer("which")), in.data<int>("out"));
}
METRO_ENTRY(nothing) {
  if (in.integer("raise_limit") != 0) {
    const cudaError_t error = cudaFuncSetAttribute(
        nothing_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, 100 * 1024);
    if (error != cudaSuccess) return error;
  }
  return launch(nothing_kernel, dim3(1), dim3(static_cast<unsigned>(in.integer("threads"))),
                static_cast<size_t>(in.integer("shared")), nullptr);
}
