// How a test calls a launcher: METRO_ENTRY(name) { fill the parameter struct from `in`, return the
// launcher's cudaError_t }. emulation/__init__.py passes tensors and numbers by these names.
#pragma once

#include <cstdint>
#include <map>
#include <string>

#include "common/types.h"

namespace metro::emulation {

class Arguments {
 public:
  // The tensor's memory, of exactly its size: AddressSanitizer sees the first byte beyond. Null
  // for None.
  template <typename T = void>
  T* data(const std::string& name) const {
    return static_cast<T*>(find(name));
  }
  int64_t integer(const std::string& name) const;
  double real(const std::string& name) const;
  DType dtype() const { return static_cast<DType>(integer("dtype")); }

  // One call's arguments from a folder, and its tensors back to it.
  explicit Arguments(const std::string& folder);
  void write(const std::string& folder) const;

 private:
  struct Tensor {
    void* memory;
    size_t bytes;
  };
  void* find(const std::string& name) const;
  std::map<std::string, Tensor> tensors_;
  std::map<std::string, std::string> numbers_;
};

using Entry = int (*)(const Arguments&);
bool add_entry(const char* name, Entry entry);

}  // namespace metro::emulation

#define METRO_ENTRY(name)                                                            \
  static int name##_entry(const metro::emulation::Arguments& in);                    \
  static const bool name##_added = metro::emulation::add_entry(#name, name##_entry); \
  static int name##_entry([[maybe_unused]] const metro::emulation::Arguments& in)
