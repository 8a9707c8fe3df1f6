// Mean and variance of a group of values, accurate at any mean and scale, in an order that the group's size alone sets.
#pragma once

#include <algorithm>

#include "simd.h"

namespace normwise {

// The part of a mean that is subtracted first: x - hi is exact where x is close to the mean. For 16-bit values it has no
// more bits than they have; else every x - hi would be rounded alike, and the error of their sum would grow with the count.
template <class T>
inline Wide<T> high(double mean) {
  using A = Wide<T>;
  if (sizeof(T) > 2 || !(std::fabs(mean) < 6e4)) return A(mean);
  T rounded;
  put(&rounded, A(mean));
  return get(&rounded);
}

// Mean and variance of values of type T, and the mean as hi + lo.
template <class T>
struct Moments {
  using A = Wide<T>;
  A hi = 0, lo = 0, rstd = 0;
  double mean = 0, var = 0, exact_rstd = 0;
  bool extreme = false;

  void set(double m, double v, double eps) {
    mean = m;
    var = v;
    hi = high<T>(m);
    lo = A(m - double(hi));
    exact_rstd = 1 / std::sqrt(v + eps);
    rstd = A(exact_rstd);
  }
};

constexpr int kStreams = 4;      // independent sums, to hide the latency of addition
constexpr int64_t kBlock = 2048;  // values summed before the sum moves to double

template <class V>
inline V tree(const V (&streams)[kStreams]) {
  return (streams[0] + streams[1]) + (streams[2] + streams[3]);
}

// Sum f(x[i]) and, if Second, its square, over n contiguous values: fixed blocks, fixed lanes, fixed tree.
template <bool Second, class T, class F>
inline void sums(const T* x, int64_t n, const F& f, double& s1, double& s2) {
  using A = Wide<T>;
  using V = Vec<A>;
  constexpr int L = V::lanes;
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t end = std::min(begin + kBlock, n);
    V one[kStreams], two[kStreams];
    for (int k = 0; k < kStreams; ++k) one[k] = two[k] = V::all(0);
    int64_t i = begin;
    for (; i + kStreams * L <= end; i += kStreams * L)
      for (int k = 0; k < kStreams; ++k) {
        const V d = f(load(x + i + k * L));
        one[k] = one[k] + d;
        if (Second) two[k] = two[k] + d * d;
      }
    for (int k = 0; i < end; i += L, ++k) {
      const int m = int(std::min<int64_t>(L, end - i));
      const V d = m == L ? f(load(x + i)) : first(f(load(x + i, m)), m);
      one[k] = one[k] + d;
      if (Second) two[k] = two[k] + d * d;
    }
    s1 += sum(tree(one));
    if (Second) s2 += sum(tree(two));
  }
}

// Values whose squares leave the range of A: statistics in double, and the caller computes the row in double too.
template <class T>
inline void moments_of_extremes(const T* x, int64_t n, bool centred, double eps, Moments<T>& result) {
  double mean = 0, rest = 0, m2 = 0;
  if (centred) {
    for (int64_t i = 0; i < n; ++i) mean += double(get(x + i)) / double(n);
  }
  for (int64_t i = 0; i < n; ++i) {
    const double d = double(get(x + i)) - mean;
    rest += d / double(n);
    m2 += d * d;
  }
  if (!centred) rest = 0;
  result.set(mean + rest, m2 / double(n) - rest * rest, eps);
  result.extreme = true;
}

// Statistics whose reciprocal root is far from 1 belong to such values, too.
inline bool is_extreme(double mean, double rstd) { return !(rstd > 1e-15 && rstd < 1e15 && std::fabs(mean) < 1e30); }

constexpr int64_t kAhead = 256;  // values whose mean is subtracted before the rest is known

// The variance of values whose distance from `hi` has these sums is good to a few ulps; else hi must move to the mean.
inline bool is_near(double rest, double var) { return rest * rest <= 16 * var; }

template <class T>
inline Moments<T> moments(const T* x, int64_t n, bool centred, double eps) {
  using A = Wide<T>;
  using V = Vec<A>;
  Moments<T> r;
  r.set(0, 0, eps);
  if (n == 0) return r;
  double s1 = 0, s2 = 0;
  if (centred) {
    const int64_t ahead = std::min(n, kAhead);
    const V anchor = V::all(get(x));
    sums<false>(x, ahead, [&](const V& v) { return v - anchor; }, s1, s2);
    double mean = double(get(x)) + s1 / double(ahead), var = 0;
    for (int attempt = 0; attempt < 2; ++attempt) {
      const V hi = V::all(high<T>(mean));  // alone: x - hi is exact, and a sum of many equal roundings would drift
      s1 = s2 = 0;
      sums<true>(x, n, [&](const V& v) { return v - hi; }, s1, s2);
      const double rest = s1 / double(n);
      mean = double(high<T>(mean)) + rest;
      var = s2 / double(n) - rest * rest;
      if (is_near(rest, var)) break;
    }
    r.set(mean, var > 0 || std::isnan(var) ? var : 0, eps);
  } else {
    sums<true>(x, n, [](const V& v) { return v; }, s1, s2);
    r.set(0, s2 / double(n), eps);
  }
  if (sizeof(A) == 4 && (!(r.var < 1e30) || (r.var < 1e-30 && eps < 1e-18)))
    moments_of_extremes(x, n, centred, eps, r);
  return r;
}

}  // namespace normwise
