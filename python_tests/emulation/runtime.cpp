// The CUDA runtime's functions for an emulated device, and the main program of a test executable.
#include <cuda_runtime_api.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <map>
#include <stdexcept>

#include "emulation/entry.h"
#include "emulation/launch.h"

namespace {

constexpr size_t kSharedBytes = 48 * 1024;  // a block's, unless the launcher asks for more
constexpr int kMultiprocessors = 3;         // few, so that persistent loops go round

// What a launcher can ask for: METRO_EMULATION_SHARED_BYTES, else sm_80's.
size_t most_shared_bytes() {
  const char* given = getenv("METRO_EMULATION_SHARED_BYTES");
  return given == nullptr ? 163 * 1024 : std::stoull(given);
}

std::map<const void*, size_t>& shared_limits() {
  static std::map<const void*, size_t> limits;
  return limits;
}

}  // namespace

extern "C" {

cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaPeekAtLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return "an error of the emulated runtime"; }
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = kMultiprocessors;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor:
      *value = 8;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = 0;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = static_cast<int>(most_shared_bytes());
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = static_cast<int>(most_shared_bytes() + 1024);
      return cudaSuccess;
    case cudaDevAttrL2CacheSize:
      *value = 40 * 1024 * 1024;
      return cudaSuccess;
    default:
      return cudaErrorInvalidValue;
  }
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  if (value < 0 || static_cast<size_t>(value) > most_shared_bytes()) return cudaErrorInvalidValue;
  shared_limits()[kernel] = static_cast<size_t>(value);
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int, size_t) {
  *blocks = 1;
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  memset(to, value, bytes);
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind,
                            cudaStream_t) {
  memcpy(to, from, bytes);
  return cudaSuccess;
}

}  // extern "C"

namespace metro::emulation {

cudaError_t check_launch(const void* kernel, dim3 grid, dim3 block, size_t shared_bytes) {
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (threads == 0 || threads > 1024 || block.z > 64) return cudaErrorInvalidConfiguration;
  if (grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) {
    return cudaErrorInvalidConfiguration;
  }
  const auto limit = shared_limits().find(kernel);
  const size_t most = limit == shared_limits().end() ? kSharedBytes : limit->second;
  return shared_bytes > most && shared_bytes > kSharedBytes ? cudaErrorInvalidValue : cudaSuccess;
}

namespace {
std::map<std::string, Entry>& entries() {
  static std::map<std::string, Entry> all;
  return all;
}
}  // namespace

bool add_entry(const char* name, Entry entry) { return entries().emplace(name, entry).second; }

Arguments::Arguments(const std::string& folder) {
  std::ifstream list(folder + "/arguments.txt");
  std::string kind, name, value;
  while (list >> kind >> name >> value) {
    if (kind == "number") {
      numbers_[name] = value;
    } else if (kind == "none") {
      tensors_[name] = {nullptr, 0};
    } else {
      Tensor t{nullptr, std::stoull(value)};
      if (posix_memalign(&t.memory, 256, t.bytes) != 0) throw std::runtime_error("no memory");
      std::ifstream file(folder + "/" + name + ".bin", std::ios::binary);
      file.read(static_cast<char*>(t.memory), static_cast<std::streamsize>(t.bytes));
      if (!file) throw std::runtime_error("cannot read the tensor " + name);
      tensors_[name] = t;
    }
  }
}

void Arguments::write(const std::string& folder) const {
  for (const auto& [name, tensor] : tensors_) {
    if (tensor.memory == nullptr) continue;
    std::ofstream file(folder + "/" + name + ".bin", std::ios::binary);
    file.write(static_cast<const char*>(tensor.memory), static_cast<std::streamsize>(tensor.bytes));
    free(tensor.memory);
  }
}

void* Arguments::find(const std::string& name) const { return tensors_.at(name).memory; }
int64_t Arguments::integer(const std::string& name) const { return std::stoll(numbers_.at(name)); }
double Arguments::real(const std::string& name) const { return std::stod(numbers_.at(name)); }

}  // namespace metro::emulation

// entry folder
int main(int count, char** words) {
  using namespace metro::emulation;
  if (count != 3 || entries().count(words[1]) == 0) {
    fprintf(stderr, "no entry of this name\n");
    return 2;
  }
  try {
    const Arguments arguments(words[2]);
    const int error = entries()[words[1]](arguments);
    if (error != cudaSuccess) {
      fprintf(stderr, "%s returned the CUDA error %d\n", words[1], error);
      return 3;
    }
    arguments.write(words[2]);
  } catch (const std::exception& e) {
    fprintf(stderr, "%s: argument missing or unreadable: %s\n", words[1], e.what());
    return 4;
  }
  return 0;
}
