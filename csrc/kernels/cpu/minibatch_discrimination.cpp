// minibatch_discrimination on the CPU. Compiled once per instruction set, into the namespace
// GK_ISA.
//
// The kernels b are independent problems, so the lanes of a vector are neighbouring b: distances
// need no horizontal sum, and per vector and pair i < j there are two additions and an absolute
// value for every c. m is packed into panels of one vector's width of b, ordered [sample][c][lane].
// A tile of few samples by few samples keeps its distances in registers; blocks of samples keep a
// pair of them in a core's L2 cache.
//
// Where fewer b are left than a vector has lanes, the panel puts several samples side by side, in
// `slots` of the vector: a row of the panel is then a group of samples, and two groups meet once
// for every rotation of one of them against the other.
//
// Threads take panels each for itself. Those that are left over they share. Both samples of a pair
// receive from it, so they must not share a sample: in round r, block i meets block (r - i) mod K.
// With K odd, every round pairs off all blocks, and the one left over meets itself, so that K
// rounds see every pair once. That also fixes the order of all sums. Each meeting sums into buffers
// of its own, at most kMostRows terms, before they are added to the totals, which keeps the
// rounding errors of long sums small.
#include "../minibatch_discrimination.h"

#include <type_traits>

#include "exp.h"
#include "simd.h"

namespace gankernels::GK_ISA {
namespace {

constexpr int64_t kBlockBytes = 384 << 10;            // of one block's inputs and results
constexpr int64_t kFewestRows = 16, kMostRows = 128;  // of a block; multiples of every tile
// Below this many element operations, pairs times c, a second thread costs more than it saves.
constexpr int64_t kSerial = 1 << 17;

template <typename Body>
void parallel(const CpuThreads& threads, int64_t tasks, const Body& body) {
  if (threads.count <= 1 || tasks <= 1) return body(int64_t(0), tasks);
  auto call = [](int64_t begin, int64_t end, void* context) {
    (*static_cast<const Body*>(context))(begin, end);
  };
  threads.run(tasks, call, const_cast<Body*>(&body));
}

// ---- one vector ------------------------------------------------------------------------------

template <typename A, typename V = Vector<A>>
GK_INLINE V magnitude(V d) {
  return (V)((ExpBits<A>)d & ~(ExpBits<A>)-V{});
}

// 1, but the compiler does not know: a * one - b becomes a fused multiply-add, on CPUs that run
// these beside additions (AMD's do). On others it costs no more than the subtraction.
template <typename A>
GK_INLINE Vector<A> opaque_one() {
  Vector<A> one = Vector<A>{} + A(1);
  asm("" : "+x"(one));
  return one;
}

// w where d > 0, -w where d < 0, 0 where d = 0.
template <typename A, typename V = Vector<A>>
GK_INLINE V with_sign_of(V d, V w) {
#if defined(__AVX512F__)
  constexpr int kXorAnd = 0x78;  // w ^ (d & minus)
  const ExpBits<A> minus = (ExpBits<A>)-V{};
  if (sizeof(A) == 4) {
    return (V)_mm512_maskz_ternarylogic_epi32(
        _mm512_cmp_ps_mask((__m512)d, (__m512)V{}, _CMP_NEQ_UQ), (__m512i)w, (__m512i)d,
        (__m512i)minus, kXorAnd);
  }
  return (V)_mm512_maskz_ternarylogic_epi64(
      _mm512_cmp_pd_mask((__m512d)d, (__m512d)V{}, _CMP_NEQ_UQ), (__m512i)w, (__m512i)d,
      (__m512i)minus, kXorAnd);
#else
  const V signed_w = (V)((ExpBits<A>)w ^ ((ExpBits<A>)d & (ExpBits<A>)-V{}));
  return d != 0 ? signed_w : V{};
#endif
}

// ---- tiles -----------------------------------------------------------------------------------

// Consecutive rows of a panel. x, v and grads are [row][c][lane], g and sums [row][lane].
template <typename A>
struct Rows {
  const A *x, *v, *g;
  A* sums;   // forward: of e; double backward: of -e s
  A* grads;  // of the weighted signs
};

template <int kDerivative>
constexpr int tile_rows() {
#if defined(__AVX512F__)
  return kDerivative == 2 ? 2 : 4;
#else
  return 2;
#endif
}
template <int kDerivative>
constexpr int tile_columns() {
#if defined(__AVX512F__)
  return 4;
#else
  return kDerivative == 0 ? 4 : 2;
#endif
}

template <typename A>
struct Kernel {
  using V = Vector<A>;
  static constexpr int W = VectorOf<A>::width;

  int64_t c;
  bool want_grads;

  Rows<A> advance(const Rows<A>& rows, int64_t count) const {
    const int64_t matrix = count * c * W;
    return {rows.x + matrix, rows.v ? rows.v + matrix : nullptr,
            rows.g ? rows.g + count * W : nullptr, rows.sums + count * W,
            rows.grads ? rows.grads + matrix : nullptr};
  }

  // I rows meet J others.
  template <int D, int I, int J>
  GK_INLINE void tile(const Rows<A>& a, const Rows<A>& b) const {
    const int64_t row = c * W;
    const V one = opaque_one<A>();
    V w[I][J], s[I][J];  // distances, then weights
    GK_UNROLL for (int i = 0; i < I; ++i) {
      GK_UNROLL for (int j = 0; j < J; ++j) w[i][j] = s[i][j] = V{};
    }
    for (int64_t k = 0; k < row; k += W) {
      V xb[J], vb[J];
      GK_UNROLL for (int j = 0; j < J; ++j) {
        xb[j] = load(b.x + j * row + k);
        if (D == 2) vb[j] = load(b.v + j * row + k);
      }
      GK_UNROLL for (int i = 0; i < I; ++i) {
        const V xa = load(a.x + i * row + k);
        const V va = D == 2 ? load(a.v + i * row + k) : V{};
        GK_UNROLL for (int j = 0; j < J; ++j) {
          const V d = xa * one - xb[j];
          w[i][j] += magnitude<A>(d);
          if (D == 2) s[i][j] += with_sign_of<A>(d, va - vb[j]);
        }
      }
    }
    GK_UNROLL for (int i = 0; i < I; ++i) {
      GK_UNROLL for (int j = 0; j < J; ++j) {
        w[i][j] = exp_of_minus<A>(w[i][j]);
        if (D == 2) w[i][j] = -w[i][j] * s[i][j];
      }
    }
    if (D != 1) {
      GK_UNROLL for (int i = 0; i < I; ++i) {
        V sum = load(a.sums + i * W);
        GK_UNROLL for (int j = 0; j < J; ++j) sum += w[i][j];
        store(a.sums + i * W, sum);
      }
      GK_UNROLL for (int j = 0; j < J; ++j) {
        V sum = load(b.sums + j * W);
        GK_UNROLL for (int i = 0; i < I; ++i) sum += w[i][j];
        store(b.sums + j * W, sum);
      }
    }
    if (D == 0 || (D == 2 && !want_grads)) return;
    GK_UNROLL for (int i = 0; i < I; ++i) {
      GK_UNROLL for (int j = 0; j < J; ++j) w[i][j] *= load(a.g + i * W) + load(b.g + j * W);
    }
    for (int64_t k = 0; k < row; k += W) {
      V xb[J], gb[J];
      GK_UNROLL for (int j = 0; j < J; ++j) {
        xb[j] = load(b.x + j * row + k);
        gb[j] = load(b.grads + j * row + k);
      }
      GK_UNROLL for (int i = 0; i < I; ++i) {
        const V xa = load(a.x + i * row + k);
        V ga = load(a.grads + i * row + k);
        GK_UNROLL for (int j = 0; j < J; ++j) {
          const V t = with_sign_of<A>(xa - xb[j], w[i][j]);
          ga -= t;
          gb[j] = t * one + gb[j];
        }
        store(a.grads + i * row + k, ga);
      }
      GK_UNROLL for (int j = 0; j < J; ++j) store(b.grads + j * row + k, gb[j]);
    }
  }

  // All of `a_count` rows meet all of `b_count` others.
  template <int D>
  void rectangle(Rows<A> a, int64_t a_count, const Rows<A>& b, int64_t b_count) const {
    constexpr int I = tile_rows<D>(), J = tile_columns<D>();
    const int64_t full = b_count / J * J;
    for (; a_count >= I; a_count -= I, a = advance(a, I)) {
      for (int64_t j = 0; j < full; j += J) tile<D, I, J>(a, advance(b, j));
      for (int64_t j = full; j < b_count; ++j) tile<D, I, 1>(a, advance(b, j));
    }
    for (; a_count > 0; --a_count, a = advance(a, 1)) {
      for (int64_t j = 0; j < full; j += J) tile<D, 1, J>(a, advance(b, j));
      for (int64_t j = full; j < b_count; ++j) tile<D, 1, 1>(a, advance(b, j));
    }
  }

  // Row i of `a` meets row j of `b` for all i < j < count.
  template <int D>
  void triangle(const Rows<A>& a, const Rows<A>& b, int64_t count) const {
    constexpr int I = tile_rows<D>();
    for (int64_t i = 0; i < count; i += I) {
      const int64_t next = minimum(i + I, count);
      for (int64_t p = i; p < next; ++p) {
        for (int64_t q = p + 1; q < next; ++q) tile<D, 1, 1>(advance(a, p), advance(b, q));
      }
      rectangle<D>(advance(a, i), next - i, advance(b, next), count - next);
    }
  }
};

// ---- panels ----------------------------------------------------------------------------------

// A tensor (N, B, C) or, with c = 1 and a stride of 0, (N, B).
struct Strided {
  const void* data;
  int64_t n, b, c;  // strides
};

// `slots` samples side by side, `lanes` of b each; row r, slot s is the sample r * slots + s.
struct Panel {
  int64_t b0, lanes, slots, rows;
  int64_t block_rows;
};

// Transposes a square of W vectors: exchanges its off-diagonal quarters, then those of its
// quarters.
template <typename A, int kHalf = VectorOf<A>::width / 2>
GK_INLINE void transpose(Vector<A>* rows) {
  constexpr int W = VectorOf<A>::width;
  ExpBits<A> upper, lower;
  for (int l = 0; l < W; ++l) {
    upper[l] = l & kHalf ? W + l - kHalf : l;
    lower[l] = l & kHalf ? W + l : l + kHalf;
  }
  for (int i = 0; i < W; ++i) {
    if (i & kHalf) continue;
    const Vector<A> a = rows[i], b = rows[i + kHalf];
    rows[i] = __builtin_shuffle(a, b, upper);
    rows[i + kHalf] = __builtin_shuffle(a, b, lower);
  }
  if constexpr (kHalf > 1) transpose<A, kHalf / 2>(rows);
}

// From 1 to W elements; lanes beyond them are zero or left alone.
template <typename T>
GK_INLINE Vector<Accumulate<T>> load_some(const T* p, int64_t stride, int64_t count) {
  constexpr int64_t W = VectorOf<Accumulate<T>>::width;
  if (stride == 1) return count < W ? load(p, int(count)) : load(p);
  Vector<Accumulate<T>> v{};
  for (int64_t i = 0; i < minimum(count, W); ++i) v[i] = load(p + i * stride, 1)[0];
  return v;
}
template <typename T>
GK_INLINE void store_some(T* p, Vector<Accumulate<T>> v, int64_t count) {
  constexpr int64_t W = VectorOf<Accumulate<T>>::width;
  count < W ? store(p, v, int(count)) : store(p, v);
}

// Everything about one call. Buffers are those of a group of panels that are worked on together,
// which bounds the workspace, and one set of block buffers per thread.
template <typename T, int D>
struct Problem {
  using A = Accumulate<T>;
  using V = Vector<A>;
  static constexpr int W = VectorOf<A>::width;

  int64_t n, b, c, threads;
  Strided m, grad_o, grad_grad_m;
  T *out_sums = nullptr, *out_grads = nullptr;
  bool want_grads = D > 0;

  int64_t panels;              // in all
  int64_t whole;               // of which threads take one each at a time; they share the others
  int64_t group;               // panels that are in memory together
  int64_t blocks, block_rows;  // of every panel; what a thread's buffers hold
  A *x = nullptr, *v = nullptr, *g = nullptr, *sums = nullptr, *grads = nullptr, *own = nullptr;
  int64_t bytes = 0;

  Problem(const MinibatchDiscrimination& p, int64_t thread_count)
      : n(p.n), b(p.b), c(p.c), threads(thread_count) {
    m = {p.m, p.m_strides[0], p.m_strides[1], p.m_strides[2]};
    if (double(n) * double(n - 1) / 2 * double(b) * double(c) < kSerial) threads = 1;
    panels = divide_up(b, W);
    // At most twice m's bytes, unless a single panel takes more already.
    constexpr int64_t kTensors = D + 1;
    int64_t fit = 2 * panels * int64_t(sizeof(T)) / (kTensors * int64_t(sizeof(A)));
    fit = maximum<int64_t>(1, minimum(fit, panels));
    whole = threads <= fit ? panels / threads * threads : 0;

    const int64_t row_bytes = maximum<int64_t>(1, c * W * int64_t(sizeof(A)) * kTensors);
    const int64_t most = maximum(kFewestRows, minimum(kMostRows, kBlockBytes / row_bytes));
    blocks = divide_up(n, most);
    if (whole < panels && panels < 2 * threads) {
      // Enough pairs of blocks for all threads, where there are enough samples for it.
      const int64_t shared = minimum(fit, panels - whole);
      blocks = maximum(blocks, minimum(divide_up(4 * threads, shared), n / kFewestRows));
    }
    blocks |= 1;
    block_rows = rows_of_block(n);
    if (blocks == 1) whole = panels;
    group = maximum(minimum(whole, threads), minimum(fit, panels - whole));
  }

  Panel panel(int64_t index) const {
    const int64_t b0 = index * W, lanes = minimum<int64_t>(W, b - b0), slots = W / lanes;
    const int64_t rows = divide_up(n, slots);
    return {b0, lanes, slots, rows, rows_of_block(rows)};
  }

  int64_t rows_of_block(int64_t rows) const { return divide_up(divide_up(rows, blocks), 4) * 4; }

  // Divides the scratch memory.
  void place(char* scratch) {
    bytes = 0;
    auto take = [&](A*& pointer, bool wanted, int64_t elements) {
      if (!wanted) return;
      pointer = reinterpret_cast<A*>(scratch + bytes);
      bytes += divide_up(elements * int64_t(sizeof(A)), 64) * 64;
    };
    take(x, true, group * n * c * W);
    take(v, D == 2, group * n * c * W);
    take(g, D > 0, group * n * W);
    take(sums, D != 1, group * n * W);
    take(grads, D > 0, group * n * c * W);
    take(own, true, threads * own_size());
  }

  // A thread's buffers: the results of both blocks, then what is rotated of one of them.
  int64_t own_size() const {
    const int64_t matrix = block_rows * c * W, vectors = block_rows * W;
    return 2 * (vectors + (D > 0 ? matrix : 0)) + (D + 1) * matrix + vectors;
  }

  // ---- between tensors and panels

  // The samples' elements (b0 ... b0 + lanes, all c) of one row of a panel. Where c is 1, or has no
  // part as in grad_o, the lanes lie in one vector; else every one of them lies in vectors of c.
  void pack(const Strided& from, int64_t width, const Panel& panel, int64_t row, A padding,
            A* to) const {
    const int64_t samples = minimum(panel.slots, n - row * panel.slots);
    const T* in = static_cast<const T*>(from.data) + row * panel.slots * from.n + panel.b0 * from.b;
    if (width == 1) {
      V v = load_some(in, from.b, panel.lanes);
      if (panel.slots > 1) {
        v = V{} + padding;
        for (int64_t l = 0; l < samples * panel.lanes; ++l) {
          v[l] = load(in + l / panel.lanes * from.n + l % panel.lanes * from.b, 1)[0];
        }
      }
      return store(to, v);
    }
    for (int64_t k0 = 0; k0 < width; k0 += W) {
      const int64_t count = minimum<int64_t>(W, width - k0);
      V rows[W];
      for (int l = 0; l < W; ++l) rows[l] = V{} + padding;
      for (int64_t slot = 0, l = 0; slot < samples; ++slot) {
        for (int64_t lane = 0; lane < panel.lanes; ++lane, ++l) {
          rows[l] = load_some(in + slot * from.n + lane * from.b + k0 * from.c, from.c, count);
        }
      }
      transpose<A>(rows);
      for (int64_t k = 0; k < count; ++k) store(to + (k0 + k) * W, rows[k]);
    }
  }

  void unpack(const A* from, int64_t width, const Panel& panel, int64_t row, T* to) const {
    const int64_t samples = minimum(panel.slots, n - row * panel.slots);
    T* out = to + (row * panel.slots * b + panel.b0) * width;
    if (width == 1) {
      const V v = load(from);
      if (panel.slots == 1) return store_some(out, v, panel.lanes);
      for (int64_t l = 0; l < samples * panel.lanes; ++l) {
        store(out + l / panel.lanes * b + l % panel.lanes, V{} + v[l], 1);
      }
      return;
    }
    for (int64_t k0 = 0; k0 < width; k0 += W) {
      const int64_t count = minimum<int64_t>(W, width - k0);
      V rows[W];
      for (int k = 0; k < W; ++k) rows[k] = k < count ? load(from + (k0 + k) * W) : V{};
      transpose<A>(rows);
      for (int64_t slot = 0, l = 0; slot < samples; ++slot) {
        for (int64_t lane = 0; lane < panel.lanes; ++lane, ++l) {
          store_some(out + (slot * b + lane) * width + k0, rows[l], count);
        }
      }
    }
  }

  // ---- one meeting of two blocks of a panel

  // Lane l is to come from lane (l + shift) % used; those from `used` on stay where they are.
  static ExpBits<A> rotation(int64_t shift, int64_t used) {
    ExpBits<A> from;
    for (int l = 0; l < W; ++l) from[l] = l < used ? (l + shift) % used : l;
    return from;
  }
  static void rotate(A* to, const A* from, int64_t count, ExpBits<A> lanes) {
    for (int64_t i = 0; i < count * W; i += W) {
      store(to + i, (V)__builtin_shuffle(load(from + i), lanes));
    }
  }
  static void add_rotated(A* to, const A* from, int64_t count, ExpBits<A> lanes) {
    for (int64_t i = 0; i < count * W; i += W) {
      store(to + i, load(to + i) + (V)__builtin_shuffle(load(from + i), lanes));
    }
  }
  static void clear(A* p, int64_t elements) { memset(p, 0, elements * sizeof(A)); }

  void meet(const Panel& panel, int64_t slice, int64_t i, int64_t j, A* own_buffers) const {
    const int64_t i0 = i * panel.block_rows, j0 = j * panel.block_rows;
    const int64_t i_count = minimum(panel.block_rows, panel.rows - i0);
    const int64_t j_count = minimum(panel.block_rows, panel.rows - j0);
    if (i_count <= 0 || j_count <= 0) return;
    const Kernel<A> kernel{c, want_grads};
    const int64_t matrix = block_rows * c * W, vectors = block_rows * W;
    const int64_t at = slice * n * W, used = panel.lanes * panel.slots;
    auto block = [&](int64_t first, A* results) {
      return Rows<A>{x + (at + first * W) * c, D == 2 ? v + (at + first * W) * c : nullptr,
                     D > 0 ? g + at + first * W : nullptr, results, results + vectors};
    };
    const int64_t results = vectors + (D > 0 ? matrix : 0);
    A* rotated = own_buffers + 2 * results;
    const Rows<A> a = block(i0, own_buffers), straight = block(j0, own_buffers + results);
    auto start = [&](const Rows<A>& rows, int64_t count) {
      if (D != 1) clear(rows.sums, count * W);
      if (want_grads) clear(rows.grads, count * c * W);
    };
    auto add = [&](const Rows<A>& rows, int64_t first, int64_t count, ExpBits<A> lanes) {
      if (D != 1) add_rotated(sums + at + first * W, rows.sums, count, lanes);
      if (want_grads) add_rotated(grads + (at + first * W) * c, rows.grads, count * c, lanes);
    };

    start(a, i_count);
    for (int64_t slot = 0; slot < panel.slots; ++slot) {
      Rows<A> other = straight;
      if (slot > 0) {
        const ExpBits<A> lanes = rotation(slot * panel.lanes, used);
        rotate(rotated, straight.x, j_count * c, lanes);
        other.x = rotated;
        if (D == 2) {
          rotate(rotated + matrix, straight.v, j_count * c, lanes);
          other.v = rotated + matrix;
        }
        if (D > 0) {
          rotate(rotated + D * matrix, straight.g, j_count, lanes);
          other.g = rotated + D * matrix;
        }
      }
      start(other, j_count);
      if (i != j) {
        kernel.template rectangle<D>(a, i_count, other, j_count);
      } else {
        kernel.template triangle<D>(a, other, i_count);
      }
      add(other, j0, j_count, rotation(used - slot * panel.lanes, used));
      if (i == j && slot > 0) {
        // Within a group, all rotations show every pair from both sides, so the results of `other`
        // are left where they are.
        for (int64_t row = 0; row < i_count; ++row) {
          kernel.template tile<D, 1, 1>(kernel.advance(a, row), kernel.advance(other, row));
        }
      }
    }
    add(a, i0, i_count, rotation(0, used));
  }

  // ---- all of it

  void run(CpuThreads pool) const {
    if (n == 1 || c == 0) return without_distances();
    pool.count = threads;
    // Most panels are taken through all steps by one thread, in memory that stays in its cache.
    const int64_t takers = minimum(whole, threads);
    parallel(pool, takers, [&](int64_t begin, int64_t end) {
      for (int64_t thread = begin; thread < end; ++thread) {
        const int64_t stop = whole * (thread + 1) / takers;
        for (int64_t index = whole * thread / takers; index < stop; ++index) {
          const Panel p = panel(index);
          for (int64_t row = 0; row < p.rows; ++row) prepare(p, row, (thread * n + row) * W);
          for (int64_t i = 0; i < blocks; ++i) {
            for (int64_t j = i; j < blocks; ++j) meet(p, thread, i, j, own + thread * own_size());
          }
          for (int64_t row = 0; row < p.rows; ++row) finish(p, row, (thread * n + row) * W);
        }
      }
    });
    for (int64_t first = whole; first < panels; first += group) {
      share(pool, first, minimum(group, panels - first));
    }
  }

  // Where there are no pairs, or no dimensions to differ in, all distances are zero.
  void without_distances() const {
    const V sum = V{} + (D == 0 ? A(n - 1) : A(0));
    for (int64_t i = 0; out_sums && i < n * b; ++i) store(out_sums + i, sum, 1);
    for (int64_t i = 0; out_grads && i < n * b * c; ++i) store(out_grads + i, V{}, 1);
  }

  // All threads work on the same panels.
  void share(const CpuThreads& pool, int64_t first, int64_t count) const {
    auto all_rows = [&](auto step) {
      parallel(pool, count * n, [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; ++task) {
          const Panel p = panel(first + task / n);
          const int64_t row = task % n;
          if (row < p.rows) step(p, row, task * W);
        }
      });
    };
    all_rows([&](const Panel& p, int64_t row, int64_t at) { prepare(p, row, at); });
    for (int64_t round = 0; round < blocks; ++round) {
      parallel(pool, threads, [&](int64_t begin, int64_t end) {
        for (int64_t thread = begin; thread < end; ++thread) play(first, count, round, thread);
      });
    }
    all_rows([&](const Panel& p, int64_t row, int64_t at) { finish(p, row, at); });
  }

  void prepare(const Panel& p, int64_t row, int64_t at) const {
    // A sample that does not exist is too far away from any other to count.
    constexpr A kFar = sizeof(A) == 8 ? A(0x1.fffffffffffffp1023) : A(0x1.fffffep127f);
    pack(m, c, p, row, kFar, x + at * c);
    if (D == 2) pack(grad_grad_m, c, p, row, 0, v + at * c);
    if (D > 0) pack(grad_o, 1, p, row, 0, g + at);
    if (D != 1) clear(sums + at, W);
    if (want_grads) clear(grads + at * c, c * W);
  }

  void finish(const Panel& p, int64_t row, int64_t at) const {
    if (out_sums) unpack(sums + at, 1, p, row, out_sums);
    if (out_grads) unpack(grads + at * c, c, p, row, out_grads);
  }

  // A thread's share of a round, by weight: a meeting of two blocks counts twice one with itself.
  void play(int64_t first, int64_t count, int64_t round, int64_t thread) const {
    int64_t total = 0, seen = 0;
    for (int64_t slice = 0; slice < count; ++slice) total += panel(first + slice).rows * blocks;
    const int64_t begin = total * thread / threads, end = total * (thread + 1) / threads;
    for (int64_t slice = 0; slice < count; ++slice) {
      const Panel p = panel(first + slice);
      for (int64_t i = 0; i < blocks; ++i) {
        const int64_t j = (round - i + blocks) % blocks;
        if (i > j) continue;
        const int64_t weight = i == j ? p.rows : 2 * p.rows, middle = seen + weight / 2;
        if (middle >= begin && middle < end) meet(p, slice, i, j, own + thread * own_size());
        seen += weight;
      }
    }
  }
};

template <typename T>
Problem<T, 0> problem(const MinibatchDiscriminationForward& p, int64_t threads) {
  Problem<T, 0> problem(p, threads);
  problem.out_sums = static_cast<T*>(p.o);
  return problem;
}

template <typename T>
Problem<T, 1> problem(const MinibatchDiscriminationBackward& p, int64_t threads) {
  Problem<T, 1> problem(p, threads);
  problem.grad_o = {p.grad_o, p.grad_o_strides[0], p.grad_o_strides[1], 0};
  problem.out_grads = static_cast<T*>(p.grad_m);
  return problem;
}

template <typename T>
Problem<T, 2> problem(const MinibatchDiscriminationDoubleBackward& p, int64_t threads) {
  Problem<T, 2> problem(p, threads);
  problem.grad_o = {p.grad_o, p.grad_o_strides[0], p.grad_o_strides[1], 0};
  problem.grad_grad_m = {p.grad_grad_m, p.grad_grad_m_strides[0], p.grad_grad_m_strides[1],
                         p.grad_grad_m_strides[2]};
  problem.out_sums = static_cast<T*>(p.grad_grad_o);
  problem.out_grads = static_cast<T*>(p.grad_m);
  problem.want_grads = p.grad_m;
  return problem;
}

// Calls body with a null pointer to the storage type.
template <typename Body>
auto with_type(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::kFloat64:
      return body((double*)nullptr);
    case DType::kBFloat16:
      return body((BFloat16*)nullptr);
    case DType::kFloat16:
      return body((Float16*)nullptr);
    default:
      return body((float*)nullptr);
  }
}

template <typename Parameters>
void run(const Parameters& p, const CpuThreads& threads) {
  if (p.n == 0 || p.b == 0) return;
  with_type(p.dtype, [&](auto* type) {
    auto all = problem<std::remove_pointer_t<decltype(type)>>(p, threads.count);
    all.place(static_cast<char*>(p.scratch));
    all.run(threads);
  });
}

}  // namespace

int64_t scratch_bytes(const MinibatchDiscrimination& p, const CpuThreads& threads) {
  if (p.n == 0 || p.b == 0) return 0;
  return with_type(p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    auto size = [&](auto problem) {
      problem.place(nullptr);
      return problem.bytes;
    };
    switch (p.derivative) {
      case 0:
        return size(Problem<T, 0>(p, threads.count));
      case 1:
        return size(Problem<T, 1>(p, threads.count));
      default:
        return size(Problem<T, 2>(p, threads.count));
    }
  });
}

void minibatch_discrimination_forward(const MinibatchDiscriminationForward& p,
                                      const CpuThreads& threads) {
  run(p, threads);
}

void minibatch_discrimination_backward(const MinibatchDiscriminationBackward& p,
                                       const CpuThreads& threads) {
  run(p, threads);
}

void minibatch_discrimination_double_backward(const MinibatchDiscriminationDoubleBackward& p,
                                              const CpuThreads& threads) {
  run(p, threads);
}

}  // namespace gankernels::GK_ISA
