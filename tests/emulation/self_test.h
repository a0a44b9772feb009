// Kernels that prove the emulation itself.
#pragma once

#include <cstddef>

const char* run_self_test(const char* name, const float* in, float* out, unsigned int blocks,
                          unsigned int threads, std::size_t shared_bytes);
