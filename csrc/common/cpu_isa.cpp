#include "common/cpu_isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace metro {
namespace {

constexpr const char* kNames[] = {"portable", "avx2", "avx512", "avx512_bf16"};

CpuIsa detect() {
#ifdef METRO_X86_LEVELS
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return CpuIsa::kPortable;
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512dq")) {
    return CpuIsa::kAvx2;
  }
  return __builtin_cpu_supports("avx512bf16") ? CpuIsa::kAvx512Bf16 : CpuIsa::kAvx512;
#else
  return CpuIsa::kPortable;
#endif
}

CpuIsa choose() {
  const CpuIsa best = detect();
  const char* wanted = std::getenv("METRO_CPU_ISA");
  if (wanted == nullptr || *wanted == '\0') return best;
  for (int level = 0; level < 4; ++level) {
    if (std::string(wanted) == kNames[level]) {
      return level < static_cast<int>(best) ? static_cast<CpuIsa>(level) : best;
    }
  }
  throw std::runtime_error(
      "METRO_CPU_ISA: expected portable, avx2, avx512 or avx512_bf16, found '" +
      std::string(wanted) + "'");
}

}  // namespace

CpuIsa cpu_isa() {
  static const CpuIsa isa = choose();
  return isa;
}

const char* cpu_isa_name(CpuIsa isa) { return kNames[static_cast<int>(isa)]; }

}  // namespace metro
