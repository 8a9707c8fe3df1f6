// One virtual vector of 64 bytes, made of the native vectors of the instruction set that this file is compiled for.
// Every sum is taken over the lanes of the virtual vector, so its order does not depend on the instruction set.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__F16C__)
#include <immintrin.h>
#endif

// For the small functions of a loop's body, so that the loop around them is compiled as if they were written there.
#define NORMWISE_INLINE __attribute__((always_inline))

namespace normwise {

#if defined(__AVX512F__)
constexpr int kNative = 64;
#elif defined(__AVX__)
constexpr int kNative = 32;
#else
constexpr int kNative = 16;
#endif

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

// The type in which values of type T are computed with.
template <class T>
using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;

// 16 floats or 8 doubles.
template <class A>
struct Vec {
  static constexpr int lanes = 64 / sizeof(A);
  static constexpr int parts = 64 / kNative;
  static constexpr int per_part = kNative / sizeof(A);
  typedef A Native __attribute__((vector_size(kNative)));
  Native v[parts];

  static Vec all(A a) {
    Vec r;
    for (int i = 0; i < parts; ++i) r.v[i] = Native{} + a;
    return r;
  }
};

#define NORMWISE_OPERATOR(op)                                          \
  template <class A>                                                   \
  inline Vec<A> operator op(const Vec<A>& a, const Vec<A>& b) {        \
    Vec<A> r;                                                          \
    for (int i = 0; i < Vec<A>::parts; ++i) r.v[i] = a.v[i] op b.v[i]; \
    return r;                                                          \
  }
NORMWISE_OPERATOR(+)
NORMWISE_OPERATOR(-)
NORMWISE_OPERATOR(*)
#undef NORMWISE_OPERATOR

// a * b + c, rounded once where the instruction set can.
template <class A>
inline Vec<A> fma(const Vec<A>& a, const Vec<A>& b, const Vec<A>& c) {
#if defined(__AVX512F__)
  Vec<A> r;
  if constexpr (sizeof(A) == 4)
    r.v[0] = (typename Vec<A>::Native)_mm512_fmadd_ps((__m512)a.v[0], (__m512)b.v[0], (__m512)c.v[0]);
  else
    r.v[0] = (typename Vec<A>::Native)_mm512_fmadd_pd((__m512d)a.v[0], (__m512d)b.v[0], (__m512d)c.v[0]);
  return r;
#elif defined(__FMA__)
  Vec<A> r;
  for (int i = 0; i < Vec<A>::parts; ++i)
    if constexpr (sizeof(A) == 4)
      r.v[i] = (typename Vec<A>::Native)_mm256_fmadd_ps((__m256)a.v[i], (__m256)b.v[i], (__m256)c.v[i]);
    else
      r.v[i] = (typename Vec<A>::Native)_mm256_fmadd_pd((__m256d)a.v[i], (__m256d)b.v[i], (__m256d)c.v[i]);
  return r;
#else
  return a * b + c;
#endif
}

// a where the lane of `test` is above zero, or not a number; elsewhere zero.
template <class A>
inline Vec<A> unless_negative_or_zero(const Vec<A>& test, const Vec<A>& a) {
  Vec<A> r;
  for (int i = 0; i < Vec<A>::parts; ++i) r.v[i] = test.v[i] <= 0 ? typename Vec<A>::Native{} : a.v[i];
  return r;
}

// The larger magnitude of each lane.
template <class A>
inline Vec<A> larger_magnitude(const Vec<A>& a, const Vec<A>& b) {
  Vec<A> r;
  for (int i = 0; i < Vec<A>::parts; ++i) {
    const auto x = a.v[i] < 0 ? -a.v[i] : a.v[i], y = b.v[i] < 0 ? -b.v[i] : b.v[i];
    r.v[i] = x > y ? x : y;
  }
  return r;
}

// The sum over the lanes, in double, by halving.
template <class A>
inline double sum(const Vec<A>& a) {
  A lane[Vec<A>::lanes];
  std::memcpy(lane, a.v, sizeof lane);
  double half[8];
  for (int i = 0; i < 8; ++i)
    half[i] = sizeof(A) == 4 ? double(lane[i]) + double(lane[i + Vec<A>::lanes / 2]) : lane[i];
  for (int n = 4; n; n /= 2)
    for (int i = 0; i < n; ++i) half[i] += half[i + n];
  return half[0];
}

// The sums of eight vectors, each added as in sum().
template <class A>
inline void sums(const Vec<A> (&v)[8], double (&to)[8]) {
  typedef double Eight __attribute__((vector_size(64)));
  Eight half[8];
  for (int i = 0; i < 8; ++i)
    if constexpr (sizeof(A) == 4) {
      typedef float Lanes __attribute__((vector_size(32)));
      Lanes low, high;
      std::memcpy(&low, v[i].v, 32);
      std::memcpy(&high, reinterpret_cast<const char*>(v[i].v) + 32, 32);
      half[i] = __builtin_convertvector(low, Eight) + __builtin_convertvector(high, Eight);
    } else {
      std::memcpy(&half[i], v[i].v, 64);
    }
  for (int i = 0; i < 4; ++i)
    half[i] = __builtin_shufflevector(half[2 * i], half[2 * i + 1], 0, 1, 2, 3, 8, 9, 10, 11) +
              __builtin_shufflevector(half[2 * i], half[2 * i + 1], 4, 5, 6, 7, 12, 13, 14, 15);
  for (int i = 0; i < 2; ++i)
    half[i] = __builtin_shufflevector(half[2 * i], half[2 * i + 1], 0, 1, 4, 5, 8, 9, 12, 13) +
              __builtin_shufflevector(half[2 * i], half[2 * i + 1], 2, 3, 6, 7, 10, 11, 14, 15);
  half[0] = __builtin_shufflevector(half[0], half[1], 0, 2, 4, 6, 8, 10, 12, 14) +
            __builtin_shufflevector(half[0], half[1], 1, 3, 5, 7, 9, 11, 13, 15);
  std::memcpy(to, half, 64);
}

// Zero in the lanes from n on, whatever stands there.
template <class A>
inline Vec<A> first(const Vec<A>& a, int n) {
#if defined(__AVX512F__)
  Vec<A> r;
  if constexpr (sizeof(A) == 4)
    r.v[0] = (typename Vec<A>::Native)_mm512_maskz_mov_ps(__mmask16((1u << n) - 1), (__m512)a.v[0]);
  else
    r.v[0] = (typename Vec<A>::Native)_mm512_maskz_mov_pd(__mmask8((1u << n) - 1), (__m512d)a.v[0]);
  return r;
#else
  A lane[Vec<A>::lanes];
  std::memcpy(lane, a.v, sizeof lane);
  for (int i = n; i < Vec<A>::lanes; ++i) lane[i] = 0;
  Vec<A> r;
  std::memcpy(r.v, lane, sizeof lane);
  return r;
#endif
}

namespace detail {
typedef float F __attribute__((vector_size(kNative)));
typedef uint32_t U __attribute__((vector_size(kNative)));
typedef uint16_t S __attribute__((vector_size(kNative / 2)));

inline uint32_t bits(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  return u;
}
inline float real(uint32_t u) {
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}

// Halves in integers, for chips without the instruction.
inline float widen(Half h) {
  uint32_t sign = uint32_t(h.bits & 0x8000) << 16, rest = h.bits & 0x7fff;
  if (rest >= 0x7c00) return real(sign | 0x7f800000 | (rest & 0x3ff) << 13);
  if (rest < 0x400) return real(sign | bits(float(rest) * 0x1p-24f));
  return real(sign | ((rest << 13) + 0x38000000));
}
inline Half narrow(float f) {
  uint32_t u = bits(f), sign = u >> 16 & 0x8000, a = u & 0x7fffffff;
  if (a > 0x7f800000) return {uint16_t(sign | 0x7e00)};
  if (a >= 0x477ff000) return {uint16_t(sign | 0x7c00)};
  if (a < 0x38800000) return {uint16_t(sign | (bits(real(a) + 0.5f) - bits(0.5f)))};  // the addition rounds
  return {uint16_t(sign | ((a + 0xfff + (a >> 13 & 1) - 0x38000000) >> 13))};
}
}  // namespace detail

template <class A>
inline Vec<A> load_native(const A* p) {
  Vec<A> r;
  for (int i = 0; i < Vec<A>::parts; ++i) std::memcpy(&r.v[i], p + i * Vec<A>::per_part, kNative);
  return r;
}
inline Vec<float> load(const float* p) { return load_native(p); }
inline Vec<double> load(const double* p) { return load_native(p); }
#if defined(__AVX512F__)
// 16 numbers of 16 bits in registers.
inline Vec<float> widened(const BFloat16*, __m256i bits) {
  return {{(detail::F)_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16)}};
}
inline Vec<float> widened(const Half*, __m256i bits) { return {{(detail::F)_mm512_cvtph_ps(bits)}}; }
// To nearest even, in integers: the instruction would flush subnormal numbers to zero.
inline __m256i narrowed(const BFloat16*, const Vec<float>& a) {
  const __m512i u = (__m512i)a.v[0], top = _mm512_srli_epi32(u, 16);
  const __m512i even = _mm512_and_si512(top, _mm512_set1_epi32(1));
  const __m512i up = _mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), even);
  const __mmask16 is_nan = _mm512_cmp_ps_mask((__m512)a.v[0], (__m512)a.v[0], _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_mask_or_epi32(_mm512_srli_epi32(up, 16), is_nan, top, _mm512_set1_epi32(0x40)));
}
inline __m256i narrowed(const Half*, const Vec<float>& a) {
  return _mm512_cvtps_ph((__m512)a.v[0], _MM_FROUND_TO_NEAREST_INT);
}
#endif

inline Vec<float> load(const BFloat16* p) {
#if defined(__AVX512F__)
  return widened(p, _mm256_loadu_si256((const __m256i*)p));
#else
  Vec<float> r;
#if defined(__AVX2__)
  for (int i = 0; i < 2; ++i)
    r.v[i] = (detail::F)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p + i)), 16);
#else
  for (int i = 0; i < Vec<float>::parts; ++i) {
    detail::S s;
    std::memcpy(&s, p + i * Vec<float>::per_part, sizeof s);
    r.v[i] = (detail::F)(__builtin_convertvector(s, detail::U) << 16);
  }
#endif
  return r;
#endif
}
inline Vec<float> load(const Half* p) {
#if defined(__AVX512F__)
  return widened(p, _mm256_loadu_si256((const __m256i*)p));
#else
  Vec<float> r;
#if defined(__F16C__)
  for (int i = 0; i < 2; ++i) r.v[i] = (detail::F)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p + i));
#else
  float lane[16];
  for (int i = 0; i < 16; ++i) lane[i] = detail::widen(p[i]);
  std::memcpy(r.v, lane, 64);
#endif
  return r;
#endif
}

template <class A>
inline void store_native(A* p, const Vec<A>& a) {
  for (int i = 0; i < Vec<A>::parts; ++i) std::memcpy(p + i * Vec<A>::per_part, &a.v[i], kNative);
}
inline void store(float* p, const Vec<float>& a) { store_native(p, a); }
inline void store(double* p, const Vec<double>& a) { store_native(p, a); }
inline void store(BFloat16* p, const Vec<float>& a) {
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i*)p, narrowed(p, a));
#else
  for (int i = 0; i < Vec<float>::parts; ++i) {
    detail::U u = (detail::U)a.v[i];
    detail::U rounded = (u + 0x7fff + (u >> 16 & 1)) >> 16;
    auto is_nan = (u & 0x7fffffff) > 0x7f800000;
    detail::U chosen = is_nan ? (u >> 16 | 0x40) : rounded;
    detail::S s = __builtin_convertvector(chosen, detail::S);
    std::memcpy(p + i * Vec<float>::per_part, &s, sizeof s);
  }
#endif
}
inline void store(Half* p, const Vec<float>& a) {
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i*)p, narrowed(p, a));
#elif defined(__F16C__)
  for (int i = 0; i < 2; ++i)
    _mm_storeu_si128((__m128i*)p + i, _mm256_cvtps_ph((__m256)a.v[i], _MM_FROUND_TO_NEAREST_INT));
#else
  float lane[16];
  std::memcpy(lane, a.v, 64);
  for (int i = 0; i < 16; ++i) p[i] = detail::narrow(lane[i]);
#endif
}

// The first n lanes alone; the others read as 0 and are not written.
template <class T>
inline Vec<Wide<T>> load(const T* p, int n) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    Vec<float> r;
    r.v[0] = (detail::F)_mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), p);
    return r;
  } else if constexpr (sizeof(T) == 2) {
    return widened(p, _mm256_maskz_loadu_epi16(__mmask16((1u << n) - 1), p));
  }
#endif
  T lane[Vec<Wide<T>>::lanes] = {};
  std::memcpy(lane, p, n * sizeof(T));
  return load(lane);
}
template <class T>
inline void store(T* p, const Vec<Wide<T>>& a, int n) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1), (__m512)a.v[0]);
    return;
  } else if constexpr (sizeof(T) == 2) {
    _mm256_mask_storeu_epi16(p, __mmask16((1u << n) - 1), narrowed(p, a));
    return;
  }
#endif
  T lane[Vec<Wide<T>>::lanes];
  store(lane, a);
  std::memcpy(p, lane, n * sizeof(T));
}

inline int exponent_of(double a) {
  uint64_t bits;
  std::memcpy(&bits, &a, 8);
  return int(bits >> 52 & 0x7ff) - 1023;
}
inline double power_of_two(int exponent) {
  const uint64_t bits = uint64_t(1023 + exponent) << 52;
  double a;
  std::memcpy(&a, &bits, 8);
  return a;
}

// f(first, constant or count) for n values, a vector at a time: L alone is a constant.
template <int L, class F>
inline void each_vector(int64_t n, const F& f) {
  int64_t j = 0;
  for (; j + L <= n; j += L) f(j, std::integral_constant<int, L>{});
  if (j < n) f(j, int(n - j));
}

// The same where f may see a value twice: the last vector then overlaps the one before it, which is faster than a part.
template <int L, class F>
inline void each_overlapping_vector(int64_t n, const F& f) {
  if (n < L) return n ? f(0, int(n)) : void();
  constexpr std::integral_constant<int, L> full;
  int64_t j = 0;
  for (; j + L <= n; j += L) f(j, full);
  if (j < n) f(n - L, full);
}

template <class T, class M>
inline Vec<Wide<T>> load_up_to(const T* p, M m) {
  if constexpr (std::is_same_v<M, int>)
    return load(p, m);
  else
    return load(p);
}
template <class T, class M>
inline void store_up_to(T* p, const Vec<Wide<T>>& v, M m) {
  if constexpr (std::is_same_v<M, int>)
    store(p, v, m);
  else
    store(p, v);
}

template <class A, class M>
inline Vec<A> first_up_to(const Vec<A>& v, M m) {
  if constexpr (std::is_same_v<M, int>)
    return first(v, m);
  else
    return v;
}

// One value.
inline float get(const float* p) { return *p; }
inline double get(const double* p) { return *p; }
inline float get(const BFloat16* p) { return detail::real(uint32_t(p->bits) << 16); }
inline float get(const Half* p) { return detail::widen(*p); }
template <class T>
inline void put(T* p, Wide<T> a) {
  store(p, Vec<Wide<T>>::all(a), 1);
}

}  // namespace normwise
