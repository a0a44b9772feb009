// Visits every pair of samples once, on all threads.
//
// Each thread takes whole panels, and all threads share the remaining ones. A pair adds to both of
// its samples, so threads that share a panel must not have a sample in common: in round r, block i
// of the samples is paired with block (r - i) mod K. With K odd, every round pairs all blocks, one
// of them with itself, so that K rounds visit every pair once:
//
//   K = 5   round 0:  0-0  1-4  2-3      round 3:  0-3  1-2  4-4
//           round 1:  0-1  2-4  3-3      round 4:  0-4  1-3  2-2
//           round 2:  0-2  1-1  3-4
//
// This also fixes the order of all sums. Each pair of blocks sums at most kMostRows terms in
// separate buffers, which are then added to the totals: this keeps the rounding errors of long sums
// small.
#pragma once

#include "../parallel.h"
#include "panel.h"
#include "tile.h"

namespace gankernels {
namespace {

constexpr int64_t kBlockBytes = 384 << 10;            // one block's inputs and results
constexpr int64_t kFewestRows = 16, kMostRows = 128;  // per block; multiples of every tile
// Below this many element operations, pairs times c, a second thread costs more than it saves.
constexpr int64_t kSerial = 1 << 17;

// The division of the work. D is the order of the derivative.
template <typename T, int D>
struct Plan {
  using A = Accumulate<T>;
  static constexpr int W = VectorOf<A>::width;

  int64_t n, b, c, threads;
  int64_t panels;      // in all
  int64_t whole;       // panels taken by one thread each; all threads share the others
  int64_t group;       // panels that are in memory together, which bounds the workspace
  int64_t blocks;      // per panel
  int64_t block_rows;  // at most

  Plan(int64_t n, int64_t b, int64_t c, int64_t available) : n(n), b(b), c(c), threads(available) {
    if (double(n) * double(n - 1) / 2 * double(b) * double(c) < kSerial) threads = 1;
    panels = ceil_div(b, W);
    // At most twice m's bytes, unless a single panel takes more.
    constexpr int64_t kTensors = D + 1;
    int64_t fit = 2 * panels * int64_t(sizeof(T)) / (kTensors * int64_t(sizeof(A)));
    fit = maximum<int64_t>(1, minimum(fit, panels));
    whole = threads <= fit ? panels / threads * threads : 0;

    const int64_t row_bytes = maximum<int64_t>(1, c * W * int64_t(sizeof(A)) * kTensors);
    const int64_t most = maximum(kFewestRows, minimum(kMostRows, kBlockBytes / row_bytes));
    blocks = ceil_div(n, most);
    if (whole < panels && panels < 2 * threads) {
      // Enough pairs of blocks for all threads, if there are enough samples.
      const int64_t shared = minimum(fit, panels - whole);
      blocks = maximum(blocks, minimum(ceil_div(4 * threads, shared), n / kFewestRows));
    }
    blocks |= 1;
    block_rows = rows_of_block(n);
    if (blocks == 1) whole = panels;
    group = maximum(minimum(whole, threads), minimum(fit, panels - whole));
  }

  Panel panel(int64_t index) const {
    const int64_t b0 = index * W, lanes = minimum<int64_t>(W, b - b0), slots = W / lanes;
    const int64_t rows = ceil_div(n, slots);
    return {b0, lanes, slots, rows, rows_of_block(rows)};
  }

  int64_t rows_of_block(int64_t rows) const { return ceil_div(ceil_div(rows, blocks), 4) * 4; }
};

// Buffers of a pair of blocks: the results of both, and a rotated copy of the second one's inputs.
template <typename A>
struct MeetingBuffers {
  A *a_sums, *a_grads, *b_sums, *b_grads;
  A *x, *v, *g;
};

// The workspace: packed inputs and results of the panels that are in memory together, each of n
// rows, and every thread's buffers.
template <typename T, int D>
struct Workspace {
  using A = Accumulate<T>;

  A *x, *v, *g, *sums, *grads;
  A* meetings;
  int64_t matrix, vectors;  // elements of a block's matrix [row][c][lane] and vectors [row][lane]

  Workspace(const Plan<T, D>& plan, Scratch& scratch)
      : matrix(plan.block_rows * plan.c * Plan<T, D>::W), vectors(plan.block_rows * Plan<T, D>::W) {
    const int64_t rows = plan.group * plan.n * Plan<T, D>::W;
    auto take = [&](bool wanted, int64_t size) { return wanted ? scratch.take<A>(size) : nullptr; };
    x = take(true, rows * plan.c);
    v = take(D == 2, rows * plan.c);
    g = take(D > 0, rows);
    sums = take(D != 1, rows);
    grads = take(D > 0, rows * plan.c);
    meetings = take(true, plan.threads * meeting_size());
  }

  int64_t results_size() const { return vectors + (D > 0 ? matrix : 0); }
  int64_t meeting_size() const { return 2 * results_size() + (D + 1) * matrix + vectors; }

  MeetingBuffers<A> meeting(int64_t thread) const {
    A* const a = meetings + thread * meeting_size();
    A* const b = a + results_size();
    A* const rotated = b + results_size();
    return {a, a + vectors, b, b + vectors, rotated, rotated + matrix, rotated + D * matrix};
  }
};

// ---- rotations of lanes ------------------------------------------------------------------------

// A rotation in which lane l comes from lane (l + shift) % used; lanes from `used` on stay.
template <typename A>
ExpBits<A> rotation(int64_t shift, int64_t used) {
  ExpBits<A> from;
  for (int l = 0; l < VectorOf<A>::width; ++l) from[l] = l < used ? (l + shift) % used : l;
  return from;
}
template <typename A>
void rotate(A* to, const A* from, int64_t vectors, ExpBits<A> lanes) {
  constexpr int W = VectorOf<A>::width;
  for (int64_t i = 0; i < vectors * W; i += W) {
    store(to + i, (Vector<A>)__builtin_shuffle(load(from + i), lanes));
  }
}
template <typename A>
void add_rotated(A* to, const A* from, int64_t vectors, ExpBits<A> lanes) {
  constexpr int W = VectorOf<A>::width;
  for (int64_t i = 0; i < vectors * W; i += W) {
    store(to + i, load(to + i) + (Vector<A>)__builtin_shuffle(load(from + i), lanes));
  }
}

template <typename A>
void clear(A* p, int64_t elements) {
  memset(p, 0, elements * sizeof(A));
}

// ---- all pairs ---------------------------------------------------------------------------------

// Tensors that a derivative does not have, and unwanted results, have null data.
template <typename T>
struct Tensors {
  Strided<const T> m, grad_grad_m, grad_o;
  Strided<T> sums, grads;  // one number per sample and b; of m's shape
};

template <typename T, int D>
class Tournament {
  using A = Accumulate<T>;
  using V = Vector<A>;
  static constexpr int W = VectorOf<A>::width;

 public:
  Tournament(const Plan<T, D>& plan, const Workspace<T, D>& workspace, const Tensors<T>& tensors)
      : plan_(plan),
        work_(workspace),
        tensors_(tensors),
        want_grads_(D > 0 && tensors.grads.data) {}

  void run(CpuThreads pool) const {
    if (plan_.n == 1 || plan_.c == 0) return fill_without_pairs();
    pool.count = plan_.threads;
    // Most panels are taken through all steps by one thread, in memory that stays in its cache.
    const int64_t takers = minimum(plan_.whole, plan_.threads);
    parallel(pool, takers, [&](int64_t begin, int64_t end) {
      for (int64_t thread = begin; thread < end; ++thread) {
        const int64_t stop = plan_.whole * (thread + 1) / takers;
        for (int64_t index = plan_.whole * thread / takers; index < stop; ++index) {
          take_panel(plan_.panel(index), thread);
        }
      }
    });
    for (int64_t first = plan_.whole; first < plan_.panels; first += plan_.group) {
      share_panels(pool, first, minimum(plan_.group, plan_.panels - first));
    }
  }

 private:
  // Without pairs, or without dimensions, all distances are zero.
  void fill_without_pairs() const {
    const V sum = V{} + (D == 0 ? A(plan_.n - 1) : A(0));
    const int64_t size = plan_.n * plan_.b;
    T *const sums = tensors_.sums.data, *const grads = tensors_.grads.data;
    for (int64_t i = 0; sums && i < size; ++i) store(sums + i, sum, 1);
    for (int64_t i = 0; grads && i < size * plan_.c; ++i) store(grads + i, V{}, 1);
  }

  // One thread takes one panel through all steps, at the thread's place in the workspace.
  void take_panel(const Panel& panel, int64_t thread) const {
    const int64_t at = thread * plan_.n * W;
    for (int64_t row = 0; row < panel.rows; ++row) prepare(panel, row, at + row * W);
    for (int64_t i = 0; i < plan_.blocks; ++i) {
      for (int64_t j = i; j < plan_.blocks; ++j) meet(panel, at, i, j, work_.meeting(thread));
    }
    for (int64_t row = 0; row < panel.rows; ++row) finish(panel, row, at + row * W);
  }

  // All threads work on the same panels, in rounds.
  void share_panels(const CpuThreads& pool, int64_t first, int64_t count) const {
    auto for_each_row = [&](auto step) {
      parallel(pool, count * plan_.n, [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; ++task) {
          const Panel panel = plan_.panel(first + task / plan_.n);
          const int64_t row = task % plan_.n;
          if (row < panel.rows) step(panel, row, task * W);
        }
      });
    };
    for_each_row([&](const Panel& p, int64_t row, int64_t at) { prepare(p, row, at); });
    for (int64_t round = 0; round < plan_.blocks; ++round) {
      parallel(pool, plan_.threads, [&](int64_t begin, int64_t end) {
        for (int64_t thread = begin; thread < end; ++thread) play(first, count, round, thread);
      });
    }
    for_each_row([&](const Panel& p, int64_t row, int64_t at) { finish(p, row, at); });
  }

  // A thread's share of a round, by weight: a pair of two blocks counts twice as much as a block
  // with itself.
  void play(int64_t first, int64_t count, int64_t round, int64_t thread) const {
    const int64_t blocks = plan_.blocks, threads = plan_.threads;
    int64_t total = 0, seen = 0;
    for (int64_t slice = 0; slice < count; ++slice) {
      total += plan_.panel(first + slice).rows * blocks;
    }
    const int64_t begin = total * thread / threads, end = total * (thread + 1) / threads;
    for (int64_t slice = 0; slice < count; ++slice) {
      const Panel panel = plan_.panel(first + slice);
      for (int64_t i = 0; i < blocks; ++i) {
        const int64_t j = (round - i + blocks) % blocks;
        if (i > j) continue;
        const int64_t weight = i == j ? panel.rows : 2 * panel.rows, middle = seen + weight / 2;
        if (middle >= begin && middle < end) {
          meet(panel, slice * plan_.n * W, i, j, work_.meeting(thread));
        }
        seen += weight;
      }
    }
  }

  // ---- one row, whose vectors start at element `at` of the workspace, its matrices at `at * c`

  void prepare(const Panel& panel, int64_t row, int64_t at) const {
    // A padding sample is so far from all others that its similarities are zero.
    constexpr A kFar = sizeof(A) == 8 ? A(0x1.fffffffffffffp1023) : A(0x1.fffffep127f);
    const int64_t c = plan_.c;
    pack(tensors_.m, panel, row, kFar, work_.x + at * c);
    if (D == 2) pack(tensors_.grad_grad_m, panel, row, 0, work_.v + at * c);
    if (D > 0) pack(tensors_.grad_o, panel, row, 0, work_.g + at);
    if (D != 1) clear(work_.sums + at, W);
    if (want_grads_) clear(work_.grads + at * c, c * W);
  }

  void finish(const Panel& panel, int64_t row, int64_t at) const {
    if (tensors_.sums.data) unpack(work_.sums + at, panel, row, tensors_.sums);
    if (tensors_.grads.data) unpack(work_.grads + at * plan_.c, panel, row, tensors_.grads);
  }

  // ---- one pair of blocks of a panel

  // Pairs block i of the panel at element `at` of the workspace with block j: every row of `a` with
  // every row of `b`, once for every rotation of b's samples against a's. With three slots:
  //
  //   lanes of a row of a      s0 s0 s0  s1 s1 s1  s2 s2 s2
  //   a row of b, slot 0       t0 t0 t0  t1 t1 t1  t2 t2 t2
  //               slot 1       t1 t1 t1  t2 t2 t2  t0 t0 t0
  //               slot 2       t2 t2 t2  t0 t0 t0  t1 t1 t1
  //
  // The results of b are rotated back when they are added to the totals.
  void meet(const Panel& panel, int64_t at, int64_t i, int64_t j,
            const MeetingBuffers<A>& buffers) const {
    const int64_t c = plan_.c, used = panel.lanes * panel.slots;
    const int64_t i0 = i * panel.block_rows, j0 = j * panel.block_rows;
    const int64_t i_count = minimum(panel.block_rows, panel.rows - i0);
    const int64_t j_count = minimum(panel.block_rows, panel.rows - j0);
    if (i_count <= 0 || j_count <= 0) return;
    const Pairs<A> pairs{c, want_grads_};
    const Rows<A> a = rows(at + i0 * W, buffers.a_sums, buffers.a_grads);
    const Rows<A> b = rows(at + j0 * W, buffers.b_sums, buffers.b_grads);

    clear_results(a, i_count);
    for (int64_t slot = 0; slot < panel.slots; ++slot) {
      const int64_t shift = slot * panel.lanes;
      const Rows<A> turned =
          shift == 0 ? b : rotated(b, j_count, rotation<A>(shift, used), buffers);
      clear_results(turned, j_count);
      if (i != j) {
        pairs.template rectangle<D>(a, i_count, turned, j_count);
      } else {
        pairs.template triangle<D>(a, turned, i_count);
      }
      add_results(turned, at + j0 * W, j_count, rotation<A>(used - shift, used));
      if (i == j && slot > 0) {
        // The samples within a row. Over all rotations each of their pairs is visited from both
        // sides, so the results of the rotated side are dropped here.
        for (int64_t row = 0; row < i_count; ++row) {
          pairs.template tile<D, 1, 1>(pairs.advance(a, row), pairs.advance(turned, row));
        }
      }
    }
    add_results(a, at + i0 * W, i_count, rotation<A>(0, used));
  }

  Rows<A> rows(int64_t at, A* sums, A* grads) const {
    return {work_.x + at * plan_.c, D == 2 ? work_.v + at * plan_.c : nullptr,
            D > 0 ? work_.g + at : nullptr, sums, grads};
  }

  // `count` rows of b with their samples rotated. The results are those of b.
  Rows<A> rotated(const Rows<A>& b, int64_t count, ExpBits<A> lanes,
                  const MeetingBuffers<A>& buffers) const {
    rotate(buffers.x, b.x, count * plan_.c, lanes);
    if (D == 2) rotate(buffers.v, b.v, count * plan_.c, lanes);
    if (D > 0) rotate(buffers.g, b.g, count, lanes);
    return {buffers.x, D == 2 ? buffers.v : nullptr, D > 0 ? buffers.g : nullptr, b.sums, b.grads};
  }

  void clear_results(const Rows<A>& rows, int64_t count) const {
    if (D != 1) clear(rows.sums, count * W);
    if (want_grads_) clear(rows.grads, count * plan_.c * W);
  }

  void add_results(const Rows<A>& rows, int64_t at, int64_t count, ExpBits<A> lanes) const {
    if (D != 1) add_rotated(work_.sums + at, rows.sums, count, lanes);
    if (want_grads_) add_rotated(work_.grads + at * plan_.c, rows.grads, count * plan_.c, lanes);
  }

  const Plan<T, D>& plan_;
  const Workspace<T, D>& work_;
  const Tensors<T>& tensors_;
  const bool want_grads_;
};

}  // namespace
}  // namespace gankernels
