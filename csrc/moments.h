// Mean and variance of a group of values, accurate at any mean and scale, in an order that the group's size alone sets.
#pragma once

#include <algorithm>
#include <vector>

#include "simd.h"

namespace normwise {

// Sums over a set of values, of x - anchor and of its square. Sets can be merged.
struct Part {
  double count = 0, anchor = 0, sum = 0, squares = 0;

  double mean() const { return count ? anchor + sum / count : 0; }
  double var() const {
    const double rest = sum / count, v = squares / count - rest * rest;
    return !count || v < 0 ? 0 : v;
  }
  void operator+=(const Part& b) {
    if (!b.count) return;
    if (!count) anchor = b.anchor;
    const double delta = b.anchor - anchor;
    sum += b.sum + b.count * delta;
    squares += b.squares + 2 * delta * b.sum + b.count * delta * delta;
    count += b.count;
  }
  // The variance of values that lie far from their anchor loses digits: then the anchor must move to the mean.
  bool is_near() const { return sum * sum <= 4 * (squares * count - sum * sum); }
  // Squares that a float can hold, neither too large nor, beside eps, lost for being small.
  bool in_range(double eps) const { return squares < 1e30 * count && !(squares < 1e-30 * count && eps < 1e-18); }
};

// An anchor of values of type T. Of 16-bit values it has no more bits than they have, so that x - anchor is exact: else
// every difference would be rounded alike.
template <class T>
inline Wide<T> anchor(double mean) {
  using A = Wide<T>;
  if (sizeof(T) > 2 || !(std::fabs(mean) < 6e4)) return A(mean);
  T rounded;
  put(&rounded, A(mean));
  return get(&rounded);
}

// The part of a mean that is subtracted from the values first: a multiple of 2^-18 of their standard deviation. So x -
// hi is exact, or rounded at random: a full mean would have every x - hi rounded alike, and their sum would drift. What
// is left of the mean follows as a term of its own. All of the mean, where the deviation is not known.
template <class T>
inline Wide<T> high(double mean, double deviation) {
  if (sizeof(Wide<T>) == 8 || !(deviation > 1e-200 && deviation < 1e200)) return Wide<T>(mean);
  uint64_t bits;
  std::memcpy(&bits, &deviation, 8);
  bits = ((bits >> 52) + 52 - 18) << 52;
  double magic;  // adding it leaves no room for digits below 2^-18 of the deviation, rounded to a power of two
  std::memcpy(&magic, &bits, 8);
  magic *= 1.5;
  return std::fabs(mean) < magic / 4 ? Wide<T>((mean + magic) - magic) : Wide<T>(mean);
}

// Statistics that float cannot compute with: then the values are computed in double, one by one.
template <class T>
inline bool is_extreme(double mean, double rstd) {
  return sizeof(Wide<T>) == 4 && !(rstd > 1e-15 && rstd < 1e15 && std::fabs(mean) < 1e30);
}

constexpr int kStreams = 4;  // independent sums, to hide the latency of addition
// Values summed before the sum moves to double. Where mean/std is large, squares have few digits, and every other
// addition of a longer run would be a tie, rounded the same way.
constexpr int64_t kBlock = 1024;

template <class V>
inline V tree(const V (&streams)[kStreams]) {
  return (streams[0] + streams[1]) + (streams[2] + streams[3]);
}

// Values one by one, in double. `kept` says which take part, null for all.
template <class T>
inline Part exact_part(const T* x, int64_t n, int64_t stride, bool centred, const Wide<T>* kept = nullptr) {
  Part p;
  double mean = 0;
  for (int64_t i = 0; i < n; ++i)
    if (!kept || kept[i] > 0) ++p.count, mean += double(get(x + i * stride));
  p.anchor = centred && p.count ? mean / p.count : 0;
  for (int64_t i = 0; i < n; ++i)
    if (!kept || kept[i] > 0) {
      const double d = double(get(x + i * stride)) - p.anchor;
      p.sum += d;
      p.squares += d * d;
    }
  return p;
}

// Sums over n contiguous values about an anchor, or about zero.
template <bool Anchored, bool Centred, class T>
inline Part part_about(Wide<T> a, const T* const x, int64_t n, const Wide<T>* const kept, double count) {
  using V = Vec<Wide<T>>;
  constexpr int L = V::lanes;
  const V hi = V::all(a);
  Part p{count, double(a)};
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t end = std::min(begin + kBlock, n);
    V one[kStreams], two[kStreams];
    for (int k = 0; k < kStreams; ++k) one[k] = two[k] = V::all(0);
    const auto add = [&](int k, const V& d) NORMWISE_INLINE {
      if (Centred) one[k] = one[k] + d;
      two[k] = fma(d, d, two[k]);
    };
    int64_t i = begin;
    if (!kept)
      for (; i + kStreams * L <= end; i += kStreams * L)
        for (int k = 0; k < kStreams; ++k) add(k, Anchored ? load(x + i + k * L) - hi : load(x + i + k * L));
    while (i < end)
      for (int k = 0; k < kStreams && i < end; ++k, i += L) {
        const int m = int(std::min<int64_t>(L, end - i));
        V d = m == L ? load(x + i) : load(x + i, m);
        if (Anchored) d = d - hi;
        if (kept) d = unless_negative_or_zero(m == L ? load(kept + i) : load(kept + i, m), d);
        add(k, Anchored && m < L ? first(d, m) : d);
      }
    if (Centred) p.sum += sum(tree(one));
    p.squares += sum(tree(two));
  }
  return p;
}

// Sums over n contiguous values, of which those with `kept` above zero take part; null for all. The anchor is zero, or
// if that is far from the values, their mean as it was found about zero.
template <class T>
inline Part part_of(const T* x, int64_t n, bool centred, double eps, const Wide<T>* kept = nullptr) {
  using A = Wide<T>;
  const double count = kept ? part_about<false, true>(A(0), kept, n, nullptr, double(n)).sum : double(n);
  if (!count) return {};
  Part p =
      centred ? part_about<false, true>(A(0), x, n, kept, count) : part_about<false, false>(A(0), x, n, kept, count);
  if (centred && !p.is_near()) p = part_about<true, true>(anchor<T>(p.mean()), x, n, kept, count);
  return sizeof(A) == 8 || p.in_range(eps) ? p : exact_part(x, n, 1, centred, kept);
}

// Add the lanes to doubles.
template <class A, class M>
inline void add_to(double* to, const Vec<A>& v, M m) {
  A lane[Vec<A>::lanes];
  store(lane, v);
  for (int k = 0; k < m; ++k) to[k] += double(lane[k]);
}

// f(rows, constant) for 8 rows at a time, `stride` apart, without those that `valid` leaves out; for the last ones, one
// by one.
template <class T, class F>
inline void each_eight(const T* x, int64_t rows, int64_t stride, const bool* valid, const F& f) {
  const T* eight[8];
  int count = 0;
  for (int64_t r = 0; r < rows; ++r) {
    if (valid && !valid[r]) continue;
    eight[count++] = x + r * stride;
    if (count == 8) f(eight, std::integral_constant<int, 8>{}), count = 0;
  }
  for (int i = 0; i < count; ++i) f(eight + i, std::integral_constant<int, 1>{});
}

// The sum of one or eight in a fixed tree.
template <class V, int K>
inline V tree_of(const V (&v)[K]) {
  if constexpr (K == 1)
    return v[0];
  else
    return ((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7]));
}

// Sums over the rows of a matrix, for each of its m columns, with anchors as in part_of. The rows are `stride` apart.
template <class T>
inline void column_parts(const T* x, int64_t rows, int64_t stride, int64_t m, bool centred, const bool* valid,
                         double eps, Part* parts) {
  using A = Wide<T>;
  using V = Vec<A>;
  constexpr int L = V::lanes;
  std::vector<A> anchors(m);
  std::vector<double> sums(2 * m);
  A* const a = anchors.data();
  double *const s = sums.data(), *const q = s + m;
  const double count = valid ? double(std::count(valid, valid + rows, true)) : double(rows);
  for (bool anchored = false;; anchored = true) {
    each_eight(x, rows, stride, valid, [=](const T* const* row, auto k) {
      each_vector<L>(m, [=](int64_t c, auto n) NORMWISE_INLINE {
        const V hi = anchored ? load_up_to(a + c, n) : V::all(0);
        V d[decltype(k)::value], square = V::all(0);
        for (int i = 0; i < k; ++i) {
          d[i] = load_up_to(row[i] + c, n) - hi;
          square = fma(d[i], d[i], square);
        }
        add_to(s + c, tree_of(d), n);
        add_to(q + c, square, n);
      });
    });
    bool near = true;
    for (int64_t c = 0; c < m; ++c) {
      parts[c] = {count, double(a[c]), s[c], q[c]};
      near = near && parts[c].is_near();
    }
    if (near || anchored || !centred) break;
    for (int64_t c = 0; c < m; ++c) {  // a column alone decides about its anchor, whatever its neighbours hold
      s[c] = q[c] = 0;
      if (!parts[c].is_near()) a[c] = anchor<T>(parts[c].mean());
    }
  }
  if (sizeof(A) == 8) return;
  for (int64_t c = 0; c < m; ++c)
    if (count && !parts[c].in_range(eps)) {
      std::vector<A> kept;
      if (valid) kept.assign(valid, valid + rows);
      parts[c] = exact_part(x + c, rows, stride, centred, valid ? kept.data() : nullptr);
    }
}

}  // namespace normwise
