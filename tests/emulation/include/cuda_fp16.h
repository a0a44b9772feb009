// float16 as CUDA's <cuda_fp16.h> has it: IEEE binary16, rounding to nearest even.
#pragma once

#include <stdint.h>
#include <string.h>

struct __half {
  uint16_t bits;
};

namespace emulation {

inline uint32_t float_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}

inline float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

// To float with the last bit set where anything was lost, so that a second rounding is exact.
inline float round_to_odd(double value) {
  const float nearest = static_cast<float>(value);
  const double back = nearest;
  uint32_t bits = float_bits(nearest);
  if (back == value || value != value || (bits & 1u)) return nearest;
  const bool too_large = (back < 0 ? -back : back) > (value < 0 ? -value : value);
  return float_of(too_large ? bits - 1 : bits + 1);
}

}  // namespace emulation

inline float __half2float(__half half) {
  const uint32_t sign = static_cast<uint32_t>(half.bits & 0x8000u) << 16;
  const uint32_t exponent = half.bits >> 10 & 0x1fu, mantissa = half.bits & 0x3ffu;
  if (exponent == 0) {
    const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
    return emulation::float_of(sign | emulation::float_bits(magnitude));
  }
  const uint32_t rebased = exponent == 31 ? 255 : exponent + (127 - 15);
  return emulation::float_of(sign | rebased << 23 | mantissa << 13);
}

inline __half __float2half_rn(float value) {
  uint32_t bits = emulation::float_bits(value);
  const uint32_t sign = bits & 0x80000000u;
  bits ^= sign;
  uint32_t half;
  if (bits >= 0x47800000u) {  // 2^16 and beyond, infinity, NaN
    half = bits > 0x7f800000u ? 0x7fffu : 0x7c00u;
  } else if (bits < 0x38800000u) {  // below 2^-14: adding 0.5 shifts the mantissa and rounds it
    half = emulation::float_bits(emulation::float_of(bits) + 0.5f) - emulation::float_bits(0.5f);
  } else {
    const uint32_t odd = bits >> 13 & 1u;
    half = (bits - ((127u - 15u) << 23) + 0xfffu + odd) >> 13;
  }
  return {static_cast<uint16_t>(half | sign >> 16)};
}

inline __half __double2half(double value) {
  return __float2half_rn(emulation::round_to_odd(value));
}
