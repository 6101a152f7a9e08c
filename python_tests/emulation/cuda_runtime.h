// Stands in for CUDA's <cuda_runtime.h> where the host compiler compiles .cu files; see
// __init__.py.
#pragma once

#define METRO_EMULATED_RUNTIME 1
// Blocks run one after another, so that their shared variables may be static. The section lets the
// scheduler find and spoil them between blocks; GCC leaves those of function templates out of it.
#define __shared__ static __attribute__((section("metro_shared")))
#define __launch_bounds__(...)
#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__

// The toolkit's own headers give the types and declare the runtime's functions.
#include <cuda_runtime_api.h>
#include <vector_functions.h>
#include <vector_types.h>

#include "emulation/launch.h"
#include "emulation/math.h"
#include "emulation/scheduler.h"
#include "emulation/warp.h"
