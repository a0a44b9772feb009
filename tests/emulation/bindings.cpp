// The kernels as functions of numpy arrays on the emulated device: NAME(inputs, outputs, options),
// where the arrays and options are called as the fields of the kernel's parameters.
//
// Every array is copied to a buffer of exactly its size between guards. After the call, guards and
// inputs must be unchanged, and outputs are copied back.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

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
    emulation::add_device_memory(memory_.get(), total_);  // guards find what is outside
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
  static constexpr size_t kGuard = 4096;  // more than any mutant writes beyond the end
  struct Free {
    void operator()(unsigned char* memory) const { std::free(memory); }
  };
  std::string name_;
  size_t bytes_, before_, total_;
  std::unique_ptr<unsigned char, Free> memory_;
};

DType dtype_of(const std::string& name) {
  if (name == "float32") return DType::kFloat32;
  if (name == "float64") return DType::kFloat64;
  if (name == "bfloat16") return DType::kBFloat16;
  if (name == "float16") return DType::kFloat16;
  throw std::invalid_argument("dtype: " + name);
}

// The arrays of one call, on the "device", and its options.
class Call {
 public:
  Call(const py::dict& inputs, const py::dict& outputs, const py::dict& options)
      : options_(options) {
    const auto offset = [&](const char* name) {
      return options.contains(name) ? py::cast<int64_t>(options[name]) : 0;
    };
    for (const auto& [key, value] : inputs) add(key, value, offset("misalignment"), true);
    for (const auto& [key, value] : outputs) add(key, value, offset("output_misalignment"), false);
  }

  bool writes(const char* name) const {
    const auto found = arrays_.find(name);
    return found != arrays_.end() && !found->second.is_input;
  }

  // Sets fields by their names: pointers to the arrays, null where there is none; strides to the
  // options of the arrays' names; everything else to the options.
  template <typename Field, typename... More>
  void set(const char* name, Field& field, More&&... more) const {
    if constexpr (std::is_pointer_v<Field>) {
      const auto found = arrays_.find(name);
      void* const data = found == arrays_.end() ? nullptr : found->second.buffer->data();
      field = static_cast<Field>(data);
    } else if constexpr (std::is_array_v<Field>) {
      const auto strides = py::cast<std::vector<int64_t>>(options_[name]);
      std::copy(strides.begin(), strides.end(), field);
    } else if constexpr (std::is_same_v<Field, DType>) {
      field = dtype_of(py::cast<std::string>(options_[name]));
    } else if constexpr (std::is_enum_v<Field>) {
      field = static_cast<Field>(py::cast<int>(options_[name]));
    } else {
      field = py::cast<Field>(options_[name]);
    }
    if constexpr (sizeof...(More) > 0) set(std::forward<More>(more)...);
  }

  void* scratch(int64_t bytes) {
    if (bytes == 0) return nullptr;
    scratch_ = std::make_unique<GuardedBuffer>("scratch", bytes, 0);
    return scratch_->data();
  }

  void finish(const char* error) {
    if (error != nullptr) throw std::runtime_error(error);
    if (scratch_) scratch_->check_guards();
    for (auto& [name, entry] : arrays_) {
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
    // Outputs are copied too: running statistics are both read and written.
    std::memcpy(buffer->data(), array.data(), array.nbytes());
    arrays_[name] = Entry{array, std::move(buffer), is_input};
  }

  py::dict options_;
  std::map<std::string, Entry> arrays_;
  std::unique_ptr<GuardedBuffer> scratch_;
};

// The fields of every kernel's parameters.
#define FIELD(name) #name, p.name

void fill(BatchNormLeakyReLU& p, const Call& call) {
  call.set(FIELD(n), FIELD(c), FIELD(s), FIELD(affine), FIELD(channels_last), FIELD(dtype),
           FIELD(parameter_dtype), FIELD(activation_first), FIELD(training), FIELD(eps),
           FIELD(negative_slope), FIELD(count), FIELD(x), FIELD(weight), FIELD(bias),
           FIELD(statistics));
}

void fill(BatchNormLeakyReLUForward& p, const Call& call) {
  fill(static_cast<BatchNormLeakyReLU&>(p), call);
  p.compute_statistics = call.writes("statistics");
  call.set(FIELD(y));
}

void fill(BatchNormLeakyReLUBackward& p, const Call& call) {
  fill(static_cast<BatchNormLeakyReLU&>(p), call);
  p.compute_sums = call.writes("sums");
  call.set(FIELD(grad_y), FIELD(sums), FIELD(grad_x));
}

void fill(BatchNormLeakyReLUDoubleBackward& p, const Call& call) {
  fill(static_cast<BatchNormLeakyReLU&>(p), call);
  p.compute_sums = call.writes("sums");
  call.set(FIELD(grad_y), FIELD(grad_grad_x), FIELD(grad_grad_weight), FIELD(grad_grad_bias),
           FIELD(sums), FIELD(grad_grad_y), FIELD(grad_x), FIELD(grad_weight));
}

void fill(UpdateRunningStatistics& p, const Call& call) {
  call.set(FIELD(c), FIELD(statistics), FIELD(statistics_dtype), FIELD(running_mean),
           FIELD(running_var), FIELD(running_dtype), FIELD(num_batches_tracked), FIELD(cumulative),
           FIELD(momentum), FIELD(count));
}

void fill(GradientNormPenalty& p, const Call& call) {
  call.set(FIELD(n), FIELD(d), FIELD(dtype), FIELD(kind), FIELD(center), FIELD(grad),
           FIELD(squared_norms));
}

void fill(GradientNormPenaltyForward& p, const Call& call) {
  fill(static_cast<GradientNormPenalty&>(p), call);
  call.set(FIELD(penalty));
}

void fill(GradientNormPenaltyBackward& p, const Call& call) {
  fill(static_cast<GradientNormPenalty&>(p), call);
  call.set(FIELD(grad_penalty), FIELD(grad_grad));
}

void fill(GradientNormPenaltyDoubleBackward& p, const Call& call) {
  fill(static_cast<GradientNormPenalty&>(p), call);
  call.set(FIELD(grad_penalty), FIELD(tangent), FIELD(grad_grad_penalty), FIELD(grad_grad));
}

void fill(MinibatchDiscrimination& p, const Call& call) {
  call.set(FIELD(n), FIELD(b), FIELD(c), FIELD(dtype), FIELD(m), FIELD(m_strides));
}

void fill(MinibatchDiscriminationForward& p, const Call& call) {
  fill(static_cast<MinibatchDiscrimination&>(p), call);
  call.set(FIELD(o));
}

void fill(MinibatchDiscriminationBackward& p, const Call& call) {
  fill(static_cast<MinibatchDiscrimination&>(p), call);
  call.set(FIELD(grad_o), FIELD(grad_o_strides), FIELD(grad_m));
}

void fill(MinibatchDiscriminationDoubleBackward& p, const Call& call) {
  fill(static_cast<MinibatchDiscrimination&>(p), call);
  call.set(FIELD(grad_o), FIELD(grad_o_strides), FIELD(grad_grad_m), FIELD(grad_grad_m_strides),
           FIELD(grad_grad_o), FIELD(grad_m));
}

void fill(MinibatchStddev& p, const Call& call) {
  call.set(FIELD(n), FIELD(groups), FIELD(rows), FIELD(features), FIELD(run), FIELD(dtype),
           FIELD(eps), FIELD(x));
}

void fill(MinibatchStddevForward& p, const Call& call) {
  fill(static_cast<MinibatchStddev&>(p), call);
  call.set(FIELD(stddev));
}

void fill(MinibatchStddevBackward& p, const Call& call) {
  fill(static_cast<MinibatchStddev&>(p), call);
  call.set(FIELD(grad_stddev), FIELD(grad_x));
}

void fill(MinibatchStddevDoubleBackward& p, const Call& call) {
  fill(static_cast<MinibatchStddev&>(p), call);
  call.set(FIELD(grad_stddev), FIELD(tangent), FIELD(grad_grad_stddev), FIELD(grad_x));
}

template <typename Params>
void run(const char* (*kernel)(const Params&, void*, int, void*), Call& call, int device) {
  Params p;
  fill(p, call);
  call.finish(kernel(p, call.scratch(cuda::scratch_bytes(p, device)), device, nullptr));
}

template <typename Params>
void run(const char* (*kernel)(const Params&, int, void*), Call& call, int device) {
  Params p;
  fill(p, call);
  call.finish(kernel(p, device, nullptr));
}

// As the ops do: a kernel starts on the current device.
template <auto kKernel>
void on_device(const py::dict& inputs, const py::dict& outputs, const py::dict& options) {
  const struct Restore {
    int device;
    ~Restore() { emulation::set_device(device); }
  } restore{emulation::current_device()};
  const int device = py::cast<int>(options["device"]);
  if (const char* error = emulation::set_device(device)) throw std::runtime_error(error);
  Call call(inputs, outputs, options);
  run(kKernel, call, device);
}

void self_test(const std::string& name, const py::dict& inputs, const py::dict& outputs,
               unsigned int blocks, unsigned int threads, size_t shared_bytes) {
  Call call(inputs, outputs, {});
  void *in = nullptr, *out = nullptr;
  call.set("in", in, "out", out);
  call.finish(run_self_test(name.c_str(), static_cast<const float*>(in), static_cast<float*>(out),
                            blocks, threads, shared_bytes));
}

}  // namespace

PYBIND11_MODULE(emulated, m) {
#define KERNEL(name) m.def(#name, &on_device<&cuda::name>)
  KERNEL(batch_norm_leaky_relu_forward);
  KERNEL(batch_norm_leaky_relu_backward);
  KERNEL(batch_norm_leaky_relu_double_backward);
  KERNEL(update_running_statistics);
  KERNEL(gradient_norm_penalty_forward);
  KERNEL(gradient_norm_penalty_backward);
  KERNEL(gradient_norm_penalty_double_backward);
  KERNEL(minibatch_discrimination_forward);
  KERNEL(minibatch_discrimination_backward);
  KERNEL(minibatch_discrimination_double_backward);
  KERNEL(minibatch_stddev_forward);
  KERNEL(minibatch_stddev_backward);
  KERNEL(minibatch_stddev_double_backward);
#undef KERNEL
  m.def("self_test", &self_test, py::arg("name"), py::arg("inputs"), py::arg("outputs"),
        py::arg("blocks") = 1, py::arg("threads") = 32, py::arg("shared_bytes") = 0);
  m.def("set_seed", &emulation::set_seed);
  m.def("select", &emulation::select);
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
