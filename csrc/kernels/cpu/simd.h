// Vectors as wide as a register of the instruction set that this file is compiled for, on GCC's
// vector extensions. The verbs are Highway's: load and store, promote and demote, stream.
// Everything is in an unnamed namespace: see the note in batch_norm_leaky_relu_math.h.
#pragma once

#if defined(__AVX2__)
#include <immintrin.h>
#else
#include <emmintrin.h>
#endif

#include <cstdint>
#include <cstring>

#include "../common.h"

// For functions that must be inlined into a loop. Without it GCC calls some of them.
#define GK_INLINE inline __attribute__((always_inline))
// Unrolls a loop completely, which keeps the arrays of vectors that it indexes in registers.
#define GK_UNROLL _Pragma("GCC unroll 8")

namespace gankernels {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};
// BFloat16 on a CPU that rounds to it in one instruction (AVX512_BF16), which flushes subnormal
// numbers to zero. It deserves a separate type because half-precision kernels are bound by
// instructions, not by memory, and rounding in software takes eight of some sixteen instructions.
struct NativeBFloat16 {
  uint16_t bits;
};

template <typename A>
struct VectorOf {
  static constexpr int width = kVectorBytes / sizeof(A);
  typedef A type __attribute__((vector_size(kVectorBytes)));
};
template <typename A>
using Vector = typename VectorOf<A>::type;

constexpr int kFloats = kVectorBytes / 4;
typedef uint16_t HalfBits __attribute__((vector_size(kFloats * 2)));
typedef uint32_t FloatBits __attribute__((vector_size(kVectorBytes)));
typedef int32_t FloatMask __attribute__((vector_size(kVectorBytes)));

// ---- conversions of a whole register -----------------------------------------------------------

// The same as __builtin_convertvector, for which GCC 12 takes five instructions.
GK_INLINE FloatBits extend(HalfBits v) {
#if defined(__AVX512F__)
  return (FloatBits)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)v);
#elif defined(__AVX2__)
  return (FloatBits)_mm256_cvtepu16_epi32((__m128i)v);
#else
  return __builtin_convertvector(v, FloatBits);
#endif
}

GK_INLINE Vector<float> promote(HalfBits v, BFloat16*) { return (Vector<float>)(extend(v) << 16); }

GK_INLINE HalfBits demote(Vector<float> v, BFloat16*) {
  const FloatBits bits = (FloatBits)v;
  const FloatBits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
  const FloatBits result = (FloatMask)(v == v) ? rounded : FloatBits{} + 0x7fc0;
  return __builtin_convertvector(result, HalfBits);
}

GK_INLINE Vector<float> promote(HalfBits v, NativeBFloat16*) {
  return promote(v, (BFloat16*)nullptr);
}

#if defined(__AVX512F__)
inline bool has_native_bfloat16() { return __builtin_cpu_supports("avx512bf16"); }

// In assembly, because the rest of this file must run on CPUs without the instruction.
GK_INLINE HalfBits demote(Vector<float> v, NativeBFloat16*) {
  HalfBits result;
  asm("vcvtneps2bf16 %1, %0" : "=v"(result) : "v"(v));
  return result;
}
#endif

#if defined(__AVX512F__)
// The masked forms, because GCC 12 warns of the undefined value inside the plain ones.
GK_INLINE Vector<float> promote(HalfBits v, Float16*) {
  return (Vector<float>)_mm512_maskz_cvtph_ps(0xffff, (__m256i)v);
}
GK_INLINE HalfBits demote(Vector<float> v, Float16*) {
  return (HalfBits)_mm512_maskz_cvtps_ph(0xffff, (__m512)v, _MM_FROUND_TO_NEAREST_INT);
}
#elif defined(__AVX2__)
GK_INLINE Vector<float> promote(HalfBits v, Float16*) {
  return (Vector<float>)_mm256_cvtph_ps((__m128i)v);
}
GK_INLINE HalfBits demote(Vector<float> v, Float16*) {
  return (HalfBits)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
}
#else
GK_INLINE Vector<float> promote(HalfBits v, Float16*) {
  const FloatBits bits = extend(v);
  const FloatBits magnitude = bits & 0x7fff;
  // Shift exponent and mantissa into place, then let a multiplication by 2^112 move the exponent's
  // bias: it handles subnormal halves too. Infinity and NaN get the full exponent.
  const Vector<float> scaled = (Vector<float>)(magnitude << 13) * 0x1p112f;
  const FloatBits special = (FloatBits)(magnitude >= 0x7c00) & 0x7f800000u;
  return (Vector<float>)((FloatBits)scaled | special | ((bits & 0x8000) << 16));
}
GK_INLINE HalfBits demote(Vector<float> v, Float16*) {
  const FloatBits bits = (FloatBits)v;
  const FloatBits sign = (bits >> 16) & 0x8000;
  const FloatBits magnitude = bits & 0x7fffffff;
  const FloatBits normal = (magnitude - 0x38000000u + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  // A subnormal half is a multiple of 2^-24: adding 0.5 lets the adder round to that multiple.
  const FloatBits subnormal = (FloatBits)((Vector<float>)magnitude + 0.5f) - 0x3f000000u;
  FloatBits half = (FloatBits)((FloatMask)magnitude < 0x38800000) & subnormal;
  half |= ~(FloatBits)((FloatMask)magnitude < 0x38800000) & normal;
  half = (FloatMask)magnitude >= 0x477ff000 ? FloatBits{} + 0x7c00 : half;  // rounds to infinity
  half = (FloatMask)(v == v) ? half : FloatBits{} + 0x7e00;
  return __builtin_convertvector(half | sign, HalfBits);
}
#endif

// ---- loads and stores --------------------------------------------------------------------------

GK_INLINE Vector<float> load(const float* p) {
  Vector<float> v;
  memcpy(&v, p, sizeof v);
  return v;
}
GK_INLINE Vector<double> load(const double* p) {
  Vector<double> v;
  memcpy(&v, p, sizeof v);
  return v;
}
template <typename T>
GK_INLINE Vector<float> load(const T* p) {
  HalfBits v;
  memcpy(&v, p, sizeof v);
  return promote(v, (T*)nullptr);
}

GK_INLINE void store(float* p, Vector<float> v) { memcpy(p, &v, sizeof v); }
GK_INLINE void store(double* p, Vector<double> v) { memcpy(p, &v, sizeof v); }
template <typename T>
GK_INLINE void store(T* p, Vector<float> v) {
  const HalfBits bits = demote(v, (T*)nullptr);
  memcpy(p, &bits, sizeof bits);
}

// Copies as many bytes as one register holds.
template <typename T>
GK_INLINE void copy_vector(T* to, const T* from) {
  typedef uint8_t Bytes __attribute__((vector_size(kVectorBytes)));
  Bytes bytes;
  memcpy(&bytes, from, sizeof bytes);
  memcpy(to, &bytes, sizeof bytes);
}

// Loads the first `count` lanes and sets the others to zero; stores the first `count` lanes.
// 0 < count < width.
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
GK_INLINE Vector<float> load(const float* p, int count) {
  return (Vector<float>)_mm512_maskz_loadu_ps((__mmask16)((1u << count) - 1), p);
}
GK_INLINE Vector<double> load(const double* p, int count) {
  return (Vector<double>)_mm512_maskz_loadu_pd((__mmask8)((1u << count) - 1), p);
}
template <typename T>
GK_INLINE Vector<float> load(const T* p, int count) {
  return promote((HalfBits)_mm256_maskz_loadu_epi16((__mmask16)((1u << count) - 1), p),
                 (T*)nullptr);
}
GK_INLINE void store(float* p, Vector<float> v, int count) {
  _mm512_mask_storeu_ps(p, (__mmask16)((1u << count) - 1), (__m512)v);
}
GK_INLINE void store(double* p, Vector<double> v, int count) {
  _mm512_mask_storeu_pd(p, (__mmask8)((1u << count) - 1), (__m512d)v);
}
template <typename T>
GK_INLINE void store(T* p, Vector<float> v, int count) {
  _mm256_mask_storeu_epi16(p, (__mmask16)((1u << count) - 1), (__m256i)demote(v, (T*)nullptr));
}
#else
template <typename T>
GK_INLINE Vector<Accumulate<T>> load(const T* p, int count) {
  T lanes[VectorOf<Accumulate<T>>::width] = {};
  for (int i = 0; i < count; ++i) lanes[i] = p[i];
  return load(lanes);
}
template <typename T>
GK_INLINE void store(T* p, Vector<Accumulate<T>> v, int count) {
  T lanes[VectorOf<Accumulate<T>>::width];
  store(lanes, v);
  for (int i = 0; i < count; ++i) p[i] = lanes[i];
}
#endif

// Non-temporal stores, which bypass the caches: for results too large to stay cached. p is a
// multiple of the bytes that one vector takes in memory. Lines should be written completely: a
// partly written line costs more than it saves.
GK_INLINE void stream(float* p, Vector<float> v) {
#if defined(__AVX512F__)
  _mm512_stream_ps(p, (__m512)v);
#elif defined(__AVX2__)
  _mm256_stream_ps(p, (__m256)v);
#else
  store(p, v);
#endif
}
GK_INLINE void stream(double* p, Vector<double> v) {
#if defined(__AVX512F__)
  _mm512_stream_pd(p, (__m512d)v);
#elif defined(__AVX2__)
  _mm256_stream_pd(p, (__m256d)v);
#else
  store(p, v);
#endif
}
template <typename T>
GK_INLINE void stream(T* p, Vector<float> v) {
#if defined(__AVX512F__)
  _mm256_stream_si256((__m256i*)p, (__m256i)demote(v, (T*)nullptr));
#elif defined(__AVX2__)
  _mm_stream_si128((__m128i*)p, (__m128i)demote(v, (T*)nullptr));
#else
  store(p, v);
#endif
}

// Prefetches a line into the L2 cache. The hardware prefetcher alone keeps too few lines in flight:
// reading far ahead, and into L2, which has room for more of them than L1, was measured to shorten
// a reduction over two tensors by 40 %.
constexpr int64_t kAheadBytes = 16 << 10;
template <typename T>
GK_INLINE void prefetch(const T* p) {
  __builtin_prefetch(p, 0, 2);
}

// ---- helpers -----------------------------------------------------------------------------------

// v in the first `count` lanes, zero in the others.
template <typename A>
GK_INLINE Vector<A> keep_first(Vector<A> v, int count) {
  static constexpr A kLanes[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return load(kLanes) < A(count) ? v : Vector<A>{};
}

// GCC's vectors have no square root. Masked forms avoid the warning mentioned above.
GK_INLINE Vector<float> square_root(Vector<float> v) {
#if defined(__AVX512F__)
  return (Vector<float>)_mm512_maskz_sqrt_ps(0xffff, (__m512)v);
#elif defined(__AVX2__)
  return (Vector<float>)_mm256_sqrt_ps((__m256)v);
#else
  return (Vector<float>)_mm_sqrt_ps((__m128)v);
#endif
}
GK_INLINE Vector<double> square_root(Vector<double> v) {
#if defined(__AVX512F__)
  return (Vector<double>)_mm512_maskz_sqrt_pd(0xff, (__m512d)v);
#elif defined(__AVX2__)
  return (Vector<double>)_mm256_sqrt_pd((__m256d)v);
#else
  return (Vector<double>)_mm_sqrt_pd((__m128d)v);
#endif
}

// The sum of the lanes, in a fixed order.
template <typename A>
GK_INLINE double sum_lanes(Vector<A> v) {
  double sums[VectorOf<A>::width];
  for (int i = 0; i < VectorOf<A>::width; ++i) sums[i] = double(v[i]);
  for (int half = VectorOf<A>::width / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) sums[i] += sums[i + half];
  }
  return sums[0];
}

template <typename T>
struct Type {
  using type = T;
};

// Calls body(Type<T>()) with the type T in which elements of this dtype are stored.
template <typename Body>
void with_type(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::kFloat32:
      return body(Type<float>());
    case DType::kFloat64:
      return body(Type<double>());
    case DType::kFloat16:
      return body(Type<Float16>());
    case DType::kBFloat16:
#if defined(__AVX512F__)
      if (has_native_bfloat16()) return body(Type<NativeBFloat16>());
#endif
      return body(Type<BFloat16>());
  }
}

template <typename I>
GK_INLINE I minimum(I a, I b) {
  return a < b ? a : b;
}
template <typename I>
GK_INLINE I maximum(I a, I b) {
  return a > b ? a : b;
}

}  // namespace
}  // namespace gankernels
