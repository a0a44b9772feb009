// Elements in memory: conversion to and from the accumulation type, accesses of up to 16 bytes, and
// arrays whose type is known at run time only.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../common.h"

namespace gankernels::cuda {

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
__device__ inline __half element<__half, double>(double v) {
  return __double2half(v);
}
template <>
__device__ inline __nv_bfloat16 element<__nv_bfloat16, float>(float v) {
  return __float2bfloat16_rn(v);
}
template <>
__device__ inline __nv_bfloat16 element<__nv_bfloat16, double>(double v) {
  return __double2bfloat16(v);
}

// V neighboring elements, read and written in one access, whose address must be a multiple of the
// access's size.
template <typename T, int V>
struct alignas(sizeof(T) * V) Vector {
  T values[V];
};

// The type of one access of the hardware.
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

// Writes to global memory, because __stwb is st.global. For shared memory: store_shared().
template <int V, typename T>
__device__ inline void store(T* to, const Vector<T, V>& vector) {
  using Word = typename WordOf<V * sizeof(T)>::type;
  Word word;
  memcpy(&word, &vector, sizeof(Word));
  // nvcc compiled a plain assignment to one store per element.
  __stwb(reinterpret_cast<Word*>(to), word);
}

template <int V, typename T>
__device__ inline void store_shared(T* to, const Vector<T, V>& vector) {
  using Word = typename WordOf<V * sizeof(T)>::type;
  Word word;
  memcpy(&word, &vector, sizeof(Word));
  *reinterpret_cast<Word*>(to) = word;
}

// A type as a value, for generic lambdas: `using T = typename decltype(type)::type`.
template <typename T>
struct Type {
  using type = T;
};

// Calls f with the Type of `dtype`, which must be one that is computed in A.
#pragma nv_exec_check_disable
template <typename A, typename F>
GK_HOST_DEVICE inline auto with_type_in(DType dtype, const F& f) {
  if constexpr (std::is_same_v<A, double>) {
    return f(Type<double>{});
  } else {
    if (dtype == DType::kFloat32) return f(Type<float>{});
    if (dtype == DType::kBFloat16) return f(Type<__nv_bfloat16>{});
    return f(Type<__half>{});
  }
}

// Calls f with the Type of `dtype`.
#pragma nv_exec_check_disable
template <typename F>
GK_HOST_DEVICE inline auto with_type(DType dtype, const F& f) {
  if (dtype == DType::kFloat64) return f(Type<double>{});
  return with_type_in<float>(dtype, f);
}

// Element `i` of an array whose type is known at run time: one value per channel, not per element.
template <typename A>
__device__ inline A load_as(const void* array, DType dtype, int64_t i) {
  return with_type(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    return static_cast<A>(accumulator(static_cast<const T*>(array)[i]));
  });
}

__device__ inline void store_as(double value, void* array, DType dtype, int64_t i) {
  with_type(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    static_cast<T*>(array)[i] = element<T>(value);
  });
}

}  // namespace gankernels::cuda
