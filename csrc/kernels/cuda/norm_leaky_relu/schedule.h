// Divides a pass of batch_norm_leaky_relu among blocks and launches it.
#pragma once

#include <algorithm>

#include "../../batch_norm_leaky_relu.h"
#include "../../mutant.h"
#include "../launch.h"
#include "../reduce.h"
#include "kernel.h"
#include "walk.h"

namespace gankernels::cuda::batch_norm_leaky_relu {

// Blocks that fill a multiprocessor a few times over, so that one straggling block costs little.
constexpr int64_t kBlocksPerMultiprocessor = 8;
// A block that owns whole channels reads at most this many bytes of x. Larger channels are divided
// into parts of half as many.
constexpr int64_t kBytesPerBlock = 64 * 1024;

inline int round_up_to_power_of_two(int64_t value, int limit) {
  int power = 1;
  while (power < value && power < limit) power *= 2;
  return power;
}

// `vector` is the number of elements per access. parts == 1 means kReduceAndApply.
inline Tiling make_tiling(const BatchNormLeakyReLU& p, int vector, int64_t multiprocessors) {
  const bool channels_last = is_channels_last(p);
  const int64_t size = size_of(p.dtype);
  Tiling t = {};
  int64_t tile_channels = 1;
  t.channel_threads = 1;
  if (channels_last) {
    t.positions = p.n * p.s;
    t.run = 1;
    t.run_stride = p.c;
    // The threads that share a row read up to 128 neighboring bytes of it.
    const int limit = static_cast<int>(std::min<int64_t>(kWarp, 128 / (size * vector)));
    t.channel_threads = round_up_to_power_of_two(ceil_div(p.c, vector), limit);
    tile_channels = static_cast<int64_t>(t.channel_threads) * vector;
  } else {
    const bool one_run = p.c == 1;
    t.run = (one_run ? p.n * p.s : p.s) / vector;
    t.positions = one_run ? t.run : p.n * t.run;
    t.run = std::max<int64_t>(1, t.run);  // a divisor
    t.run_stride = p.c * p.s;
  }
  t.tiles = static_cast<int>(ceil_div(p.c, tile_channels));
  const int64_t bytes = p.n * p.s * std::min(p.c, tile_channels) * size;
  int64_t parts = 1;
  if (bytes > kBytesPerBlock) {
    parts = std::min(multiprocessors * kBlocksPerMultiprocessor / t.tiles,
                     ceil_div(bytes, kBytesPerBlock / 2));
  }
  parts =
      std::max({int64_t{1}, std::min(parts, t.positions), ceil_div(t.positions, max_positions())});
  t.positions_per_part = std::max<int64_t>(1, ceil_div(t.positions, parts));
  t.parts = static_cast<int>(std::max<int64_t>(1, ceil_div(t.positions, t.positions_per_part)));
  const int rows = round_up_to_power_of_two(t.positions_per_part, kThreads / t.channel_threads);
  t.threads = std::max(kWarp, t.channel_threads * rows);
  return t;
}

template <typename Op, typename T, int V, bool kChannelsLast>
const char* run(const typename Op::Params& p, void* scratch, int device, cudaStream_t stream) {
  const Tiling tiling = make_tiling(p, V, multiprocessors(device));
  auto* const partials = static_cast<typename Op::Accumulator*>(scratch);
  const auto start = [&](Stage stage, int parts) {
    return launch(kernel<Op, T, V, kChannelsLast>, dim3(tiling.tiles * parts), dim3(tiling.threads),
                  0, stream, p, tiling, partials, stage);
  };

  if (Op::reduces(p) && tiling.parts == 1) return start(Stage::kReduceAndApply, 1);
  if (Op::reduces(p)) {
    if (const char* error = start(Stage::kReduce, tiling.parts)) return error;
  }
  // Without elementwise results, one block per tile is enough for the results per channel.
  return start(Stage::kApply, writes_elements<Op>(p) ? tiling.parts : 1);
}

// The widest access that every tensor's address and the length of its runs allow.
template <typename Op, typename T>
const char* run_widest(const typename Op::Params& p, void* scratch, int device,
                       cudaStream_t stream) {
  uintptr_t addresses = 0;
  for (int i = 0; i < Op::kInputs; ++i) addresses |= reinterpret_cast<uintptr_t>(Op::input(p, i));
  for (int o = 0; o < Op::kOutputs; ++o) addresses |= reinterpret_cast<uintptr_t>(Op::output(p, o));
  const bool channels_last = is_channels_last(p);
  const int64_t run_length = channels_last ? p.c : p.c == 1 ? p.n * p.s : p.s;
  const auto fits = [&](int vector) {
    const bool aligned =
        GK_MUTANT(norm_alignment, addresses % (vector * sizeof(T)) == 0, addresses > 0);
    return run_length % vector == 0 && aligned;
  };
  constexpr int kWidest = 16 / sizeof(T);
  // Channels-last needs coefficients for each element of the vector: 8 of them fill the registers.
  constexpr int kMedium = std::min(kWidest, 4);
  if (channels_last) {
    if (fits(kMedium)) return run<Op, T, kMedium, true>(p, scratch, device, stream);
    return run<Op, T, 1, true>(p, scratch, device, stream);
  }
  if (fits(kWidest)) return run<Op, T, kWidest, false>(p, scratch, device, stream);
  if (kMedium != kWidest && fits(kMedium)) {
    return run<Op, T, kMedium, false>(p, scratch, device, stream);
  }
  return run<Op, T, 1, false>(p, scratch, device, stream);
}

}  // namespace gankernels::cuda::batch_norm_leaky_relu
