// The emulation's controls, for the tests.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace emulation {

// Of the order in which blocks, and threads between synchronisations, run.
void set_seed(uint64_t seed);

int current_device();

struct Launch {
  std::string kernel;
  int device;
  unsigned int blocks, threads;
};

// Since the last call.
std::vector<Launch> take_launches();

}  // namespace emulation
