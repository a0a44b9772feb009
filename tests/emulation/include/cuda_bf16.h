// bfloat16 as CUDA's <cuda_bf16.h> has it: the upper half of a float, rounding to nearest even.
#pragma once

#include "cuda_fp16.h"

struct __nv_bfloat16 {
  uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 value) {
  return emulation::float_of(static_cast<uint32_t>(value.bits) << 16);
}

inline __nv_bfloat16 __float2bfloat16_rn(float value) {
  const uint32_t bits = emulation::float_bits(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {0x7fffu};
  return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}

inline __nv_bfloat16 __double2bfloat16(double value) {
  return __float2bfloat16_rn(emulation::round_to_odd(value));
}
