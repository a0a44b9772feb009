// The raw kernels as functions of numpy arrays, on the emulated device.
//
// Every array is copied to a buffer of exactly its size between guards. Outputs start as NaNs.
// After the call, guards and inputs must be untouched, and outputs are copied back.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>

#include "batch_norm_leaky_relu.h"
#include "emulation.h"
#include "gradient_norm_penalty.h"
#include "minibatch_discrimination.h"
#include "minibatch_stddev.h"
#include "self_test.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, size) ((void)(address), (void)(size))
#define ASAN_UNPOISON_MEMORY_REGION(address, size) ((void)(address), (void)(size))
#endif

namespace py = pybind11;
using namespace gankernels;

namespace {

constexpr int kPoison = 0xff;  // NaN in every floating-point type

class GuardedBuffer {
 public:
  // `offset` bytes away from an address that is a multiple of 64.
  GuardedBuffer(std::string name, size_t bytes, size_t offset)
      : name_(std::move(name)), bytes_(bytes), before_(kGuard + offset) {
    total_ = (before_ + bytes_ + kGuard + 63) / 64 * 64;
    memory_.reset(static_cast<unsigned char*>(std::aligned_alloc(64, total_)));
    emulation::add_device_memory(memory_.get(), total_);  // who oversteps is told by the guards
    std::memset(memory_.get(), kPoison, total_);
    ASAN_POISON_MEMORY_REGION(memory_.get(), before_);
    ASAN_POISON_MEMORY_REGION(data() + bytes_, total_ - before_ - bytes_);
  }
  ~GuardedBuffer() {
    emulation::remove_device_memory(memory_.get());
    ASAN_UNPOISON_MEMORY_REGION(memory_.get(), total_);
  }

  unsigned char* data() { return memory_.get() + before_; }

  void check_guards() {
    ASAN_UNPOISON_MEMORY_REGION(memory_.get(), total_);
    for (size_t i = 0; i < total_; ++i) {
      if ((i < before_ || i >= before_ + bytes_) && memory_.get()[i] != kPoison) {
        throw std::runtime_error("write outside buffer '" + name_ + "', at byte " +
                                 std::to_string(static_cast<int64_t>(i - before_)) + " of " +
                                 std::to_string(bytes_));
      }
    }
  }

 private:
  static constexpr size_t kGuard = 4096;  // more than a seeded defect oversteps it by
  struct Free {
    void operator()(unsigned char* memory) const { std::free(memory); }
  };
  std::string name_;
  size_t bytes_, before_, total_;
  std::unique_ptr<unsigned char, Free> memory_;
};

// The arrays of one call, on the "device".
class Call {
 public:
  Call(const py::dict& inputs, const py::dict& outputs, int64_t misalignment,
       int64_t output_misalignment, size_t scratch_bytes) {
    for (const auto& [key, value] : inputs) add(key, value, misalignment, true);
    for (const auto& [key, value] : outputs) add(key, value, output_misalignment, false);
    if (scratch_bytes > 0) {
      scratch_ = std::make_unique<GuardedBuffer>("scratch", scratch_bytes, 0);
    }
  }

  // Null where no array of this name was given.
  void* operator[](const char* name) const {
    const auto found = entries_.find(name);
    return found == entries_.end() ? nullptr : found->second.buffer->data();
  }
  void* scratch() const { return scratch_ ? scratch_->data() : nullptr; }

  void finish(const char* error) {
    if (error != nullptr) throw std::runtime_error(error);
    if (scratch_) scratch_->check_guards();
    for (auto& [name, entry] : entries_) {
      entry.buffer->check_guards();
      void* const host = entry.array.mutable_data();
      const size_t bytes = entry.array.nbytes();
      if (!entry.is_input) {
        std::memcpy(host, entry.buffer->data(), bytes);
      } else if (bytes > 0 && std::memcmp(host, entry.buffer->data(), bytes) != 0) {
        throw std::runtime_error("write to input '" + name + "'");
      }
    }
  }

 private:
  struct Entry {
    py::array array;
    std::unique_ptr<GuardedBuffer> buffer;
    bool is_input;
  };

  void add(py::handle key, py::handle value, int64_t misalignment, bool is_input) {
    const auto name = py::cast<std::string>(key);
    const auto array = py::reinterpret_borrow<py::array>(value);
    if (!(array.flags() & py::array::c_style)) throw std::invalid_argument(name + ": strided");
    auto buffer =
        std::make_unique<GuardedBuffer>(name, array.nbytes(), misalignment * array.itemsize());
    // Running statistics are both read and written: outputs bring their values along.
    std::memcpy(buffer->data(), array.data(), array.nbytes());
    entries_[name] = Entry{array, std::move(buffer), is_input};
  }

  std::map<std::string, Entry> entries_;
  std::unique_ptr<GuardedBuffer> scratch_;
};

DType dtype_of(const std::string& name) {
  if (name == "float32") return DType::kFloat32;
  if (name == "float64") return DType::kFloat64;
  if (name == "bfloat16") return DType::kBFloat16;
  if (name == "float16") return DType::kFloat16;
  throw std::invalid_argument("dtype: " + name);
}

template <typename T>
T get(const py::dict& options, const char* name) {
  return py::cast<T>(options[name]);
}

void describe(BatchNormLeakyReLU& p, const py::dict& o) {
  p.n = get<int64_t>(o, "n");
  p.c = get<int64_t>(o, "c");
  p.s = get<int64_t>(o, "s");
  p.channels_last = get<bool>(o, "channels_last");
  p.dtype = dtype_of(get<std::string>(o, "dtype"));
  p.parameter_dtype = dtype_of(get<std::string>(o, "parameter_dtype"));
  p.activation_first = get<bool>(o, "activation_first");
  p.training = get<bool>(o, "training");
  p.eps = get<double>(o, "eps");
  p.negative_slope = get<double>(o, "negative_slope");
  p.count = get<double>(o, "count");
}

Call make_call(BatchNormLeakyReLU& p, const py::dict& inputs, const py::dict& outputs,
               const py::dict& o) {
  describe(p, o);
  const int64_t scratch = cuda::scratch_bytes(p, get<int>(o, "device"));
  const auto misalignment = get<int64_t>(o, "misalignment");
  Call call(inputs, outputs, misalignment, misalignment, scratch);
  p.x = call["x"];
  p.weight = call["weight"];
  p.bias = call["bias"];
  p.statistics = call["statistics"];
  return call;
}

void forward(const py::dict& inputs, const py::dict& outputs, const py::dict& o) {
  BatchNormLeakyReLUForward p;
  Call call = make_call(p, inputs, outputs, o);
  p.compute_statistics = outputs.contains("statistics");
  p.y = call["y"];
  call.finish(
      cuda::batch_norm_leaky_relu_forward(p, call.scratch(), get<int>(o, "device"), nullptr));
}

void backward(const py::dict& inputs, const py::dict& outputs, const py::dict& o) {
  BatchNormLeakyReLUBackward p;
  Call call = make_call(p, inputs, outputs, o);
  p.grad_y = call["grad_y"];
  p.compute_sums = outputs.contains("sums");
  p.sums = call["sums"];
  p.grad_x = call["grad_x"];
  call.finish(
      cuda::batch_norm_leaky_relu_backward(p, call.scratch(), get<int>(o, "device"), nullptr));
}

void double_backward(const py::dict& inputs, const py::dict& outputs, const py::dict& o) {
  BatchNormLeakyReLUDoubleBackward p;
  Call call = make_call(p, inputs, outputs, o);
  p.grad_y = call["grad_y"];
  p.grad_grad_x = call["grad_grad_x"];
  p.grad_grad_weight = call["grad_grad_weight"];
  p.grad_grad_bias = call["grad_grad_bias"];
  p.compute_sums = outputs.contains("sums");
  p.sums = call["sums"];
  p.grad_grad_y = call["grad_grad_y"];
  p.grad_x = call["grad_x"];
  p.grad_weight = call["grad_weight"];
  call.finish(cuda::batch_norm_leaky_relu_double_backward(p, call.scratch(), get<int>(o, "device"),
                                                          nullptr));
}

void update_running_statistics(const py::dict& inputs, const py::dict& outputs, const py::dict& o) {
  Call call(inputs, outputs, 0, 0, 0);
  UpdateRunningStatistics p;
  p.c = get<int64_t>(o, "c");
  p.statistics = call["statistics"];
  p.statistics_dtype = dtype_of(get<std::string>(o, "statistics_dtype"));
  p.running_mean = call["running_mean"];
  p.running_var = call["running_var"];
  p.running_dtype = dtype_of(get<std::string>(o, "running_dtype"));
  p.num_batches_tracked = static_cast<int64_t*>(call["num_batches_tracked"]);
  p.cumulative = get<bool>(o, "cumulative");
  p.momentum = get<double>(o, "momentum");
  p.count = get<double>(o, "count");
  call.finish(cuda::update_running_statistics(p, get<int>(o, "device"), nullptr));
}

Call make_call(GradientNormPenalty& p, const py::dict& inputs, const py::dict& outputs,
               const py::dict& o) {
  p.n = get<int64_t>(o, "n");
  p.d = get<int64_t>(o, "d");
  p.dtype = dtype_of(get<std::string>(o, "dtype"));
  p.kind = static_cast<Penalty>(get<int>(o, "kind"));
  p.center = get<double>(o, "center");
  Call call(inputs, outputs, get<int64_t>(o, "misalignment"),
            get<int64_t>(o, "output_misalignment"), cuda::scratch_bytes(p, get<int>(o, "device")));
  p.grad = call["grad"];
  p.squared_norms = call["squared_norms"];
  return call;
}

void penalty_forward(const py::dict& inputs, const py::dict& outputs, const py::dict& o) {
  GradientNormPenaltyForward p;
  Call call = make_call(p, inputs, outputs, o);
  p.penalty = call["penalty"];
  call.finish(
      cuda::gradient_norm_penalty_forward(p, call.scratch(), get<int>(o, "device"), nullptr));
}

void penalty_backward(const py::dict& inputs, const py::dict& outputs, const py::dict& o) {
  GradientNormPenaltyBackward p;
  Call call = make_call(p, inputs, outputs, o);
  p.grad_penalty = call["grad_penalty"];
  p.grad_grad = call["grad_grad"];
  call.finish(
      cuda::gradient_norm_penalty_backward(p, call.scratch(), get<int>(o, "device"), nullptr));
}

void penalty_double_backward(const py::dict& inputs, const py::dict& outputs, const py::dict& o) {
  GradientNormPenaltyDoubleBackward p;
  Call call = make_call(p, inputs, outputs, o);
  p.grad_penalty = call["grad_penalty"];
  p.tangent = call["tangent"];
  p.grad_grad_penalty = call["grad_grad_penalty"];
  p.grad_grad = call["grad_grad"];
  call.finish(cuda::gradient_norm_penalty_double_backward(p, call.scratch(), get<int>(o, "device"),
                                                          nullptr));
}

// Inputs are the memory that tensors lie in, whose strides are among the options.
void set_strides(const py::dict& o, const char* name, int64_t* strides) {
  const auto values = get<std::vector<int64_t>>(o, name);
  std::copy(values.begin(), values.end(), strides);
}

template <typename Parameters>
Call make_discrimination_call(Parameters& p, const py::dict& inputs, const py::dict& outputs,
                              const py::dict& o) {
  p.n = get<int64_t>(o, "n");
  p.b = get<int64_t>(o, "b");
  p.c = get<int64_t>(o, "c");
  p.dtype = dtype_of(get<std::string>(o, "dtype"));
  set_strides(o, "m_strides", p.m_strides);
  const auto misalignment = get<int64_t>(o, "misalignment");
  const int64_t scratch = cuda::scratch_bytes(p, get<int>(o, "device"));
  Call call(inputs, outputs, misalignment, misalignment, scratch);
  p.m = call["m"];
  return call;
}

void discrimination_forward(const py::dict& inputs, const py::dict& outputs, const py::dict& o) {
  MinibatchDiscriminationForward p;
  Call call = make_discrimination_call(p, inputs, outputs, o);
  p.o = call["o"];
  call.finish(
      cuda::minibatch_discrimination_forward(p, call.scratch(), get<int>(o, "device"), nullptr));
}

void discrimination_backward(const py::dict& inputs, const py::dict& outputs, const py::dict& o) {
  MinibatchDiscriminationBackward p;
  Call call = make_discrimination_call(p, inputs, outputs, o);
  p.grad_o = call["grad_o"];
  set_strides(o, "grad_o_strides", p.grad_o_strides);
  p.grad_m = call["grad_m"];
  call.finish(
      cuda::minibatch_discrimination_backward(p, call.scratch(), get<int>(o, "device"), nullptr));
}

void discrimination_double_backward(const py::dict& inputs, const py::dict& outputs,
                                    const py::dict& o) {
  MinibatchDiscriminationDoubleBackward p;
  Call call = make_discrimination_call(p, inputs, outputs, o);
  p.grad_o = call["grad_o"];
  set_strides(o, "grad_o_strides", p.grad_o_strides);
  p.grad_grad_m = call["grad_grad_m"];
  set_strides(o, "grad_grad_m_strides", p.grad_grad_m_strides);
  p.grad_grad_o = call["grad_grad_o"];
  p.grad_m = call["grad_m"];
  call.finish(cuda::minibatch_discrimination_double_backward(p, call.scratch(),
                                                             get<int>(o, "device"), nullptr));
}

Call make_stddev_call(MinibatchStddev& p, const py::dict& inputs, const py::dict& outputs,
                      const py::dict& o) {
  p.n = get<int64_t>(o, "n");
  p.groups = get<int64_t>(o, "groups");
  p.rows = get<int64_t>(o, "rows");
  p.features = get<int64_t>(o, "features");
  p.run = get<int64_t>(o, "run");
  p.dtype = dtype_of(get<std::string>(o, "dtype"));
  p.eps = get<double>(o, "eps");
  Call call(inputs, outputs, get<int64_t>(o, "misalignment"),
            get<int64_t>(o, "output_misalignment"), cuda::scratch_bytes(p, get<int>(o, "device")));
  p.x = call["x"];
  return call;
}

void stddev_forward(const py::dict& inputs, const py::dict& outputs, const py::dict& o) {
  MinibatchStddevForward p;
  Call call = make_stddev_call(p, inputs, outputs, o);
  p.stddev = call["stddev"];
  call.finish(cuda::minibatch_stddev_forward(p, call.scratch(), get<int>(o, "device"), nullptr));
}

void stddev_backward(const py::dict& inputs, const py::dict& outputs, const py::dict& o) {
  MinibatchStddevBackward p;
  Call call = make_stddev_call(p, inputs, outputs, o);
  p.grad_stddev = call["grad_stddev"];
  p.grad_x = call["grad_x"];
  call.finish(cuda::minibatch_stddev_backward(p, call.scratch(), get<int>(o, "device"), nullptr));
}

void stddev_double_backward(const py::dict& inputs, const py::dict& outputs, const py::dict& o) {
  MinibatchStddevDoubleBackward p;
  Call call = make_stddev_call(p, inputs, outputs, o);
  p.grad_stddev = call["grad_stddev"];
  p.tangent = call["tangent"];
  p.grad_grad_stddev = call["grad_grad_stddev"];
  p.grad_x = call["grad_x"];
  call.finish(
      cuda::minibatch_stddev_double_backward(p, call.scratch(), get<int>(o, "device"), nullptr));
}

// As the ops do: a kernel starts on the current device.
template <void (*kRun)(const py::dict&, const py::dict&, const py::dict&)>
void on_device(const py::dict& inputs, const py::dict& outputs, const py::dict& o) {
  const struct Restore {
    int device;
    ~Restore() { emulation::set_device(device); }
  } restore{emulation::current_device()};
  const char* const error = emulation::set_device(get<int>(o, "device"));
  if (error != nullptr) throw std::runtime_error(error);
  kRun(inputs, outputs, o);
}

void self_test(const std::string& name, const py::dict& inputs, const py::dict& outputs,
               unsigned int blocks, unsigned int threads, size_t shared_bytes) {
  Call call(inputs, outputs, 0, 0, 0);
  const float* const in = static_cast<const float*>(call["in"]);
  call.finish(run_self_test(name.c_str(), in, static_cast<float*>(call["out"]), blocks, threads,
                            shared_bytes));
}

}  // namespace

PYBIND11_MODULE(emulated, m) {
  m.def("forward", &on_device<&forward>);
  m.def("backward", &on_device<&backward>);
  m.def("double_backward", &on_device<&double_backward>);
  m.def("update_running_statistics", &on_device<&update_running_statistics>);
  m.def("scratch_bytes", [](const py::dict& options, int device) {
    BatchNormLeakyReLU p;
    describe(p, options);
    return cuda::scratch_bytes(p, device);
  });
  m.def("penalty_forward", &on_device<&penalty_forward>);
  m.def("penalty_backward", &on_device<&penalty_backward>);
  m.def("penalty_double_backward", &on_device<&penalty_double_backward>);
  m.def("discrimination_forward", &on_device<&discrimination_forward>);
  m.def("discrimination_backward", &on_device<&discrimination_backward>);
  m.def("discrimination_double_backward", &on_device<&discrimination_double_backward>);
  m.def("stddev_forward", &on_device<&stddev_forward>);
  m.def("stddev_backward", &on_device<&stddev_backward>);
  m.def("stddev_double_backward", &on_device<&stddev_double_backward>);
  m.def("self_test", &self_test, py::arg("name"), py::arg("inputs"), py::arg("outputs"),
        py::arg("blocks") = 1, py::arg("threads") = 32, py::arg("shared_bytes") = 0);
  m.def("set_seed", &emulation::set_seed);
  m.def("current_device", &emulation::current_device);
  // (kernel, device, blocks, threads) of every launch since the last call.
  m.def("take_launches", [] {
    std::vector<std::tuple<std::string, int, unsigned int, unsigned int>> launches;
    for (const auto& l : emulation::take_launches()) {
      launches.emplace_back(l.kernel, l.device, l.blocks, l.threads);
    }
    return launches;
  });
}
