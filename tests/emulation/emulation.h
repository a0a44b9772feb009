// The emulation's controls, for the tests.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace emulation {

// Of the order in which blocks, and threads between synchronisations, run.
void set_seed(uint64_t seed);

int current_device();

// Makes it the current one. Returns what is wrong with it, or null.
const char* set_device(int device);

// All that the device may address as global memory. Added by the test that owns it, and taken away
// by the address that it was added with.
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
