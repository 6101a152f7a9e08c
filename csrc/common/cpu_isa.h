// Which instruction set the CPU kernels use, chosen at run time.
//
// Every *_cpu.cpp is compiled once per level (METRO_CPU_NS names its namespace and the compiler
// flags its instructions); METRO_CPU_KERNEL declares a kernel in each of them and a function that
// calls the best one the machine can run.
#pragma once

namespace metro {

enum class CpuIsa { kPortable = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3 };

// The best level of this machine, or the lower one that the environment variable METRO_CPU_ISA
// (portable, avx2, avx512, avx512_bf16) asks for. Read once.
CpuIsa cpu_isa();
const char* cpu_isa_name(CpuIsa isa);

}  // namespace metro

// Kernels take one parameter struct by reference and return nothing.
#ifdef METRO_X86_LEVELS
#define METRO_CPU_KERNEL(name, Params)      \
  namespace cpu_portable {                  \
  void name(const Params& p);               \
  }                                         \
  namespace cpu_avx2 {                      \
  void name(const Params& p);               \
  }                                         \
  namespace cpu_avx512 {                    \
  void name(const Params& p);               \
  }                                         \
  namespace cpu_avx512_bf16 {               \
  void name(const Params& p);               \
  }                                         \
  inline void name##_cpu(const Params& p) { \
    switch (cpu_isa()) {                    \
      case CpuIsa::kAvx512Bf16:             \
        return cpu_avx512_bf16::name(p);    \
      case CpuIsa::kAvx512:                 \
        return cpu_avx512::name(p);         \
      case CpuIsa::kAvx2:                   \
        return cpu_avx2::name(p);           \
      case CpuIsa::kPortable:               \
        return cpu_portable::name(p);       \
    }                                       \
  }
#else
#define METRO_CPU_KERNEL(name, Params) \
  namespace cpu_portable {             \
  void name(const Params& p);          \
  }                                    \
  inline void name##_cpu(const Params& p) { return cpu_portable::name(p); }
#endif
