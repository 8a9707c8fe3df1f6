// Mean and variance of a group of values, accurate at any mean and scale, in an order that the group's size alone sets.
#pragma once

#include "sums.h"

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
  // The variance of values that lie far from their anchor loses digits: then the anchor must move to the mean. Few
  // values must lie nearer: their roundings do not average out.
  bool is_near() const { return sum * sum <= 4 * std::min(1.0, count / 64) * (squares * count - sum * sum); }
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
inline Wide<T> high(double mean, double var) {
  if (sizeof(Wide<T>) == 8 || !(var > 1e-300 && var < 1e300)) return Wide<T>(mean);
  // Adding this leaves no room for digits below 2^-18 of the deviation, rounded to a power of two.
  const double magic = 0x1.8p34 * power_of_two(exponent_of(var) >> 1);
  return std::fabs(mean) < magic / 4 ? Wide<T>((mean + magic) - magic) : Wide<T>(mean);
}

// Statistics as the loops use them: xhat = (x - hi) * scale + rest.
template <class T>
struct Statistics {
  using A = Wide<T>;
  double mean, rstd;
  A hi, scale, rest;
  bool extreme;  // A cannot compute with them: the values are computed in double, one by one

  Statistics(double m, double r, double var = 0)
      : mean(m), rstd(r), hi(high<T>(m, var)), scale(A(r)), rest(A((double(hi) - m) * r)),
        extreme(sizeof(A) == 4 && !(r > 1e-15 && r < 1e15 && std::fabs(m) < 1e30)) {}
  // What the mean has beside hi.
  double lo() const { return mean - double(hi); }
  // A power of two: (x - hi) * unit is exact, and neither too large nor too small to be multiplied.
  double unit() const { return power_of_two(exponent_of(rstd)); }
};

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
  using A = Wide<T>;
  using V = Vec<A>;
  const V hi = V::all(a);
  Part p{count, double(a)};
  const auto factors = [=](int64_t i, auto m) NORMWISE_INLINE {
    V d = load_up_to(x + i, m);
    if (Anchored) d = first_up_to(d - hi, m);
    if (kept) d = unless_negative_or_zero(load_up_to(kept + i, m), d);
    return Factors<A>{d, d};
  };
  sum_line<Centred, A>(n, factors, p.sum, p.squares);
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

// The same of each of up to eight short lines, which follow each other.
template <class T>
inline void short_parts(const T* const x, int64_t n, int64_t lines, double eps, Part* parts) {
  using A = Wide<T>;
  double one[8], squares[8];
  const auto factors = [=](int64_t line, int64_t i, auto m) NORMWISE_INLINE {
    const Vec<A> v = load_up_to(x + line * n + i, m);
    return Factors<A>{v, v};
  };
  sum_short_lines<A>(n, lines, factors, one, squares);
  for (int64_t k = 0; k < lines; ++k) {
    parts[k] = {double(n), 0, one[k], squares[k]};
    if (!parts[k].is_near() || (sizeof(A) == 4 && !parts[k].in_range(eps))) parts[k] = part_of(x + k * n, n, true, eps);
  }
}

// Sums over the rows of a matrix, for each of its m columns, with anchors as in part_of. The rows are `stride` apart.
template <class T>
inline void column_parts(const T* x, int64_t rows, int64_t stride, int64_t m, bool centred, const bool* valid,
                         double eps, Part* parts) {
  using A = Wide<T>;
  if (rows == 1 && centred) {
    for (int64_t c = 0; c < m; ++c) parts[c] = valid && !*valid ? Part{} : Part{1, double(get(x + c))};
    return;
  }
  std::vector<A> anchors(m);
  std::vector<double> sums(2 * m);
  A* const a = anchors.data();
  double *const s = sums.data(), *const q = s + m;
  const double count = valid ? double(std::count(valid, valid + rows, true)) : double(rows);
  for (bool anchored = false;; anchored = true) {
    const auto factors = [=](int64_t row, int64_t c, auto n) NORMWISE_INLINE {
      Vec<A> d = load_up_to(x + row * stride + c, n);
      if (anchored) d = d - load_up_to(a + c, n);
      return Factors<A>{d, d};
    };
    sum_columns<A>(rows, valid, m, factors, s, q);
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
