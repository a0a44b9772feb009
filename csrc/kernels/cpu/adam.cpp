// adam on the CPU. Compiled once per instruction set, into the namespace GK_ISA.
//
// Bytes per element: parameter and moments are read and written, 24, the gradient is read, 4 (2 in
// half precision), and the cast is written, 2: 30 (28) together.
#include "../adam.h"

#include "dispatch.h"
#include "parallel.h"
#include "simd.h"

namespace gankernels::GK_ISA {
namespace {

constexpr int64_t kBlock = 8192;    // elements that one thread takes at a time
constexpr int64_t kSerial = 16384;  // below this many elements a second thread costs too much

double power(double base, int64_t exponent) {
  double result = 1;
  for (; exponent > 0; exponent /= 2, base *= base) {
    if (exponent % 2) result *= base;
  }
  return result;
}

// Elements [begin, end) of one tensor.
template <typename G>
void update(const Adam& p, const AdamTensor& t, int64_t begin, int64_t end) {
  using V = Vector<float>;
  constexpr int W = VectorOf<float>::width;
  const double correction1 = 1 - power(p.beta1, t.step), correction2 = 1 - power(p.beta2, t.step);
  const float rate = float(p.lr / correction1), scale = float(1 / __builtin_sqrt(correction2));
  const float beta2 = float(p.beta2), decay = float(p.weight_decay), eps = float(p.eps);
  const float fresh1 = float(1 - p.beta1), fresh2 = float(1 - p.beta2);
  const G* const gradient = static_cast<const G*>(t.gradient);
  BFloat16* const cast = static_cast<BFloat16*>(t.cast);
  auto step = [&](int64_t i, auto... lanes) {  // one vector, or its first lanes
    V parameter = load(t.parameter + i, lanes...);
    V m = load(t.exp_avg + i, lanes...), v = load(t.exp_avg_sq + i, lanes...);
    const V g = load(gradient + i, lanes...) + parameter * decay;
    m += (g - m) * fresh1;
    v = v * beta2 + g * g * fresh2;
    parameter -= m * rate / (square_root(v) * scale + eps);
    store(t.parameter + i, parameter, lanes...);
    store(t.exp_avg + i, m, lanes...);
    store(t.exp_avg_sq + i, v, lanes...);
    if (cast) store(cast + i, parameter, lanes...);
  };
  int64_t i = begin;
  for (; i + W <= end; i += W) step(i);
  if (i < end) step(i, int(end - i));
}

}  // namespace

void adam(const Adam& p, const CpuThreads& available) {
  CpuThreads threads = available;
  int64_t blocks = 0, elements = 0;
  for (int64_t i = 0; i < p.count; ++i) {
    blocks += ceil_div(p.tensors[i].size, kBlock);
    elements += p.tensors[i].size;
  }
  if (elements < kSerial) threads.count = 1;
  parallel(threads, blocks, [&](int64_t first, int64_t last) {
    int64_t before = 0;  // blocks of earlier tensors
    for (int64_t i = 0; i < p.count && before < last; ++i) {
      const AdamTensor& t = p.tensors[i];
      const int64_t of_this = ceil_div(t.size, kBlock);
      const int64_t begin = maximum(first - before, int64_t(0)) * kBlock;
      const int64_t end = minimum((last - before) * kBlock, t.size);
      if (begin < end) {
        const bool half = t.gradient_dtype == DType::kBFloat16;
        (half ? update<BFloat16> : update<float>)(p, t, begin, end);
      }
      before += of_this;
    }
  });
}

}  // namespace gankernels::GK_ISA

GK_DISPATCH_PLAIN(void, adam, Adam)
