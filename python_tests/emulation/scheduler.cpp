#include "emulation/scheduler.h"

#include <sys/mman.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <memory>
#include <vector>

#if defined(__SANITIZE_ADDRESS__) || defined(METRO_FIBER_HOOKS)
#include <sanitizer/common_interface_defs.h>
#define METRO_START_SWITCH(save, to) \
  __sanitizer_start_switch_fiber(save, (to).stack, (to).stack_bytes)
#define METRO_FINISH_SWITCH(save, stack, bytes) __sanitizer_finish_switch_fiber(save, stack, bytes)
#else
#define METRO_START_SWITCH(save, to) (void)(save)
#define METRO_FINISH_SWITCH(save, stack, bytes) (void)(save)
#endif

// Saves the callee-saved registers and the stack pointer, and takes up another stack: no system
// call, unlike swapcontext.
extern "C" void metro_switch_stack(void** save, void* to);
#if !defined(__x86_64__)
#error "the emulation's context switch is written for x86-64"
#endif
asm(R"(
.text
.globl metro_switch_stack
.type metro_switch_stack, @function
metro_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size metro_switch_stack, .-metro_switch_stack
)");

// The static __shared__ variables (weak, for kernels without any), and all static variables: GCC
// leaves those of function templates out of the section.
extern "C" {
extern unsigned char __data_start[], _end[];
extern __attribute__((weak, visibility("hidden"))) unsigned char __start_metro_shared[];
extern __attribute__((weak, visibility("hidden"))) unsigned char __stop_metro_shared[];
}

namespace metro::emulation {
namespace {

constexpr size_t kStackBytes = 256 * 1024;
constexpr size_t kGuardBytes = 4096;

enum class State { kReady, kWarp, kBarrier, kDone };

struct AsyncCopy {
  void* to;
  unsigned char bytes[16];
};

struct Fiber {
  void* stack_pointer = nullptr;
  void* stack = nullptr;
  size_t stack_bytes = 0;
  void* fake_stack = nullptr;
  State state = State::kReady;
  uint3 index{};
  Place place{};
  std::vector<AsyncCopy> open_group;
  std::deque<std::vector<AsyncCopy>> groups;
};

struct Warp {
  std::vector<std::unique_ptr<Exchange>> exchanges;  // in use when mask != 0
};

struct Machine {
  Fiber main;
  std::vector<Fiber> fibers;  // stacks are kept from grid to grid
  std::vector<Warp> warps;
  std::vector<int> ready;  // a stack: a thread runs as far as it can before the next one starts
  int threads = 0, current = -1, done = 0, at_barrier = 0, predicates = 0, barrier_result = 0;
  bool reverse = false;
  unsigned char* dynamic = nullptr;
  size_t dynamic_bytes = 0;
  Kernel kernel{};
};
Machine machine;

const char* state_name(const Fiber& f) {
  return f.state == State::kDone ? "has returned" : "waits in";
}

// A line for each run of threads that are in the same place.
void print_threads() {
  int begin = 0;
  for (int i = 1; i <= machine.threads; ++i) {
    const Fiber& a = machine.fibers[begin];
    if (i < machine.threads) {
      const Fiber& b = machine.fibers[i];
      if (a.state == b.state && (a.state == State::kDone || a.place.line == b.place.line)) continue;
    }
    fprintf(stderr, "  threads %d-%d: %s", begin, i - 1, state_name(a));
    if (a.state != State::kDone)
      fprintf(stderr, " %s at %s:%d", a.place.what, a.place.file, a.place.line);
    fputc('\n', stderr);
    begin = i;
  }
}

[[noreturn]] void die() {
  fflush(stderr);
  _Exit(70);
}

void enter(int to) {
  machine.current = to;
  threadIdx = machine.fibers[to].index;
}

// Leaves `from` for the next thread that can run, or for the grid's loop.
void switch_from(Fiber& from, bool forever) {
  Fiber* to = &machine.main;
  if (!machine.ready.empty()) {
    const int next = machine.ready.back();
    machine.ready.pop_back();
    enter(next);
    to = &machine.fibers[next];
  }
  if (to == &from) return;
  METRO_START_SWITCH(forever ? nullptr : &from.fake_stack, *to);
  metro_switch_stack(&from.stack_pointer, to->stack_pointer);
  METRO_FINISH_SWITCH(from.fake_stack, nullptr, nullptr);
}

void wait(State state, Place place) {
  Fiber& fiber = machine.fibers[machine.current];
  fiber.state = state;
  fiber.place = place;
  switch_from(fiber, false);
}

void make_ready(int thread) {
  machine.fibers[thread].state = State::kReady;
  machine.ready.push_back(thread);
}

// The order in which `count` threads are pushed, so that the first to run is pushed last.
int nth(int i, int count) { return machine.reverse ? i : count - 1 - i; }

void first_entry() {
#if defined(__SANITIZE_ADDRESS__) || defined(METRO_FIBER_HOOKS)
  const void* bottom;
  size_t bytes;
  METRO_FINISH_SWITCH(nullptr, &bottom, &bytes);
  if (machine.main.stack == nullptr) {
    machine.main.stack = const_cast<void*>(bottom);
    machine.main.stack_bytes = bytes;
  }
#endif
  machine.kernel.run(machine.kernel.context);
  Fiber& fiber = machine.fibers[machine.current];
  fiber.state = State::kDone;
  ++machine.done;
  switch_from(fiber, true);
  __builtin_unreachable();
}

void prepare(Fiber& fiber) {
  if (fiber.stack == nullptr) {
    void* memory = mmap(nullptr, kStackBytes + kGuardBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, kGuardBytes, PROT_NONE) != 0) {
      perror("emulation: stack of a thread");
      die();
    }
    fiber.stack = static_cast<unsigned char*>(memory) + kGuardBytes;
    fiber.stack_bytes = kStackBytes;
  }
  // Six registers, then the address that `ret` jumps to; the stack is 8 past a multiple of 16, as
  // after a call.
  void** top = reinterpret_cast<void**>(static_cast<unsigned char*>(fiber.stack) + kStackBytes) - 3;
  top[-1] = reinterpret_cast<void*>(&first_entry);
  for (int i = 2; i <= 7; ++i) top[-i] = nullptr;
  fiber.stack_pointer = top - 7;
  fiber.state = State::kReady;
  fiber.open_group.clear();
  fiber.groups.clear();
}

// All-ones bytes: NaN in every floating type.
__attribute__((no_sanitize("address"))) void spoil(unsigned char* begin, unsigned char* end) {
  for (volatile unsigned char* p = begin; p != end; ++p) *p = 0xff;
}

void run_block() {
  spoil(__start_metro_shared, __stop_metro_shared);
  spoil(machine.dynamic, machine.dynamic + machine.dynamic_bytes);
  machine.done = machine.at_barrier = machine.predicates = 0;
  for (int i = 0; i < machine.threads; ++i) {
    Fiber& fiber = machine.fibers[i];
    prepare(fiber);
    const unsigned t = static_cast<unsigned>(i);
    fiber.index = {t % blockDim.x, t / blockDim.x % blockDim.y, t / (blockDim.x * blockDim.y)};
  }
  for (int i = 0; i < machine.threads; ++i) machine.ready.push_back(nth(i, machine.threads));
  switch_from(machine.main, false);
  if (machine.done == machine.threads) return;
  fprintf(stderr,
          "emulation: block (%u, %u, %u): the threads wait for others that never arrive "
          "(divergent barrier or warp operation)\n",
          blockIdx.x, blockIdx.y, blockIdx.z);
  print_threads();
  die();
}

Exchange& find_exchange(Warp& warp, uint32_t mask, const char* what) {
  Exchange* free_one = nullptr;
  for (auto& e : warp.exchanges) {
    if (e->mask == 0) {
      free_one = e.get();
    } else if (e->arrived != e->mask && e->mask == mask && e->what == what) {
      return *e;
    }
  }
  if (free_one == nullptr) {
    warp.exchanges.push_back(std::make_unique<Exchange>());
    free_one = warp.exchanges.back().get();
  }
  free_one->mask = mask;
  free_one->arrived = 0;
  free_one->what = what;
  return *free_one;
}

}  // namespace

int lane() { return machine.current % 32; }

void fail(const char* format, ...) {
  fprintf(stderr, "emulation: block (%u, %u, %u), thread (%u, %u, %u): ", blockIdx.x, blockIdx.y,
          blockIdx.z, threadIdx.x, threadIdx.y, threadIdx.z);
  va_list arguments;
  va_start(arguments, format);
  vfprintf(stderr, format, arguments);
  va_end(arguments);
  fputc('\n', stderr);
  die();
}

Exchange& meet(uint32_t mask, Place place, const void* data, int bytes, void (*finish)(Exchange&)) {
  const int self = machine.current, first = self / 32 * 32;
  const uint32_t bit = 1u << (self % 32);
  if ((mask & bit) == 0) {
    fail("%s at %s:%d: the mask 0x%08x lacks the calling lane %d", place.what, place.file,
         place.line, mask, self % 32);
  }
  const int lanes = machine.threads - first;
  if (lanes < 32 && (mask >> lanes) != 0) {
    fail("%s at %s:%d: the mask 0x%08x names lanes beyond the block's last thread", place.what,
         place.file, place.line, mask);
  }
  Exchange& e = find_exchange(machine.warps[self / 32], mask, place.what);
  if (bytes > 0) memcpy(e.slots[self % 32], data, static_cast<size_t>(bytes));
  e.arrived |= bit;
  if (e.arrived != mask) {
    wait(State::kWarp, place);
    return e;
  }
  e.readers = mask;
  if (finish != nullptr) finish(e);
  for (int i = 0; i < 32; ++i) {
    const int other = nth(i, 32);
    if ((mask & ~bit) >> other & 1u) make_ready(first + other);
  }
  return e;
}

void leave(Exchange& exchange) {
  exchange.readers &= ~(1u << lane());
  if (exchange.readers == 0) exchange.mask = 0;
}

int barrier(Place place, bool predicate) {
  const int self = machine.current, first = self / 32 * 32;
  const int last = first + 32 < machine.threads ? first + 32 : machine.threads;
  for (int i = first; i < last; ++i) {
    const Fiber& f = machine.fibers[i];
    if (f.state == State::kBarrier && (f.place.line != place.line || f.place.what != place.what)) {
      fail("divergent barrier: %s at %s:%d, while thread %d of the warp waits in %s at %s:%d",
           place.what, place.file, place.line, i, f.place.what, f.place.file, f.place.line);
    }
  }
  machine.predicates += predicate;
  if (++machine.at_barrier < machine.threads) {
    wait(State::kBarrier, place);
    return machine.barrier_result;
  }
  machine.barrier_result = machine.predicates;
  machine.at_barrier = machine.predicates = 0;
  for (int i = 0; i < machine.threads; ++i) {
    const int other = nth(i, machine.threads);
    if (other != self) make_ready(other);
  }
  return machine.barrier_result;
}

void async_copy(void* shared, const void* sixteen_bytes) {
  AsyncCopy copy{shared, {}};
  memcpy(copy.bytes, sixteen_bytes, 16);
  memset(shared, 0xff, 16);
  machine.fibers[machine.current].open_group.push_back(copy);
}

void async_commit() {
  Fiber& fiber = machine.fibers[machine.current];
  fiber.groups.push_back(std::move(fiber.open_group));
  fiber.open_group.clear();
}

void async_wait(int groups_in_flight) {
  Fiber& fiber = machine.fibers[machine.current];
  while (static_cast<int>(fiber.groups.size()) > groups_in_flight) {
    for (const AsyncCopy& copy : fiber.groups.front()) memcpy(copy.to, copy.bytes, 16);
    fiber.groups.pop_front();
  }
}

void* dynamic_shared_memory() { return machine.dynamic; }

void check_shared(const char* what, const void* pointer, int bytes) {
  const auto* p = static_cast<const unsigned char*>(pointer);
  if (reinterpret_cast<uintptr_t>(p) % static_cast<uintptr_t>(bytes) != 0) {
    fail("%s: the shared address is no multiple of %d", what, bytes);
  }
  const bool dynamic = p >= machine.dynamic && p + bytes <= machine.dynamic + machine.dynamic_bytes;
  if (!dynamic && !(p >= __data_start && p + bytes <= _end)) {
    fail("%s: out of bounds: the address is not in the block's shared memory", what);
  }
}

void run_grid(dim3 grid, dim3 block, size_t shared_bytes, Kernel kernel) {
  const char* order = getenv("METRO_EMULATION_ORDER");
  machine.reverse = order != nullptr && strcmp(order, "reverse") == 0;
  gridDim = grid;
  blockDim = block;
  machine.kernel = kernel;
  machine.threads = static_cast<int>(block.x * block.y * block.z);
  if (machine.fibers.size() < static_cast<size_t>(machine.threads)) {
    machine.fibers.resize(static_cast<size_t>(machine.threads));
  }
  machine.warps = std::vector<Warp>(static_cast<size_t>(machine.threads + 31) / 32);
  void* memory = nullptr;
  if (posix_memalign(&memory, 1024, shared_bytes) != 0) fail("no memory for shared memory");
  machine.dynamic = static_cast<unsigned char*>(memory);
  machine.dynamic_bytes = shared_bytes;
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  for (uint64_t i = 0; i < blocks; ++i) {
    const uint64_t b = machine.reverse ? blocks - 1 - i : i;
    blockIdx = {static_cast<unsigned>(b % grid.x), static_cast<unsigned>(b / grid.x % grid.y),
                static_cast<unsigned>(b / grid.x / grid.y)};
    run_block();
  }
  free(memory);
  machine.dynamic = nullptr;
  machine.dynamic_bytes = 0;
}

}  // namespace metro::emulation
