#include "common/parallel.h"

#include <torch/csrc/stable/ops.h>

namespace metro {

void parallel_for_raw(int64_t begin, int64_t end, int64_t grain,
                      void (*body)(void* context, int64_t begin, int64_t end), void* context) {
  torch::stable::parallel_for(begin, end, grain,
                              [body, context](int64_t b, int64_t e) { body(context, b, e); });
}

int64_t num_threads() { return torch::stable::get_num_threads(); }

}  // namespace metro
