// Parallel loops over torch's own thread pool, without a torch header.
#pragma once

#include <cstdint>

namespace metro {

// Calls body(context, begin, end) on disjoint ranges that cover [begin, end), each of at least
// `grain` iterations except the last. Not nested: an inner call runs in its caller's thread.
void parallel_for_raw(int64_t begin, int64_t end, int64_t grain,
                      void (*body)(void* context, int64_t begin, int64_t end), void* context);

// The size of torch's thread pool (torch.get_num_threads()).
int64_t num_threads();

// Not inline across translation units: kernels are compiled once per instruction set, and a
// function shared between them could be kept in the version that the machine cannot run.
namespace {
template <typename Body>
inline void parallel_for(int64_t begin, int64_t end, int64_t grain, const Body& body) {
  if (begin >= end) return;
  parallel_for_raw(
      begin, end, grain,
      [](void* context, int64_t b, int64_t e) { (*static_cast<const Body*>(context))(b, e); },
      const_cast<void*>(static_cast<const void*>(&body)));
}
}  // namespace

}  // namespace metro
