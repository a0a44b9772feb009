// batch_norm_leaky_relu on the CPU. Compiled once per instruction set, into the namespace GK_ISA.
//
// Each derivative is a pass of two halves: `reduce` takes sums over every channel, `map` writes the
// elementwise results from per-channel coefficients. What makes it fast is where the tensors are
// when `map` reads them again: wherever one channel (channels first) or a block of columns
// (channels last) fits in a core's L2 cache, one thread reduces and maps it in one go, so that
// memory is read once; otherwise the threads share the rows, and `map` walks them backwards, to
// meet first what `reduce` left in the caches last.
#include "../batch_norm_leaky_relu_math.h"
#include "parallel.h"
#include "simd.h"

namespace gankernels::GK_ISA {
namespace {

// Elements of a channel (channels first) or of all of them (channels last) that are summed in the
// accumulation type before `reduce` goes on in double.
constexpr int64_t kChunk = 2048;
constexpr int64_t kChunkChannelsLast = 16384;
// A column is summed one row after another, so few columns are no reason for many rows.
constexpr int64_t kChunkRows = 512;
// What a thread maps in memory order before it steps back to an earlier block.
constexpr int64_t kBlockBytes = 256 << 10;
// A thread's share of a cache: what one unit of work may touch if it is to be read from memory
// once.
constexpr int64_t kCacheBytes = 768 << 10;
// Below this many elements a second thread costs more than it saves.
constexpr int64_t kSerial = 16384;
// Where more than this is read and written, results are stored past the caches: they would not be
// found there again, and lines that are written whole need not be read first.
constexpr int64_t kStreamBytes = 24 << 20;

constexpr int kMaxPartials = 5, kMaxCoefficients = 10;

GK_INLINE int64_t rows_of_chunk(int64_t columns) {
  return minimum(kChunkRows, maximum<int64_t>(4, kChunkChannelsLast / columns));
}

GK_INLINE double load_parameter(const void* p, DType dtype, int64_t i, double missing) {
  if (!p) return missing;
  if (dtype == DType::kFloat32) return static_cast<const float*>(p)[i];
  if (dtype == DType::kFloat64) return static_cast<const double*>(p)[i];
  HalfBits v{};
  v[0] = static_cast<const uint16_t*>(p)[i];
  return dtype == DType::kBFloat16 ? widen(v, (BFloat16*)nullptr)[0]
                                   : widen(v, (Float16*)nullptr)[0];
}

// ---- what is done to one element: V lanes of it, P the coefficients of one channel or one per
// lane

// From a pivot: any value near the mean.
template <bool kFirst>
struct Deviation {
  static constexpr int kInputs = 1, kSums = 2;
  template <typename V, typename P, typename A>
  GK_INLINE static void reduce(const V* in, const P* pivot, A slope, V* sums) {
    const V d = (kFirst ? leaky_relu(in[0], slope) : in[0]) - pivot[0];
    sums[0] += d;
    sums[1] += d * d;
  }
};

template <bool kFirst>
struct ForwardElement {
  static constexpr int kInputs = 1, kOutputs = 1, kCoefficients = 3;
  template <typename V, typename P, typename A>
  GK_INLINE static void map(const V* in, const P* k, A slope, V* out) {
    out[0] = chain(in[0], k[0], k[1], k[2], slope, kFirst).y();
  }
};

template <bool kFirst>
struct BackwardElement {
  static constexpr int kInputs = 2, kSums = 2, kOutputs = 1, kCoefficients = 6;
  template <typename V, typename P, typename A>
  GK_INLINE static void reduce(const V* in, const P* k, A slope, V* sums) {
    const auto e = chain(in[0], k[0], k[1], k[2], slope, kFirst);
    const V g = e.times_dy_dz(in[1]);
    sums[0] += g;
    sums[1] += g * e.centred;
  }
  template <typename V, typename P, typename A>
  GK_INLINE static void map(const V* in, const P* k, A slope, V* out) {
    const auto e = chain(in[0], k[0], k[1], k[2], slope, kFirst);
    const V g = e.times_dy_dz(in[1]);
    out[0] = e.times_du_dx(g * k[3] + (e.centred * k[4] + k[5]));
  }
};

// With the statistics given: what `map` then is, see term().
template <bool kFirst>
struct EvaluationBackwardElement : BackwardElement<kFirst> {
  template <typename V, typename P, typename A>
  GK_INLINE static void map(const V* in, const P* k, A slope, V* out) {
    const auto e = chain(in[0], k[0], k[1], k[2], slope, kFirst);
    out[0] = e.times_du_dx(e.times_dy_dz(in[1]) * k[3]);
  }
};

template <bool kFirst>
struct DoubleBackwardElement {
  static constexpr int kInputs = 3, kSums = 5, kOutputs = 2, kCoefficients = 10;
  template <typename V, typename P, typename A>
  GK_INLINE static void reduce(const V* in, const P* k, A slope, V* sums) {
    const auto e = chain(in[0], k[0], k[1], k[2], slope, kFirst);
    const V g = e.times_dy_dz(in[1]), v = e.times_du_dx(in[2]);
    sums[0] += g;
    sums[1] += g * e.centred;
    sums[2] += v;
    sums[3] += v * e.centred;
    sums[4] += v * g;
  }
  template <typename V, typename P, typename A>
  GK_INLINE static void map(const V* in, const P* k, A slope, V* out) {
    const auto e = chain(in[0], k[0], k[1], k[2], slope, kFirst);
    const V g = e.times_dy_dz(in[1]), v = e.times_du_dx(in[2]);
    out[0] = e.times_dy_dz(v * k[3] + (e.centred * k[4] + k[5]));
    out[1] = e.times_du_dx(g * k[6] + (v * k[7] + (e.centred * k[8] + k[9])));
  }
};

template <bool kFirst>
struct EvaluationDoubleBackwardElement : DoubleBackwardElement<kFirst> {
  template <typename V, typename P, typename A>
  GK_INLINE static void map(const V* in, const P* k, A slope, V* out) {
    const auto e = chain(in[0], k[0], k[1], k[2], slope, kFirst);
    const V g = e.times_dy_dz(in[1]), v = e.times_du_dx(in[2]);
    out[0] = e.times_dy_dz(v * k[3] + (term(e.centred, k[4]) + k[5]));
    out[1] = e.times_du_dx(term(g, k[6]));
  }
};

// ---- channels first: lanes are neighbours in space ---------------------------------------------

// Sums over elements [begin, end) of channel c, counted along its runs. Everything is unrolled and
// in one function, because the sums stay in registers from run to run only then; where there are
// few of them they go in two chains, to hide the latency of additions.
template <typename Element, typename T>
void reduce_runs(const BatchNormLeakyReLU& p, const T* const* inputs, int64_t c, int64_t begin,
                 int64_t end, const Accumulate<T>* coefficients, double* results) {
  using A = Accumulate<T>;
  using V = Vector<A>;
  constexpr int W = VectorOf<A>::width, K = Element::kSums, I = Element::kInputs;
  constexpr int kChains = K > 2 ? 1 : 2;
  const A slope = A(p.negative_slope);
  V sums[kChains][K];
  GK_UNROLL for (int x = 0; x < kChains; ++x) {
    GK_UNROLL for (int k = 0; k < K; ++k) sums[x][k] = V{};
  }
  int64_t n = begin / p.s, s = begin % p.s;
  // The neighbouring channels' runs come next: as many streams as there are runs here.
  const int64_t ahead = kAheadBytes / int64_t(sizeof(T)) / divide_up(end - begin, p.s);
  for (; begin < end; ++n, s = 0) {
    const int64_t length = minimum(p.s - s, end - begin);
    const T* in[I];
    GK_UNROLL for (int j = 0; j < I; ++j) in[j] = inputs[j] + (n * p.c + c) * p.s + s;
    V a[I];
    int64_t i = 0;
    for (; i + 2 * W <= length; i += 2 * W) {
      GK_UNROLL for (int j = 0; j < I; ++j) {
        prefetch(in[j] + i + ahead);
        if (sizeof(T) * W >= 64) prefetch(in[j] + i + W + ahead);
      }
      GK_UNROLL for (int half = 0; half < 2; ++half) {
        GK_UNROLL for (int j = 0; j < I; ++j) a[j] = load(in[j] + i + half * W);
        Element::reduce(a, coefficients, slope, sums[half % kChains]);
      }
    }
    if (i + W <= length) {
      GK_UNROLL for (int j = 0; j < I; ++j) a[j] = load(in[j] + i);
      Element::reduce(a, coefficients, slope, sums[0]);
      i += W;
    }
    if (i < length) {
      const int lanes = int(length - i);
      V tail[K];
      GK_UNROLL for (int k = 0; k < K; ++k) tail[k] = V{};
      GK_UNROLL for (int j = 0; j < I; ++j) a[j] = load(in[j] + i, lanes);
      Element::reduce(a, coefficients, slope, tail);
      GK_UNROLL for (int k = 0; k < K; ++k) sums[0][k] += keep_first<A>(tail[k], lanes);
    }
    begin += length;
  }
  GK_UNROLL for (int k = 0; k < K; ++k) {
    results[k] = sum_lanes<A>(kChains == 1 ? sums[0][k] : sums[0][k] + sums[kChains - 1][k]);
  }
}

// Writes one vector of every wanted output.
template <bool kStream, int O, typename T, typename V>
GK_INLINE void write(T* const* out, int64_t offset, const V* values) {
  for (int j = 0; j < O; ++j) {
    if (!out[j]) continue;
    kStream ? stream(out[j] + offset, values[j]) : store(out[j] + offset, values[j]);
  }
}
template <int O, typename T, typename V>
GK_INLINE void write(T* const* out, int64_t offset, const V* values, int lanes) {
  for (int j = 0; j < O; ++j) {
    if (out[j]) store(out[j] + offset, values[j], lanes);
  }
}

// Whether results go past the caches.
template <typename T, typename Element>
bool streams(const BatchNormLeakyReLU& p) {
  constexpr int kTensors = Element::kInputs + Element::kOutputs;
  return p.n * p.c * p.s * int64_t(sizeof(T)) * kTensors > kStreamBytes;
}

// How many elements precede the first whole vector's address. Outputs are aligned alike, being
// fresh tensors of x's shape.
template <int O, typename T>
int64_t misalignment(T* const* out, int64_t offset) {
  constexpr int64_t W = VectorOf<Accumulate<T>>::width;
  const T* first = (out[0] ? out[0] : out[O - 1]) + offset;
  return -int64_t(reinterpret_cast<uintptr_t>(first) / sizeof(T)) & (W - 1);
}

// The run of one channel's elements [offset, offset + length).
template <typename Element, bool kStream, typename T>
void map_run(const T* const* inputs, T* const* outputs, int64_t offset, int64_t length,
             const Accumulate<T>* coefficients, Accumulate<T> slope) {
  using V = Vector<Accumulate<T>>;
  constexpr int W = VectorOf<Accumulate<T>>::width, I = Element::kInputs, O = Element::kOutputs;
  const T* in[I];
  T* out[O];
  for (int j = 0; j < I; ++j) in[j] = inputs[j] + offset;
  for (int j = 0; j < O; ++j) out[j] = outputs[j] ? outputs[j] + offset : nullptr;
  auto some = [&](int64_t i, int lanes) {
    V a[I], r[O];
    for (int j = 0; j < I; ++j) a[j] = load(in[j] + i, lanes);
    Element::map(a, coefficients, slope, r);
    write<O>(out, i, r, lanes);
  };
  int64_t i = 0;
  if (kStream) {
    i = minimum(misalignment<O>(outputs, offset), length);
    if (i) some(0, int(i));
  }
  for (; i + W <= length; i += W) {
    V a[I], r[O];
    for (int j = 0; j < I; ++j) a[j] = load(in[j] + i);
    Element::map(a, coefficients, slope, r);
    write<kStream, O>(out, i, r);
  }
  if (i < length) some(i, int(length - i));
}

// ---- channels last: lanes are neighbouring channels --------------------------------------------

// Columns [c0, c1) of rows [r0, r1); coefficients and sums are arrays of rows `pitch` apart.
template <typename Element, typename T>
void reduce_columns(const BatchNormLeakyReLU& p, const T* const* inputs, int64_t r0, int64_t r1,
                    int64_t c0, int64_t c1, const Accumulate<T>* coefficients, int64_t pitch,
                    Accumulate<T>* sums) {
  using A = Accumulate<T>;
  using V = Vector<A>;
  constexpr int W = VectorOf<A>::width, K = Element::kSums, I = Element::kInputs;
  constexpr int R = 4;  // rows that share a load of the coefficients and a store of the sums
  constexpr int P = 3;  // coefficients that a reduction may read
  const A slope = A(p.negative_slope);
  for (int k = 0; k < K; ++k) {
    for (int64_t c = c0; c < c1; c += W) store(sums + k * pitch + c, V{});
  }
  const int64_t row = p.c, full = c0 + (c1 - c0) / W * W;
  const int64_t ahead = maximum<int64_t>(R, 2 * kAheadBytes / (row * int64_t(sizeof(T))));
  const T* in[I];
  for (int j = 0; j < I; ++j) in[j] = inputs[j] + r0 * row;
  auto rows = [&](auto count, int64_t c, auto get) {
    V k[P], s[K] = {};
    for (int j = 0; j < P; ++j) k[j] = load(coefficients + j * pitch + c);
    for (int q = 0; q < count(); ++q) {
      V a[I];
      for (int j = 0; j < I; ++j) {
        prefetch(in[j] + (q + ahead) * row + c);
        a[j] = get(in[j] + q * row + c);
      }
      Element::reduce(a, k, slope, s);
    }
    // Summed among themselves first: chains of additions, and their rounding errors, stay short.
    for (int j = 0; j < K; ++j) store(sums + j * pitch + c, load(sums + j * pitch + c) + s[j]);
  };
  auto all_columns = [&](auto count) {
    for (int64_t c = c0; c < full; c += W) rows(count, c, [](const T* x) { return load(x); });
    const int lanes = int(c1 - full);
    if (lanes) rows(count, full, [&](const T* x) { return load(x, lanes); });
    for (int j = 0; j < I; ++j) in[j] += count() * row;
  };
  for (; r0 + R <= r1; r0 += R) all_columns([] { return R; });
  for (; r0 < r1; ++r0) all_columns([] { return 1; });
}

template <typename Element, bool kStream, typename T>
void map_columns(const BatchNormLeakyReLU& p, const T* const* inputs, T* const* outputs, int64_t r0,
                 int64_t r1, int64_t c0, int64_t c1, const Accumulate<T>* coefficients,
                 int64_t pitch) {
  using A = Accumulate<T>;
  using V = Vector<A>;
  constexpr int W = VectorOf<A>::width, I = Element::kInputs, O = Element::kOutputs;
  constexpr int K = Element::kCoefficients;
  const A slope = A(p.negative_slope);
  const int64_t full = c0 + (c1 - c0) / W * W, row = p.c;
  const T* in[I];
  T* out[O];
  for (int j = 0; j < I; ++j) in[j] = inputs[j] + r0 * row;
  for (int j = 0; j < O; ++j) out[j] = outputs[j] ? outputs[j] + r0 * row : nullptr;
  // Row by row: taking several at once saves loads of coefficients, but costs twice the time,
  // because it breaks the streams that the prefetchers follow.
  for (int64_t r = r0; r < r1; ++r) {
    V a[I], k[K], o[O];
    for (int64_t c = c0; c < full; c += W) {
      for (int j = 0; j < K; ++j) k[j] = load(coefficients + j * pitch + c);
      for (int j = 0; j < I; ++j) {
        prefetch(in[j] + c + kAheadBytes / int64_t(sizeof(T)));
        a[j] = load(in[j] + c);
      }
      Element::map(a, k, slope, o);
      write<kStream, O>(out, c, o);
    }
    if (full < c1) {
      for (int j = 0; j < K; ++j) k[j] = load(coefficients + j * pitch + full);
      for (int j = 0; j < I; ++j) a[j] = load(in[j] + full, int(c1 - full));
      Element::map(a, k, slope, o);
      write<O>(out, full, o, int(c1 - full));
    }
    for (int j = 0; j < I; ++j) in[j] += row;
    for (int j = 0; j < O; ++j) out[j] = out[j] ? out[j] + row : nullptr;
  }
}

// ---- passes ------------------------------------------------------------------------------------
//
// A pass offers, for both layouts, `reduce` into partial results of kPartials doubles per channel,
// `merge` of two of them, and `finish`, which turns the merged one into the per-channel results and
// the coefficients of `map`. `prepare` sets the coefficients that `reduce` itself needs.
// Coefficient i of a channel stands at coefficients[i * pitch].

template <typename T, bool kFirst>
struct PassBase {
  using A = Accumulate<T>;

  // What is known of a channel beside its sums. Dense layers have as many channels as they have
  // rows to a channel and more, so a division or a square root here counts.
  struct Channel {
    double weight, bias, invstd;
  };
  GK_INLINE static Channel channel(const BatchNormLeakyReLU& p, int64_t c) {
    const double var = static_cast<const A*>(p.statistics)[p.c + c];
    return {load_parameter(p.weight, p.parameter_dtype, c, 1),
            load_parameter(p.bias, p.parameter_dtype, c, 0), 1 / __builtin_sqrt(var + p.eps)};
  }
  GK_INLINE static void prepare_chain(const BatchNormLeakyReLU& p, int64_t c,
                                      const Channel& channel, A* coefficients, int64_t pitch) {
    coefficients[0] = static_cast<const A*>(p.statistics)[c];
    coefficients[pitch] = A(channel.weight * channel.invstd);
    coefficients[2 * pitch] = A(channel.bias);
  }
};

template <typename T, bool kFirst>
struct ForwardPass : PassBase<T, kFirst> {
  using A = Accumulate<T>;
  using Element = ForwardElement<kFirst>;
  using Evaluation = Element;
  static constexpr int kPartials = 3;  // count, mean, sum of squared deviations
  const BatchNormLeakyReLUForward& p;
  const T* in[1];
  T* out[1];

  explicit ForwardPass(const BatchNormLeakyReLUForward& parameters) : p(parameters) {
    in[0] = static_cast<const T*>(p.x);
    out[0] = static_cast<T*>(p.y);
  }

  bool reduces() const { return p.compute_statistics; }
  bool maps() const { return p.y; }
  void prepare(int64_t, A*, int64_t) const {}

  // Statistics of `count` elements whose deviations from `pivot` are `sum` and, squared, `squares`:
  // the corrected two-pass algorithm of the same authors.
  static void correct(double count, double pivot, double sum, double squares, double* exact) {
    exact[0] = count;
    exact[1] = pivot + sum / count;
    exact[2] = maximum(0.0, squares - sum * (sum / count));
  }

  // Whether that subtraction would lose more than a bit: the pivot is more than a standard
  // deviation away from the mean. Then the sums are taken again, from the mean. Most chunks need
  // one pass only.
  static bool is_far(double count, double sum, double squares) {
    return sum * sum > 0.5 * count * squares;
  }

  // Chan, Golub & LeVeque 1979: two samples' statistics make those of their union.
  static void merge(double* into, const double* from) {
    if (from[0] == 0) return;
    const double count = into[0] + from[0], delta = from[1] - into[1];
    into[1] += delta * (from[0] / count);
    into[2] += from[2] + delta * delta * (into[0] * (from[0] / count));
    into[0] = count;
  }

  void reduce(int64_t c, int64_t begin, int64_t end, const A*, double* partial) const {
    const double count = double(end - begin);
    double sums[2], chunk[3];
    A pivot =
        partial[0] ? A(partial[1]) : first(in[0] + (begin / p.s * p.c + c) * p.s + begin % p.s);
    reduce_runs<Deviation<kFirst>>(p, in, c, begin, end, &pivot, sums);
    if (is_far(count, sums[0], sums[1])) {
      pivot += A(sums[0] / count);
      reduce_runs<Deviation<kFirst>>(p, in, c, begin, end, &pivot, sums);
    }
    correct(count, pivot, sums[0], sums[1], chunk);
    merge(partial, chunk);
  }

  void reduce_rows(int64_t r0, int64_t r1, int64_t c0, int64_t c1, A* work, int64_t pitch,
                   double* partial) const {
    double *counts = partial, *means = partial + p.c, *deviations = partial + 2 * p.c;
    for (int64_t c = c0; c < c1; ++c) counts[c] = means[c] = deviations[c] = 0;
    A *sums = work, *pivot = work + kMaxPartials * pitch;
    const int64_t step = rows_of_chunk(c1 - c0);
    for (int64_t c = c0; c < c1 && r0 < r1; ++c) pivot[c] = first(in[0] + r0 * p.c + c);
    double seen = 0;
    for (; r0 < r1; r0 += step) {
      const int64_t stop = minimum(r0 + step, r1);
      const double rows = double(stop - r0), total = seen + rows;
      reduce_columns<Deviation<kFirst>>(p, in, r0, stop, c0, c1, pivot, pitch, sums);
      bool far = false;
      for (int64_t c = c0; c < c1; ++c) far |= is_far(rows, sums[c], sums[pitch + c]);
      if (far) {
        for (int64_t c = c0; c < c1; ++c) pivot[c] += A(sums[c] / rows);
        reduce_columns<Deviation<kFirst>>(p, in, r0, stop, c0, c1, pivot, pitch, sums);
      }
      const double share = rows / total, weight = seen * share;
      for (int64_t c = c0; c < c1; ++c) {
        double chunk[3];
        correct(rows, pivot[c], sums[c], sums[pitch + c], chunk);
        const double delta = chunk[1] - means[c];
        means[c] += delta * share;
        deviations[c] += chunk[2] + delta * delta * weight;
        pivot[c] = A(means[c]);
      }
      seen = total;
    }
    for (int64_t c = c0; c < c1; ++c) counts[c] = seen;
  }

  // What is normalised of this element.
  A first(const T* x) const {
    const A value = load(x, 1)[0];
    return kFirst ? leaky_relu(value, A(p.negative_slope)) : value;
  }

  void finish(int64_t c, const double* partial, A* coefficients, int64_t pitch) const {
    if (p.compute_statistics) {
      A* statistics = static_cast<A*>(p.statistics);
      statistics[c] = A(partial[1]);
      statistics[p.c + c] = A(partial[2] / partial[0]);
    }
    this->prepare_chain(p, c, this->channel(p, c), coefficients, pitch);
  }
};

// What backward and double backward share: plain sums of an Element over each channel.
template <typename T, bool kFirst, typename Element_, typename Evaluation_, typename Parameters>
struct SumPass : PassBase<T, kFirst> {
  using A = Accumulate<T>;
  using Element = Element_;
  using Evaluation = Evaluation_;
  static constexpr int kPartials = Element::kSums;
  const Parameters& p;
  const T* in[Element::kInputs];
  T* out[Element::kOutputs];

  explicit SumPass(const Parameters& parameters) : p(parameters) {}

  bool reduces() const { return p.sums && p.compute_sums; }

  static void merge(double* into, const double* from) {
    for (int k = 0; k < kPartials; ++k) into[k] += from[k];
  }

  void prepare(int64_t c, A* coefficients, int64_t pitch) const {
    this->prepare_chain(p, c, this->channel(p, c), coefficients, pitch);
  }

  void reduce(int64_t c, int64_t begin, int64_t end, const A* coefficients, double* partial) const {
    double sums[kPartials];
    reduce_runs<Element>(p, in, c, begin, end, coefficients, sums);
    merge(partial, sums);
  }

  void reduce_rows(int64_t r0, int64_t r1, int64_t c0, int64_t c1, A* work, int64_t pitch,
                   double* partial) const {
    for (int k = 0; k < kPartials; ++k) {
      for (int64_t c = c0; c < c1; ++c) partial[k * p.c + c] = 0;
    }
    A *sums = work, *coefficients = work + kMaxPartials * pitch;
    const int64_t step = rows_of_chunk(c1 - c0);
    for (; r0 < r1; r0 += step) {
      reduce_columns<Element>(p, in, r0, minimum(r0 + step, r1), c0, c1, coefficients, pitch, sums);
      for (int k = 0; k < kPartials; ++k) {
        for (int64_t c = c0; c < c1; ++c) partial[k * p.c + c] += sums[k * pitch + c];
      }
    }
  }

  // The channel's sums, written where they were computed here, else read; x's in units of xhat.
  GK_INLINE void take_sums(int64_t c, double invstd, const double* partial, double* sums) const {
    A* stored = static_cast<A*>(p.sums);
    for (int k = 0; k < kPartials; ++k) {
      const bool of_xhat = k == 1 || k == 3;
      if (reduces()) {
        sums[k] = of_xhat ? partial[k] * invstd : partial[k];
        stored[k * p.c + c] = A(sums[k]);
      } else {
        sums[k] = stored ? double(stored[k * p.c + c]) : 0;
      }
    }
  }
};

template <typename T, bool kFirst>
struct BackwardPass : SumPass<T, kFirst, BackwardElement<kFirst>, EvaluationBackwardElement<kFirst>,
                              BatchNormLeakyReLUBackward> {
  using A = Accumulate<T>;
  explicit BackwardPass(const BatchNormLeakyReLUBackward& parameters)
      : BackwardPass::SumPass(parameters) {
    this->in[0] = static_cast<const T*>(parameters.x);
    this->in[1] = static_cast<const T*>(parameters.grad_y);
    this->out[0] = static_cast<T*>(parameters.grad_x);
  }

  bool maps() const { return this->p.grad_x; }

  void finish(int64_t c, const double* partial, A* coefficients, int64_t pitch) const {
    const auto& p = this->p;
    double sums[2];
    const auto channel = this->channel(p, c);
    this->take_sums(c, channel.invstd, partial, sums);
    this->prepare_chain(p, c, channel, coefficients, pitch);
    const auto k = backward_coefficients<double>(channel.weight, channel.invstd, sums[0], sums[1],
                                                 p.count, p.training);
    coefficients[3 * pitch] = A(k.g);
    coefficients[4 * pitch] = A(k.centred);
    coefficients[5 * pitch] = A(k.constant);
  }
};

template <typename T, bool kFirst>
struct DoubleBackwardPass
    : SumPass<T, kFirst, DoubleBackwardElement<kFirst>, EvaluationDoubleBackwardElement<kFirst>,
              BatchNormLeakyReLUDoubleBackward> {
  using A = Accumulate<T>;
  explicit DoubleBackwardPass(const BatchNormLeakyReLUDoubleBackward& parameters)
      : DoubleBackwardPass::SumPass(parameters) {
    this->in[0] = static_cast<const T*>(parameters.x);
    this->in[1] = static_cast<const T*>(parameters.grad_y);
    this->in[2] = static_cast<const T*>(parameters.grad_grad_x);
    this->out[0] = static_cast<T*>(parameters.grad_grad_y);
    this->out[1] = static_cast<T*>(parameters.grad_x);
  }

  bool maps() const { return this->p.grad_grad_y || this->p.grad_x; }

  void finish(int64_t c, const double* partial, A* coefficients, int64_t pitch) const {
    const auto& p = this->p;
    double sums[5], grad_weight;
    const auto channel = this->channel(p, c);
    this->take_sums(c, channel.invstd, partial, sums);
    this->prepare_chain(p, c, channel, coefficients, pitch);
    const DType accumulation = sizeof(A) == 8 ? DType::kFloat64 : DType::kFloat32;
    const auto k = double_backward_coefficients<double>(
        channel.weight, channel.invstd, sums[0], sums[1], sums[2], sums[3], sums[4],
        load_parameter(p.grad_grad_weight, accumulation, c, 0),
        load_parameter(p.grad_grad_bias, accumulation, c, 0), p.count, p.training, &grad_weight);
    const double values[] = {k.y_v, k.y_centred, k.y_constant, k.x_g,
                             k.x_v, k.x_centred, k.x_constant};
    for (int i = 0; i < 7; ++i) coefficients[(3 + i) * pitch] = A(values[i]);
    if (p.grad_weight) static_cast<A*>(p.grad_weight)[c] = A(grad_weight);
  }
};

// ---- who does which part -----------------------------------------------------------------------

template <typename Pass, bool kStream, typename T>
auto map_run_of(const BatchNormLeakyReLU& p) {
  return p.training ? map_run<typename Pass::Element, kStream, T>
                    : map_run<typename Pass::Evaluation, kStream, T>;
}

template <typename Pass, bool kStream, typename T>
auto map_columns_of(const BatchNormLeakyReLU& p) {
  return p.training ? map_columns<typename Pass::Element, kStream, T>
                    : map_columns<typename Pass::Evaluation, kStream, T>;
}

template <typename T, typename Pass>
void run_channels_first(const Pass& pass, Scratch scratch, CpuThreads threads) {
  using A = Accumulate<T>;
  using Element = typename Pass::Element;
  constexpr int K = Pass::kPartials;
  const auto& p = pass.p;
  const int64_t size = p.n * p.s;
  if (size * p.c < kSerial) threads.count = 1;
  // A line that is partly stored past the caches and partly not costs several times as much as
  // either, so vectors shorter than a line need runs of whole ones.
  const bool whole_lines = VectorOf<A>::width * sizeof(T) == 64 || p.s * sizeof(T) % 64 == 0;
  const auto map = streams<T, Element>(p) && whole_lines ? map_run_of<Pass, true, T>(p)
                                                         : map_run_of<Pass, false, T>(p);
  const A slope = A(p.negative_slope);
  A* const coefficients = scratch.take<A>(p.c * kMaxCoefficients);
  auto of_channel = [&](int64_t c) { return coefficients + c * kMaxCoefficients; };

  // Whole runs at a time where they are short.
  const int64_t step = p.s < kChunk ? kChunk / maximum<int64_t>(1, p.s) * p.s : kChunk;

  // What fits in the cores' caches as a whole is reduced and mapped channel by channel, in one go.
  // Larger tensors gain nothing from that, though a channel of them would fit: short runs far apart
  // cost memory more than it takes to read them a second time.
  const bool cached =
      size * p.c * int64_t(sizeof(T)) * Element::kInputs <= kCacheBytes * threads.count;
  const bool balanced = p.c % threads.count == 0 || p.c >= 8 * threads.count;
  if (pass.reduces() && pass.maps() && cached && balanced) {
    return parallel(threads, p.c, [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c) {
        double partial[K] = {};
        pass.prepare(c, of_channel(c), 1);
        for (int64_t i = 0; i < size; i += step) {
          pass.reduce(c, i, minimum(i + step, size), of_channel(c), partial);
        }
        pass.finish(c, partial, of_channel(c), 1);
        for (int64_t n = 0; n < p.n; ++n) {
          map(pass.in, pass.out, (n * p.c + c) * p.s, p.s, of_channel(c), slope);
        }
      }
    });
  }

  const int64_t parts = threads.count;
  double* const partials = scratch.take<double>(parts * p.c * K);
  for (int64_t i = 0; i < parts * p.c * K; ++i) partials[i] = 0;
  if (pass.reduces()) {
    for (int64_t c = 0; c < p.c; ++c) pass.prepare(c, of_channel(c), 1);
    const int64_t grain = p.n < parts ? 1 : p.s;
    parallel(threads, parts, [&](int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; ++part) {
        const int64_t last = size / grain * (part + 1) / parts * grain;
        for (int64_t i = size / grain * part / parts * grain; i < last; i += step) {
          for (int64_t c = 0; c < p.c; ++c) {
            pass.reduce(c, i, minimum(i + step, last), of_channel(c),
                        partials + (part * p.c + c) * K);
          }
        }
      }
    });
  }
  for (int64_t c = 0; c < p.c; ++c) {
    double* total = partials + c * K;
    for (int64_t part = 1; part < parts; ++part) Pass::merge(total, total + part * p.c * K);
    pass.finish(c, total, of_channel(c), 1);
  }
  if (!pass.maps()) return;
  // Rows (n, c), in parts of them where there are few.
  const int64_t pieces = p.n * p.c >= 8 * threads.count ? 1 : threads.count;
  const int64_t block = divide_up(kBlockBytes, maximum<int64_t>(1, p.s) * int64_t(sizeof(T)));
  parallel(threads, p.n * p.c * pieces, [&](int64_t begin, int64_t end) {
    // The latest blocks first: they are still in a cache from the reduction.
    for (int64_t last = end; last > begin; last -= block) {
      for (int64_t task = maximum(last - block, begin); task < last; ++task) {
        const int64_t row = task / pieces, piece = task % pieces;
        const int64_t from = p.s * piece / pieces, to = p.s * (piece + 1) / pieces;
        map(pass.in, pass.out, row * p.s + from, to - from, of_channel(row % p.c), slope);
      }
    }
  });
}

// Columns are given out in whole lines, and so that no two threads share one.
template <typename T>
constexpr int64_t line_of() {
  return 64 / int64_t(sizeof(T)) > 16 ? 64 / int64_t(sizeof(T)) : 16;
}

template <typename T, typename Pass>
void run_channels_last(const Pass& pass, Scratch scratch, CpuThreads threads) {
  using A = Accumulate<T>;
  using Element = typename Pass::Element;
  constexpr int K = Pass::kPartials;
  const auto& p = pass.p;
  const int64_t rows = p.n * p.s;
  if (rows * p.c < kSerial) threads.count = 1;
  constexpr int64_t kLine = line_of<T>();
  const int64_t pitch = divide_up(p.c, kLine) * kLine;
  const int64_t lines = pitch / kLine;
  // Work space for the partial sums in progress, then the coefficients of all channels.
  const int64_t work_size = (kMaxPartials + kMaxCoefficients) * pitch;

  // Streamed vectors must be whole and aligned in every row.
  const bool aligned =
      p.c % VectorOf<A>::width == 0 && misalignment<Element::kOutputs>(pass.out, 0) == 0;
  auto map = [&](int64_t r0, int64_t r1, int64_t c0, int64_t c1, const A* coefficients) {
    const auto run = streams<T, Element>(p) && aligned ? map_columns_of<Pass, true, T>(p)
                                                       : map_columns_of<Pass, false, T>(p);
    run(p, pass.in, pass.out, r0, r1, c0, c1, coefficients, pitch);
  };

  const int64_t share = divide_up(lines, threads.count) * kLine;
  const bool cached =
      rows * share * int64_t(sizeof(T)) * Element::kInputs <= kCacheBytes && lines >= threads.count;
  if (cached || threads.count == 1) {
    A* const work = scratch.take<A>(work_size);
    double* const partials = scratch.take<double>(K * p.c);
    // Threads take columns; one thread takes blocks of them that stay in its cache.
    const int64_t row_bytes = maximum<int64_t>(1, rows * int64_t(sizeof(T)) * Element::kInputs);
    const int64_t fit = kCacheBytes / row_bytes / kLine * kLine;
    const int64_t block = fit >= 16 * kLine ? fit : pitch;  // narrow blocks defeat the prefetchers
    return parallel(threads, lines, [&](int64_t begin, int64_t end) {
      const int64_t last = minimum(end * kLine, p.c);
      for (int64_t c0 = begin * kLine; c0 < last; c0 += block) {
        const int64_t c1 = minimum(c0 + block, last);
        A* coefficients = work + kMaxPartials * pitch;
        if (pass.reduces()) {
          for (int64_t c = c0; c < c1; ++c) pass.prepare(c, coefficients + c, pitch);
          pass.reduce_rows(0, rows, c0, c1, work, pitch, partials);
        }
        for (int64_t c = c0; c < c1; ++c) {
          double partial[K] = {};
          if (pass.reduces()) {
            for (int k = 0; k < K; ++k) partial[k] = partials[k * p.c + c];
          }
          pass.finish(c, partial, coefficients + c, pitch);
        }
        if (pass.maps()) {
          map(0, rows, c0, c1, coefficients);
        }
      }
    });
  }

  const int64_t parts = threads.count;
  A* const work = scratch.take<A>(work_size * parts);
  double* const partials = scratch.take<double>(parts * K * p.c);
  A* coefficients = work + kMaxPartials * pitch;
  if (pass.reduces()) {
    for (int64_t c = 0; c < p.c; ++c) pass.prepare(c, coefficients + c, pitch);
    parallel(threads, parts, [&](int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; ++part) {
        A* own = work + part * work_size;
        if (part > 0) {
          memcpy(own + kMaxPartials * pitch, coefficients, kMaxCoefficients * pitch * sizeof(A));
        }
        pass.reduce_rows(rows * part / parts, rows * (part + 1) / parts, 0, p.c, own, pitch,
                         partials + part * K * p.c);
      }
    });
  }
  for (int64_t c = 0; c < p.c; ++c) {
    double total[K] = {};
    for (int64_t part = 0; part < parts && pass.reduces(); ++part) {
      double partial[K];
      for (int k = 0; k < K; ++k) partial[k] = partials[(part * K + k) * p.c + c];
      Pass::merge(total, partial);
    }
    pass.finish(c, total, coefficients + c, pitch);
  }
  if (!pass.maps()) return;
  parallel(threads, parts, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      // The latest blocks first: they are still in a cache from the reduction.
      const int64_t first = rows * part / parts;
      const int64_t block = maximum<int64_t>(1, kBlockBytes / (p.c * int64_t(sizeof(T))));
      for (int64_t last = rows * (part + 1) / parts; last > first; last -= block) {
        map(maximum(last - block, first), last, 0, p.c, coefficients);
      }
    }
  });
}

template <template <typename, bool> class Pass, typename T, typename Parameters>
void run(const Parameters& p, void* memory, const CpuThreads& threads) {
  const Scratch scratch(memory);
  auto run_pass = [&](const auto& pass) {
    p.channels_last ? run_channels_last<T>(pass, scratch, threads)
                    : run_channels_first<T>(pass, scratch, threads);
  };
  p.activation_first ? run_pass(Pass<T, true>{p}) : run_pass(Pass<T, false>{p});
}

template <template <typename, bool> class Pass, typename Parameters>
void run(const Parameters& p, void* scratch, const CpuThreads& threads) {
  if (p.c == 0) return;
  with_storage(p.dtype, [&](auto storage) {
    run<Pass, typename decltype(storage)::type>(p, scratch, threads);
  });
}

}  // namespace

// What the hungriest pass takes of it, in either layout.
int64_t scratch_bytes(const BatchNormLeakyReLU& p, const CpuThreads& threads) {
  int64_t bytes = 0;
  with_storage(p.dtype, [&](auto storage) {
    using T = typename decltype(storage)::type;
    const int64_t parts = p.n * p.s * p.c < kSerial ? 1 : threads.count;
    const int64_t pitch = divide_up(p.c, line_of<T>()) * line_of<T>();
    bytes = Scratch::bytes<Accumulate<T>>(parts * (kMaxPartials + kMaxCoefficients) * pitch) +
            Scratch::bytes<double>(parts * kMaxPartials * p.c);
  });
  return bytes;
}

void batch_norm_leaky_relu_forward(const BatchNormLeakyReLUForward& p, void* scratch,
                                   const CpuThreads& threads) {
  run<ForwardPass>(p, scratch, threads);
}

void batch_norm_leaky_relu_backward(const BatchNormLeakyReLUBackward& p, void* scratch,
                                    const CpuThreads& threads) {
  run<BackwardPass>(p, scratch, threads);
}

void batch_norm_leaky_relu_double_backward(const BatchNormLeakyReLUDoubleBackward& p, void* scratch,
                                           const CpuThreads& threads) {
  run<DoubleBackwardPass>(p, scratch, threads);
}

void update_running_statistics(const UpdateRunningStatistics& p, const CpuThreads&) {
  double momentum = p.momentum;
  if (p.num_batches_tracked) {
    ++*p.num_batches_tracked;
    if (p.cumulative) momentum = 1 / double(*p.num_batches_tracked);
  }
  const double unbiased = p.count / (p.count - 1);
  with_storage(p.running_dtype, [&](auto storage) {
    using T = typename decltype(storage)::type;
    using A = Accumulate<T>;
    constexpr int W = VectorOf<A>::width;
    const A* statistics = static_cast<const A*>(p.statistics);
    auto blend = [&](void* running, const A* values, double factor) {
      T* const to = static_cast<T*>(running);
      auto blended = [&](Vector<A> old, Vector<A> value) {
        return old + A(momentum) * (value * A(factor) - old);
      };
      int64_t c = 0;
      for (; c + W <= p.c; c += W) store(to + c, blended(load(to + c), load(values + c)));
      const int rest = int(p.c - c);
      if (rest) store(to + c, blended(load(to + c, rest), load(values + c, rest)), rest);
    };
    blend(p.running_mean, statistics, 1);
    blend(p.running_var, statistics + p.c, unbiased);
  });
}

}  // namespace gankernels::GK_ISA
