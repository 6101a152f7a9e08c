// The execution model: a grid's blocks run one after another, each CUDA thread of a block is a
// fibre, and a fibre runs until it waits. What does not depend on timing on a GPU does not depend
// on the order here either: METRO_EMULATION_ORDER=reverse runs the threads of a block (and the
// blocks) from the last to the first, and a missing barrier shows as different results.
#pragma once

#include <vector_types.h>

#include <cstdint>
#include <cstring>

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;
constexpr int warpSize = 32;

namespace metro::emulation {

// Where a thread waits, for messages.
struct Place {
  const char* what;
  const char* file;
  int line;
};

constexpr int kSlotBytes = 64;

// One warp-wide operation: what each lane brought, readable by all once everybody has arrived.
struct Exchange {
  uint32_t mask = 0;
  uint32_t arrived = 0;
  uint32_t readers = 0;
  const char* what = nullptr;
  alignas(16) unsigned char slots[32][kSlotBytes];

  template <typename T>
  T get(int lane) const {
    static_assert(sizeof(T) <= kSlotBytes);
    T value;
    memcpy(&value, slots[lane], sizeof(T));
    return value;
  }
  template <typename T>
  void put(int lane, const T& value) {
    static_assert(sizeof(T) <= kSlotBytes);
    memcpy(slots[lane], &value, sizeof(T));
  }
};

int lane();

// Ends the process with a message that names the kernel's block and thread.
[[noreturn]] __attribute__((format(printf, 1, 2))) void fail(const char* format, ...);

// Brings `bytes` of `data` to the warp's operation `place.what` over the lanes of `mask` and waits
// for the others. The last to arrive runs `finish` (if any) on the exchange. leave() after reading.
Exchange& meet(uint32_t mask, Place place, const void* data, int bytes,
               void (*finish)(Exchange&) = nullptr);
void leave(Exchange& exchange);

// Waits for every thread of the block; the threads of a warp must come from the same line. Returns
// how many threads gave a true predicate.
int barrier(Place place, bool predicate);

// cp.async: the copy lands in the wait that covers its group; until then the target holds NaNs.
void async_copy(void* shared, const void* sixteen_bytes);
void async_commit();
void async_wait(int groups_in_flight);

void* dynamic_shared_memory();
// Fails unless [pointer, pointer + bytes) is shared memory and the pointer a multiple of bytes.
void check_shared(const char* what, const void* pointer, int bytes);

struct Kernel {
  void (*run)(void* context);
  void* context;
};

// Runs a grid to its end.
void run_grid(dim3 grid, dim3 block, size_t shared_bytes, Kernel kernel);

}  // namespace metro::emulation

inline void __syncthreads(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  metro::emulation::barrier({"__syncthreads", file, line}, false);
}
inline int __syncthreads_count(int predicate, const char* file = __builtin_FILE(),
                               int line = __builtin_LINE()) {
  return metro::emulation::barrier({"__syncthreads_count", file, line}, predicate != 0);
}
inline int __syncthreads_or(int predicate, const char* file = __builtin_FILE(),
                            int line = __builtin_LINE()) {
  return metro::emulation::barrier({"__syncthreads_or", file, line}, predicate != 0) > 0;
}
inline int __syncthreads_and(int predicate, const char* file = __builtin_FILE(),
                             int line = __builtin_LINE()) {
  const int threads = static_cast<int>(blockDim.x * blockDim.y * blockDim.z);
  return metro::emulation::barrier({"__syncthreads_and", file, line}, predicate != 0) == threads;
}
