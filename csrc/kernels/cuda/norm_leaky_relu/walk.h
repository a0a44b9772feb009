// The elements that a block and a thread of batch_norm_leaky_relu visit, and their order.
#pragma once

#include "../../batch_norm_leaky_relu.h"
#include "../../mutant.h"
#include "../vector.h"

namespace gankernels::cuda::batch_norm_leaky_relu {

// The most positions in a part of a channel: 32 bits hold the number with room to spare.
GK_HOST_DEVICE inline int64_t max_positions() {
  return GK_LIMIT(norm_positions, int64_t{1} << 29, 300);
}

// In a row of (R, C), and with a single channel, both layouts are the same.
GK_HOST_DEVICE inline bool is_channels_last(const BatchNormLeakyReLU& p) {
  return p.c > 1 && (p.channels_last || p.s == 1);
}

// The division of elements among blocks and threads. A channel is a sequence of positions, each
// a vector of V elements: along the channel's runs of s elements in (n, c, s) order, and one row of
// V neighboring channels in channels-last order.
struct Tiling {
  int64_t positions;           // per channel
  int64_t positions_per_part;  // part p starts at p * positions_per_part
  int64_t run;                 // positions that are contiguous in memory; channels-last: 1
  int64_t run_stride;          // elements from the start of one run to that of the next
  int parts;
  int tiles;            // of channels
  int channel_threads;  // neighboring threads over the channels of a tile, a power of two <= 32
  int threads;
};

// One thread's way through a part: `count` positions, the first `begin`, every `stride`-th of which
// it visits, at offset() elements into the tensors. It divides at the start only, and counts in 32
// bits, since a part has at most max_positions(): it never sees the end of a longer run.
template <int V, bool kChannelsLast>
class Walk {
 public:
  __device__ Walk(const Tiling& t, int64_t first_element, int64_t begin, int count, int stride)
      : left_(count), stride_(stride) {
    if constexpr (kChannelsLast) {
      offset_ = first_element + begin * t.run_stride;
      stride_elements_ = stride * t.run_stride;
    } else {
      const int64_t column = begin % t.run;
      offset_ = first_element + begin / t.run * t.run_stride + column * V;
      run_ = static_cast<int>(min(t.run, max_positions()));
      left_in_run_ = static_cast<int>(min(t.run - column, max_positions()));
      stride_in_run_ = stride % run_;
      stride_elements_ = stride / run_ * t.run_stride + stride_in_run_ * V;
      next_run_ = t.run_stride - t.run * V;
    }
  }

  __device__ bool done() const { return left_ <= GK_MUTANT(norm_last_position, 0, 1); }
  __device__ int64_t offset() const { return offset_; }

  __device__ void advance() {
    left_ -= stride_;
    offset_ += stride_elements_;
    if constexpr (!kChannelsLast) {
      left_in_run_ -= stride_in_run_;
      if (left_in_run_ <= 0) {
        left_in_run_ += run_;
        offset_ += next_run_;
      }
    }
  }

 private:
  int64_t offset_, stride_elements_;
  int left_, stride_;
  int64_t next_run_;  // from here on: not in channels-last order
  int run_, left_in_run_, stride_in_run_;
};

// The next positions of a walk, for every input of a pass: all loads are issued before the first of
// their results is needed.
template <typename Op, typename T, int V>
struct Batch {
  static constexpr int kVectors = Op::kBytesInFlight / (V * sizeof(T));
  static constexpr int kUnroll = kVectors < 8 ? kVectors : 8;

  Vector<T, V> in[kUnroll][Op::kInputs];
  int64_t offset[kUnroll];
  int valid;  // positions that exist; the others are zeros

  template <bool kChannelsLast>
  __device__ Batch(Walk<V, kChannelsLast>& walk, const typename Op::Params& p) : valid(0) {
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const bool inside = !walk.done();
      valid += inside;
      offset[u] = walk.offset();
#pragma unroll
      for (int i = 0; i < Op::kInputs; ++i) {
        in[u][i] = {};
        if (inside) in[u][i] = load<V>(static_cast<const T*>(Op::input(p, i)) + offset[u]);
      }
      walk.advance();
    }
  }
};

}  // namespace gankernels::cuda::batch_norm_leaky_relu
