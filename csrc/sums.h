// Two sums at once, of u and of u * v, over the values of a line or of each column of a matrix, in an order that their
// number alone sets. Short runs are added in A, and their sums in double.
#pragma once

#include <algorithm>
#include <vector>

#include "simd.h"

namespace normwise {

template <class A>
struct Factors {
  Vec<A> u, v;
};

constexpr int kStreams = 4;  // independent sums, to hide the latency of addition
// Values summed before the sum moves to double: first runs of kRun, then these sums. Values that repeat, such as whole
// numbers times one factor, are rounded the same way each time that they are added to a sum of the same size.
constexpr int64_t kRun = 256, kBlock = 4 * kRun;

template <class V>
inline V tree(const V (&v)[4]) {
  return (v[0] + v[1]) + (v[2] + v[3]);
}
// Over n values, of which factors(i, m) gives m from i on. Both is false if the sum of u is not wanted.
template <bool Both, class A, class F>
inline void sum_line(int64_t n, const F& factors, double& one, double& two) {
  using V = Vec<A>;
  constexpr int L = V::lanes;
  constexpr std::integral_constant<int, L> full;
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t end = std::min(begin + kBlock, n);
    V u[kStreams], uv[kStreams];
    for (int64_t i = begin; i < end;) {
      V near[kStreams], product[kStreams];
      for (int k = 0; k < kStreams; ++k) near[k] = product[k] = V::all(0);
      const auto add = [&](int k, int64_t at, auto m) NORMWISE_INLINE {
        const Factors<A> f = factors(at, m);
        if (Both) near[k] = near[k] + f.u;
        product[k] = fma(f.u, f.v, product[k]);
      };
      const bool is_first = i == begin;
      const int64_t last = std::min(i + kRun, end);
      for (; i + kStreams * L <= last; i += kStreams * L)
        for (int k = 0; k < kStreams; ++k) add(k, i + k * L, full);
      for (; i + L <= last; i += L) add(0, i, full);
      if (i < last) add(0, i, int(last - i)), i = last;
      for (int k = 0; k < kStreams; ++k) {
        if (Both) u[k] = is_first ? near[k] : u[k] + near[k];
        uv[k] = is_first ? product[k] : uv[k] + product[k];
      }
    }
    if (Both) one += sum(tree(u));
    two += sum(tree(uv));
  }
}

// Adding the lanes of one sum takes longer than adding up a short line: that is done for eight lines together.
constexpr int64_t kShort = 256;

// Over each of up to eight short lines, of n values each, in runs of four vectors: factors(line, i, m).
template <class A, class F>
inline void sum_short_lines(int64_t n, int64_t lines, const F& factors, double (&one)[8], double (&two)[8]) {
  using V = Vec<A>;
  constexpr int64_t run = 4 * V::lanes;
  V u[8], uv[8];
  for (int64_t k = 0; k < 8; ++k) {
    u[k] = uv[k] = V::all(0);
    for (int64_t begin = 0; k < lines && begin < n; begin += run) {
      V near = V::all(0), product = near;
      each_vector<V::lanes>(std::min(run, n - begin), [&](int64_t i, auto m) NORMWISE_INLINE {
        const Factors<A> f = factors(k, begin + i, m);
        near = near + f.u;
        product = fma(f.u, f.v, product);
      });
      u[k] = u[k] + near, uv[k] = uv[k] + product;
    }
  }
  sums(u, one), sums(uv, two);
}

// Add the lanes to doubles.
template <class A, class M>
inline void add_to(double* to, const Vec<A>& v, M m) {
  A lane[Vec<A>::lanes];
  store(lane, v);
  for (int k = 0; k < m; ++k) to[k] += double(lane[k]);
}

// Over the rows of a matrix, for each of its columns: factors(row, column, m). null: all rows are valid. Eight rows are
// added up first, then their sums, so that fewer roundings follow each other.
template <class A, class F>
inline void sum_columns(int64_t rows, const bool* valid, int64_t columns, const F& factors, double* one, double* two) {
  constexpr int L = Vec<A>::lanes;
  const int64_t run = rows <= 128 ? 16 : 64;       // rows whose sums are taken in A; where they are few, errors show
  constexpr std::integral_constant<int, 4> strip;  // vectors side by side, whose sums stay in registers
  constexpr std::integral_constant<int, 1> single;
  constexpr std::integral_constant<int, L> full;
  for (int64_t begin = 0; begin < rows; begin += run) {
    const int64_t end = std::min(begin + run, rows);
    const auto sum = [=](int64_t c, auto width, auto m) NORMWISE_INLINE {
      constexpr int W = decltype(width)::value;
      Vec<A> u[W], uv[W];
      for (int k = 0; k < W; ++k) u[k] = uv[k] = Vec<A>::all(0);
      for (int64_t r = begin; r < end; r += 8) {
        Vec<A> near[2 * W], product[2 * W];
        for (int k = 0; k < 2 * W; ++k) near[k] = product[k] = Vec<A>::all(0);
        const auto add = [&](int64_t i, int from) NORMWISE_INLINE {
          if (valid && !valid[i]) return;
          for (int k = 0; k < W; ++k) {
            const Factors<A> f = factors(i, c + k * L, m);
            near[from + k] = near[from + k] + f.u;
            product[from + k] = fma(f.u, f.v, product[from + k]);
          }
        };
        const int64_t last = std::min(r + 8, end);
        int64_t i = r;
        for (; i + 2 <= last; i += 2) add(i, 0), add(i + 1, W);
        if (i < last) add(i, 0);
        for (int k = 0; k < W; ++k)
          u[k] = u[k] + (near[k] + near[W + k]), uv[k] = uv[k] + (product[k] + product[W + k]);
      }
      for (int k = 0; k < W; ++k) add_to(one + c + k * L, u[k], m), add_to(two + c + k * L, uv[k], m);
    };
    int64_t c = 0;
    for (; c + strip * L <= columns; c += strip * L) sum(c, strip, full);
    for (; c + L <= columns; c += L) sum(c, single, full);
    if (c < columns) sum(c, single, int(columns - c));
  }
}

}  // namespace normwise
