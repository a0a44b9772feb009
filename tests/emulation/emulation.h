// The emulation's controls, for the tests.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace emulation {

// The seed of the order in which blocks run, and threads between two synchronizations.
void set_seed(uint64_t seed);

// Makes the kernels run with these mutants and small limits (csrc/kernels/mutant.h), and no others.
// Throws std::invalid_argument for a name that marks nothing.
void select(const std::vector<std::string>& names);

int current_device();

// Makes it the current one. Returns an error message, or null.
const char* set_device(int device);

// The device may address as global memory only what has been added here and not been removed since.
void add_device_memory(const void* address, size_t bytes);
void remove_device_memory(const void* address);

struct Launch {
  std::string kernel;
  int device;
  unsigned int blocks, threads;
};

// Since the last call.
std::vector<Launch> take_launches();

}  // namespace emulation
