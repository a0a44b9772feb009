// Runs a launch block by block. The threads of a block are fibers (ucontext) of one operating
// system thread. A fiber runs until it waits at a barrier or in a warp function, or returns; then
// the next one is drawn at random from those that can run. Where a barrier is missing, a value may
// therefore be read before it is written, and the result is a NaN or changes with the seed.
//
// A build with AddressSanitizer announces every switch between fibers to it.
#include "emulation.h"

#include <cuda_runtime.h>
#include <cxxabi.h>
#include <dlfcn.h>
#include <link.h>
#include <mutants.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdlib>
#include <iterator>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <utility>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, size) ((void)(address), (void)(size))
#define ASAN_UNPOISON_MEMORY_REGION(address, size) ((void)(address), (void)(size))
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace {
constexpr size_t kSharedLimit = 48 * 1024;  // of a launch that has not opted in to more
constexpr int kPoison = 0xff;               // NaN in every floating-point type
}  // namespace

namespace gankernels::cuda {
thread_local __align__(16) unsigned char dynamic_shared[kSharedLimit];
}

namespace emulation {
namespace {

constexpr size_t kStackBytes = 256 * 1024;
constexpr unsigned int kLanes = 32;

enum class State { kReady, kAtBarrier, kInWarpFunction, kDone };

struct Fiber {
  ucontext_t context;
  unsigned char* stack = nullptr;
  void* fake_stack = nullptr;  // AddressSanitizer's
  uint3 index;
  State state;
  int line;  // where it waits
  WarpFunction function;
  unsigned int mask;
  uint64_t value;
  uint64_t gathered[kLanes];
};

struct Machine {
  std::vector<std::unique_ptr<Fiber>> fibers;  // never shrinks: stacks are reused
  ucontext_t scheduler;
  void* scheduler_fake_stack = nullptr;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_bytes = 0;

  unsigned int threads = 0;
  unsigned int running = 0;
  std::vector<unsigned int> ready;
  const std::function<void()>* body = nullptr;
  std::string kernel, error;
  std::mt19937_64 random;
  uint64_t seed = 0;
  std::vector<Launch> launches;
  int device = 0;
  std::map<uintptr_t, size_t> memory;  // device memory: address and bytes
  std::pair<uintptr_t, size_t> found;  // the entry of the last access
};

Machine machine;

Fiber& current() { return *machine.fibers[machine.running]; }

std::string text(const char* before, uint64_t number) { return before + std::to_string(number); }

std::string name_of(const void* function) {
  Dl_info info;
  if (!dladdr(function, &info) || !info.dli_sname || info.dli_saddr != function) {
    return "kernel without an exported name";
  }
  int status = 0;
  char* demangled = abi::__cxa_demangle(info.dli_sname, nullptr, nullptr, &status);
  std::string name = status == 0 ? demangled : info.dli_sname;
  std::free(demangled);
  return name;
}

void switch_to_scheduler(bool last = false) {
  Fiber& fiber = current();
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(last ? nullptr : &fiber.fake_stack, machine.scheduler_stack,
                                 machine.scheduler_stack_bytes);
#endif
  (void)last;
  swapcontext(&fiber.context, &machine.scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fiber.fake_stack, nullptr, nullptr);
#endif
}

void fiber_main() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &machine.scheduler_stack,
                                  &machine.scheduler_stack_bytes);
#endif
  (*machine.body)();
  current().state = State::kDone;
  switch_to_scheduler(true);
}

void resume(unsigned int thread) {
  machine.running = thread;
  Fiber& fiber = current();
  threadIdx = fiber.index;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&machine.scheduler_fake_stack, fiber.stack, kStackBytes);
#endif
  swapcontext(&machine.scheduler, &fiber.context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(machine.scheduler_fake_stack, nullptr, nullptr);
#endif
}

void start(unsigned int thread) {
  while (machine.fibers.size() <= thread) {
    machine.fibers.push_back(std::make_unique<Fiber>());
    void* stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stack == MAP_FAILED) std::abort();
    machine.fibers.back()->stack = static_cast<unsigned char*>(stack);
  }
  Fiber& fiber = *machine.fibers[thread];
  ASAN_UNPOISON_MEMORY_REGION(fiber.stack, kStackBytes);  // an abandoned fiber poisoned it
  fiber.fake_stack = nullptr;
  fiber.state = State::kReady;
  fiber.index = {thread % blockDim.x, thread / blockDim.x % blockDim.y,
                 thread / (blockDim.x * blockDim.y)};
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack;
  fiber.context.uc_stack.ss_size = kStackBytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, fiber_main, 0);
}

// All of this library's thread-local storage, which contains the __shared__ variables.
std::pair<void*, size_t> shared_memory() {
  gankernels::cuda::dynamic_shared[0] = 0;  // storage exists once it has been touched
  std::pair<void*, size_t> found{nullptr, 0};
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* result) {
        const auto here = reinterpret_cast<uintptr_t>(&machine);
        size_t tls_bytes = 0;
        bool ours = false;
        for (int i = 0; i < info->dlpi_phnum; ++i) {
          const auto& header = info->dlpi_phdr[i];
          const uintptr_t begin = info->dlpi_addr + header.p_vaddr;
          if (header.p_type == PT_LOAD) ours |= here - begin < header.p_memsz;
          if (header.p_type == PT_TLS) tls_bytes = header.p_memsz;
        }
        if (ours) {
          *static_cast<std::pair<void*, size_t>*>(result) = {info->dlpi_tls_data, tls_bytes};
        }
        return ours ? 1 : 0;
      },
      &found);
  if (found.first == nullptr || found.second < kSharedLimit) std::abort();
  return found;
}

void block_failed(const std::string& what, const std::string& where = {}) {
  if (!machine.error.empty()) return;
  machine.error = what + " in block (" + std::to_string(blockIdx.x) + ", " +
                  std::to_string(blockIdx.y) + ", " + std::to_string(blockIdx.z) + ") of " +
                  machine.kernel + where;
}

// Called when no thread can run: every thread waits or has returned.
void release_barrier_or_fail() {
  unsigned int waiting = 0;
  int line = 0;
  for (unsigned int t = 0; t < machine.threads; ++t) {
    const Fiber& fiber = *machine.fibers[t];
    if (fiber.state == State::kInWarpFunction) {
      char mask[16];
      snprintf(mask, sizeof(mask), "%08x", fiber.mask);
      return block_failed(text("warp function at line ", fiber.line) + text(": thread ", t) +
                          " waits for lanes of mask 0x" + mask + " that never come with that mask");
    }
    if (fiber.state != State::kAtBarrier) continue;
    ++waiting;
    if (line != 0 && fiber.line != line) {
      return block_failed(text("barrier divergence: threads wait at lines ", line) +
                          text(" and ", fiber.line));
    }
    line = fiber.line;
  }
  if (waiting == 0) return;
  if (waiting < machine.threads) {
    return block_failed(text("barrier divergence: barrier at line ", line) +
                        text(" reached by ", waiting) + text(" of ", machine.threads) + " threads");
  }
  for (unsigned int t = 0; t < machine.threads; ++t) {
    machine.fibers[t]->state = State::kReady;
    machine.ready.push_back(t);
  }
}

void run_block(size_t dynamic_bytes) {
  const auto [shared, shared_bytes] = shared_memory();
  unsigned char* const beyond = gankernels::cuda::dynamic_shared + dynamic_bytes;
  const size_t beyond_bytes = kSharedLimit - dynamic_bytes;
  memset(shared, kPoison, shared_bytes);
  ASAN_POISON_MEMORY_REGION(beyond, beyond_bytes);

  machine.ready.clear();
  for (unsigned int t = 0; t < machine.threads; ++t) {
    start(t);
    machine.ready.push_back(t);
  }
  while (machine.error.empty()) {
    if (machine.ready.empty()) release_barrier_or_fail();
    if (machine.ready.empty()) break;
    const size_t drawn = machine.random() % machine.ready.size();
    const unsigned int thread = machine.ready[drawn];
    machine.ready[drawn] = machine.ready.back();
    machine.ready.pop_back();
    resume(thread);
  }

  ASAN_UNPOISON_MEMORY_REGION(beyond, beyond_bytes);
  for (size_t i = 0; i < beyond_bytes; ++i) {
    if (beyond[i] != kPoison) {
      block_failed(text("write beyond dynamic shared memory, at byte ", dynamic_bytes + i));
    }
  }
}

}  // namespace

namespace {

bool is_device_memory(uintptr_t address) {
  if (address - machine.found.first < machine.found.second) return true;
  const auto after = machine.memory.upper_bound(address);
  if (after == machine.memory.begin()) return false;
  const auto candidate = std::prev(after);
  if (address - candidate->first >= candidate->second) return false;
  machine.found = *candidate;
  return true;
}

const char* space_of(uintptr_t address) {
  const auto within = [&](const void* begin, size_t bytes) {
    return address - reinterpret_cast<uintptr_t>(begin) < bytes;
  };
  const auto [shared, shared_bytes] = shared_memory();
  if (within(shared, shared_bytes)) return "shared memory";
  for (const auto& fiber : machine.fibers) {
    if (within(fiber->stack, kStackBytes)) return "local memory";
  }
  return "memory of the host";
}

std::string at(const char* file, int line) {
  const char* const folder = strrchr(file, '/');
  return text(", at line ", line) + " of " + (folder ? folder + 1 : file);
}

}  // namespace

void add_device_memory(const void* address, size_t bytes) {
  machine.memory[reinterpret_cast<uintptr_t>(address)] = bytes;
}

void remove_device_memory(const void* address) {
  machine.memory.erase(reinterpret_cast<uintptr_t>(address));
  machine.found = {};
}

void check_global(const char* function, const void* address, size_t bytes, const char* file,
                  int line) {
  const auto bits = reinterpret_cast<uintptr_t>(address);
  if (!is_device_memory(bits)) {
    fail(std::string(function) + ", which is of global memory, of " + space_of(bits),
         at(file, line));
  }
  if (bits % bytes != 0) {
    fail(function[2] == 'l' ? "misaligned load" : "misaligned store", at(file, line));
  }
}

void misaligned(const char* what) { fail(what); }

void fail(const std::string& what, const std::string& where) {
  block_failed(what + text(" by thread ", machine.running), where);
  switch_to_scheduler();
  std::abort();  // the fibers of a failed block are not resumed
}

void barrier(int line) {
  current().state = State::kAtBarrier;
  current().line = line;
  switch_to_scheduler();
}

unsigned int lane() { return machine.running % kLanes; }

const uint64_t* exchange(WarpFunction function, unsigned int mask, uint64_t value, int line) {
  Fiber& self = current();
  if (!(mask >> lane() & 1u)) fail("warp function called by a lane outside its mask,");
  self.state = State::kInWarpFunction;
  self.function = function;
  self.mask = mask;
  self.value = value;
  self.line = line;

  const unsigned int first = machine.running / kLanes * kLanes;
  const auto member = [&](unsigned int i) { return (mask >> i & 1u) != 0; };
  for (unsigned int i = 0; i < kLanes; ++i) {
    if (!member(i)) continue;
    if (first + i >= machine.threads) fail("warp function's mask names lanes beyond the block,");
    const Fiber& other = *machine.fibers[first + i];
    if (other.state != State::kInWarpFunction || other.function != function || other.mask != mask) {
      switch_to_scheduler();  // until the last of them comes
      return self.gathered;
    }
  }
  for (unsigned int i = 0; i < kLanes; ++i) {
    if (!member(i)) continue;
    Fiber& other = *machine.fibers[first + i];
    for (unsigned int j = 0; j < kLanes; ++j) {
      if (member(j)) other.gathered[j] = machine.fibers[first + j]->value;
    }
    if (&other != &self) machine.ready.push_back(first + i);
  }
  for (unsigned int i = 0; i < kLanes; ++i) {
    if (member(i)) machine.fibers[first + i]->state = State::kReady;
  }
  machine.ready.push_back(machine.running);  // the last to come is not the first to go on
  switch_to_scheduler();
  return self.gathered;
}

uint64_t shuffle(WarpFunction function, unsigned int mask, uint64_t value, int source, int line) {
  const uint64_t* values = exchange(function, mask, value, line);
  if (!(mask >> source & 1u)) fail("shuffle from a lane outside the mask");
  return values[source];
}

void check_width(int width) {
  if (width < 1 || width > 32 || (width & (width - 1)) != 0) fail("shuffle of invalid width");
}

void set_seed(uint64_t seed) { machine.seed = seed; }

bool selected[mark::kMarks] = {};

void select(const std::vector<std::string>& names) {
#define NAME(name) #name,
  static const std::string marks[] = {EMULATED_MARKS(NAME)};
#undef NAME
  std::fill(std::begin(selected), std::end(selected), false);
  for (const std::string& name : names) {
    const auto found = std::find(std::begin(marks), std::end(marks), name);
    if (found == std::end(marks)) throw std::invalid_argument("no mark named '" + name + "'");
    selected[found - std::begin(marks)] = true;
  }
}

int current_device() { return machine.device; }

std::vector<Launch> take_launches() { return std::exchange(machine.launches, {}); }

cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel,
                   const std::function<void()>& thread) {
  const dim3 grid = config.gridDim, block = config.blockDim;
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  if (blocks == 0 || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535 || threads == 0 ||
      threads > 1024 || block.z > 64 || config.dynamicSmemBytes > kSharedLimit) {
    return cudaErrorInvalidConfiguration;
  }
  machine.kernel = name_of(kernel);
  machine.launches.push_back({machine.kernel, machine.device, static_cast<unsigned int>(blocks),
                              static_cast<unsigned int>(threads)});
  machine.error.clear();
  machine.body = &thread;
  machine.threads = static_cast<unsigned int>(threads);
  machine.random.seed(machine.seed);
  gridDim = grid;
  blockDim = block;

  std::vector<uint64_t> order(blocks);
  for (uint64_t b = 0; b < blocks; ++b) order[b] = b;
  for (uint64_t b = blocks; b > 1; --b) std::swap(order[b - 1], order[machine.random() % b]);
  for (const uint64_t b : order) {
    blockIdx = {static_cast<unsigned int>(b % grid.x),
                static_cast<unsigned int>(b / grid.x % grid.y),
                static_cast<unsigned int>(b / grid.x / grid.y)};
    run_block(config.dynamicSmemBytes);
    if (!machine.error.empty()) return cudaErrorLaunchFailure;
  }
  return cudaSuccess;
}

}  // namespace emulation

namespace {
// Three devices: smaller than the work of a test, of its size, and larger.
constexpr int kMultiprocessors[] = {1, 4, 132};
constexpr int kDevices = sizeof(kMultiprocessors) / sizeof(int);
}  // namespace

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorInvalidDevice:
      return "invalid device ordinal";
    case cudaErrorLaunchFailure:
      return emulation::machine.error.c_str();
  }
  return "unknown error";
}

cudaError_t cudaGetLastError() { return cudaSuccess; }

cudaError_t cudaGetDevice(int* device) {
  *device = emulation::machine.device;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= kDevices) return cudaErrorInvalidDevice;
  emulation::machine.device = device;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device < 0 || device >= kDevices) return cudaErrorInvalidDevice;
  if (attribute != cudaDevAttrMultiProcessorCount) return cudaErrorInvalidValue;
  *value = kMultiprocessors[device];
  return cudaSuccess;
}

const char* emulation::set_device(int device) {
  const cudaError_t error = cudaSetDevice(device);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
