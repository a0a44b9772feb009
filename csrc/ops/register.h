// Registers ops with PyTorch.
#pragma once

#include <torch/csrc/stable/library.h>

#include <cstring>
#include <string>

namespace gankernels::ops {

// An op: its schema, and the function that computes it on every device, as TORCH_BOX returns it.
struct Op {
  const char* schema;
  void (*function)(StableIValue*, uint64_t, uint64_t);

  std::string name() const { return std::string(schema, std::strchr(schema, '(')); }
};

// Registers an array of ops for the CPU, and with GK_REGISTER for CUDA if that was built.
#define GK_REGISTER_ON_CPU(ops)                  \
  STABLE_TORCH_LIBRARY_FRAGMENT(gankernels, m) { \
    for (const Op& op : ops) m.def(op.schema);   \
  }                                              \
  GK_IMPLEMENT(ops, CPU)
#define GK_IMPLEMENT(ops, DEVICE)                                    \
  STABLE_TORCH_LIBRARY_IMPL(gankernels, DEVICE, m) {                 \
    for (const Op& op : ops) m.impl(op.name().c_str(), op.function); \
  }
#ifdef GK_WITH_CUDA
#define GK_REGISTER(ops)  \
  GK_REGISTER_ON_CPU(ops) \
  GK_IMPLEMENT(ops, CUDA)
#else
#define GK_REGISTER(ops) GK_REGISTER_ON_CPU(ops)
#endif

}  // namespace gankernels::ops
