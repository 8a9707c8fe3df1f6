// Sums of doubles that have no order: each is an integer on a fixed grid, in digits of 32 bits, and integers add
// exactly. A digit is held in 64 bits, so that 2^30 terms fit before a carry is needed, and sums add digit by digit.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#include "simd.h"

namespace normwise {

// The grid starts at 2^kLowest: below the square of the smallest float, and ends above 2^60 squares of the largest.
constexpr int kLowest = -352, kDigits = 21;

// The slot after the digits counts terms that the grid cannot hold: infinite, not a number, or too large.
constexpr int kSlots = kDigits + 1;

// Two doubles whose exact sum stands for more digits than one has.
struct Pair {
  double hi = 0, lo = 0;
};

inline Pair two_sum(double a, double b) {
  const double s = a + b, z = s - a;
  return {s, (a - (s - z)) + (b - z)};
}
inline Pair two_product(double a, double b) {
  const double p = a * b;
  return {p, std::fma(a, b, -p)};
}
inline Pair operator+(Pair a, Pair b) {
  const Pair s = two_sum(a.hi, b.hi), t = two_sum(a.lo, b.lo), u = two_sum(s.hi, s.lo + t.hi);
  return two_sum(u.hi, u.lo + t.lo);
}
inline Pair operator*(Pair a, double b) {
  const Pair p = two_product(a.hi, b);
  return two_sum(p.hi, std::fma(a.lo, b, p.lo));
}
inline Pair operator*(Pair a, Pair b) {
  const Pair p = two_product(a.hi, b.hi);
  return two_sum(p.hi, p.lo + (a.hi * b.lo + a.lo * b.hi));
}
inline Pair operator/(Pair a, double b) {
  const double q = a.hi / b;
  const Pair rest = a + Pair{-q, 0} * b;
  return two_sum(q, rest.hi / b);
}

constexpr int64_t kMostTerms = int64_t(1) << 29;  // with the low parts of pairs, half of what a digit can hold

// The same sum with digits below 2^32, so that those of 2^30 processes can be added.
inline void carry(int64_t* sum) {
  for (int k = 0; k + 1 < kDigits; ++k) sum[k + 1] += sum[k] >> 32, sum[k] &= 0xffffffff;
}

// The sum, good to 2^-100 of itself; not a number if the grid could not hold a term.
inline Pair value_of(const int64_t* sum) {
  if (sum[kDigits]) return {NAN, 0};
  int low = 0, top = kDigits;
  while (low < top && !sum[low]) ++low;
  while (top > low && !sum[top - 1]) --top;
  int64_t digit[kDigits];
  int end = low;
  const auto carry = [&](int64_t sign) {
    int64_t rest = 0;
    for (end = low; end < kDigits && (end < top || rest > 0 || rest < -1); ++end) {
      rest += sum[end] * sign;
      digit[end] = rest & 0xffffffff;
      rest >>= 32;
    }
    return rest < 0;
  };
  const bool negative = carry(1);
  if (negative) carry(-1);
  Pair total;
  for (int i = end; i-- > low;) total = total + Pair{double(digit[i]) * power_of_two(kLowest + 32 * i), 0};
  return negative ? Pair{-total.hi, -total.lo} : total;
}

// Terms of sums that lie side by side, `width` of them and `stride` integers apart, which are deposited together: each
// digit of all terms is split off by additions that round there, and its sum is exact in double.
class Terms {
 public:
  static constexpr int kSide = Vec<double>::lanes;

  Terms(int64_t* sums, int64_t width, int64_t stride) : sums_(sums), width_(int(width)), stride_(stride) {}
  Terms(const Terms&) = delete;
  ~Terms() { deposit_all(); }

  void add(const double (&terms)[kSide]) {
    if (count_ == kRows) deposit_all();
    std::memcpy(rows_[count_++], terms, sizeof terms);
  }

 private:
  using V = Vec<double>;
  static constexpr int kRows = 64;  // far fewer than 2^20, of which a digit's sum could not be exact

  void deposit_all() {
    const int count = std::exchange(count_, 0);
    V most = V::all(0), invalid = V::all(0);
    for (int i = 0; i < count; ++i) {
      const V v = load(rows_[i]);
      most = larger_magnitude(most, v);
      invalid = fma(v, V::all(0), invalid);
    }
    int k = digit_of(most);
    if (k > kDigits - 2 || sum(invalid) != 0) k = without_invalid(count);
    for (; k >= 0; k = digit_of(most)) {
      const double unit = power_of_two(kLowest + 32 * k);
      const V magic = V::all(0x1.8p52 * unit);
      V total = V::all(0);
      most = total;
      for (int i = 0; i < count; ++i) {
        const V v = load(rows_[i]), digit = (v + magic) - magic, rest = v - digit;
        total = total + digit;
        most = larger_magnitude(most, rest);
        store(rows_[i], rest);
      }
      double lane[kSide];
      store(lane, total);
      for (int c = 0; c < width_; ++c) sums_[c * stride_ + k] += int64_t(lane[c] / unit);
    }
  }
  // Terms that the grid cannot hold are counted and become zero; the digit of the largest that is left.
  int without_invalid(int count) {
    V most = V::all(0);
    for (int i = 0; i < count; ++i) {
      for (int c = 0; c < width_; ++c)
        if (!(std::fabs(rows_[i][c]) < power_of_two(kLowest + 32 * (kDigits - 1))))
          ++sums_[c * stride_ + kDigits], rows_[i][c] = 0;
      most = larger_magnitude(most, load(rows_[i]));
    }
    return digit_of(most);
  }
  // The digit in which the largest of these has its first bit; -1 for zeros and for what lies below the grid.
  static int digit_of(const V& magnitudes) {
    double lane[kSide], most = 0;
    store(lane, magnitudes);
    for (const double a : lane) most = std::max(most, a);
    const int place = exponent_of(most) - kLowest;
    return place < 0 ? -1 : place / 32;
  }

  int64_t* sums_;
  int width_;
  int64_t stride_;
  int count_ = 0;
  double rows_[kRows][kSide];
};

}  // namespace normwise
