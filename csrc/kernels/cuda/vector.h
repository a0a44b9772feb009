// Elements in memory: conversion to and from the type that is computed in, accesses of up to 16
// bytes, and arrays whose type is known at run time only.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

#include "../common.h"

namespace gankernels::cuda {

template <typename T>
struct AccumulatorOf {
  using type = float;
};
template <>
struct AccumulatorOf<double> {
  using type = double;
};

__device__ inline float accumulator(float v) { return v; }
__device__ inline double accumulator(double v) { return v; }
__device__ inline float accumulator(__half v) { return __half2float(v); }
__device__ inline float accumulator(__nv_bfloat16 v) { return __bfloat162float(v); }

// Rounds to nearest, ties to even.
template <typename T, typename A>
__device__ inline T element(A v) {
  return static_cast<T>(v);
}
template <>
__device__ inline __half element<__half, float>(float v) {
  return __float2half_rn(v);
}
template <>
__device__ inline __nv_bfloat16 element<__nv_bfloat16, float>(float v) {
  return __float2bfloat16_rn(v);
}

// V neighbouring elements, read and written in one access; the address must be a multiple of their
// size together.
template <typename T, int V>
struct alignas(sizeof(T) * V) Vector {
  T values[V];
};

// What the hardware moves in one access.
template <int kBytes>
struct WordOf;
template <>
struct WordOf<2> {
  using type = unsigned short;
};
template <>
struct WordOf<4> {
  using type = unsigned int;
};
template <>
struct WordOf<8> {
  using type = uint2;
};
template <>
struct WordOf<16> {
  using type = uint4;
};

template <int V, typename T>
__device__ inline Vector<T, V> load(const T* from) {
  using Word = typename WordOf<V * sizeof(T)>::type;
  const Word word = *reinterpret_cast<const Word*>(from);
  Vector<T, V> vector;
  memcpy(&vector, &word, sizeof(Word));
  return vector;
}

// To global memory, whatever the pointer says: __stwb is st.global. Elsewhere: store_shared().
template <int V, typename T>
__device__ inline void store(T* to, const Vector<T, V>& vector) {
  using Word = typename WordOf<V * sizeof(T)>::type;
  Word word;
  memcpy(&word, &vector, sizeof(Word));
  // A plain assignment was seen torn into one store per element.
  __stwb(reinterpret_cast<Word*>(to), word);
}

template <int V, typename T>
__device__ inline void store_shared(T* to, const Vector<T, V>& vector) {
  using Word = typename WordOf<V * sizeof(T)>::type;
  Word word;
  memcpy(&word, &vector, sizeof(Word));
  *reinterpret_cast<Word*>(to) = word;
}

// Element `i` of an array whose type is known at run time: one value per channel, not per element.
template <typename A>
__device__ inline A load_as(const void* array, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::kFloat32:
      return static_cast<A>(static_cast<const float*>(array)[i]);
    case DType::kFloat64:
      return static_cast<A>(static_cast<const double*>(array)[i]);
    case DType::kBFloat16:
      return static_cast<A>(accumulator(static_cast<const __nv_bfloat16*>(array)[i]));
    case DType::kFloat16:
      return static_cast<A>(accumulator(static_cast<const __half*>(array)[i]));
  }
  return A(0);
}

inline __device__ void store_as(double value, void* array, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::kFloat32:
      static_cast<float*>(array)[i] = static_cast<float>(value);
      break;
    case DType::kFloat64:
      static_cast<double*>(array)[i] = value;
      break;
    case DType::kBFloat16:
      static_cast<__nv_bfloat16*>(array)[i] = __double2bfloat16(value);
      break;
    case DType::kFloat16:
      static_cast<__half*>(array)[i] = __double2half(value);
      break;
  }
}

}  // namespace gankernels::cuda
