#include "common/parallel.h"

#ifdef METRO_STD_THREADS
#include <algorithm>
#include <thread>
#include <vector>
#else
#include <torch/csrc/stable/ops.h>
#endif

namespace metro {

#ifdef METRO_STD_THREADS  // a build for ThreadSanitizer, see CMakeLists.txt

namespace {
constexpr int64_t kThreads = 4;
thread_local bool inside = false;
}  // namespace

void parallel_for_raw(int64_t begin, int64_t end, int64_t grain,
                      void (*body)(void* context, int64_t begin, int64_t end), void* context) {
  // As torch divides a range: as many chunks as the grain allows, at most one a thread.
  const int64_t chunks =
      inside ? 1 : std::clamp<int64_t>((end - begin) / std::max<int64_t>(grain, 1), 1, kThreads);
  const int64_t size = (end - begin + chunks - 1) / chunks;
  std::vector<std::thread> threads;
  for (int64_t b = begin; b < end; b += size) {
    threads.emplace_back([=] {
      inside = true;
      body(context, b, std::min(end, b + size));
    });
  }
  for (std::thread& thread : threads) thread.join();
}

int64_t num_threads() { return kThreads; }

#else

void parallel_for_raw(int64_t begin, int64_t end, int64_t grain,
                      void (*body)(void* context, int64_t begin, int64_t end), void* context) {
  torch::stable::parallel_for(begin, end, grain,
                              [body, context](int64_t b, int64_t e) { body(context, b, e); });
}

int64_t num_threads() { return torch::stable::get_num_threads(); }

#endif

}  // namespace metro
