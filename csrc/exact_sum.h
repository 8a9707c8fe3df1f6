// Sums of doubles that have no order: each is an integer on a fixed grid, in digits of 32 bits, and integers add
// exactly. A digit is held in 64 bits, so that 2^31 terms fit before a carry is needed, and sums add digit by digit.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

namespace normwise {

// The grid starts at 2^kLowest: below the square of the smallest float, and ends above 2^60 squares of the largest.
constexpr int kLowest = -352, kDigits = 21;

// The slot after the digits counts terms that the grid cannot hold: infinite, not a number, or too large.
constexpr int kSlots = kDigits + 1;

inline void deposit(int64_t* sum, double term) {
  uint64_t bits;
  std::memcpy(&bits, &term, 8);
  const int exponent = int(bits >> 52 & 0x7ff), place = exponent - 1075 - kLowest;
  int64_t mantissa = int64_t((bits & ((uint64_t(1) << 52) - 1)) | uint64_t(1) << 52);
  mantissa = bits >> 63 ? -mantissa : mantissa;
  if (place < 0) {  // below the grid: nothing beside the other terms, which are far larger
    if (place > -64) sum[0] += mantissa >> -place;
    return;
  }
  if (place > 32 * (kDigits - 3)) {
    ++sum[kDigits];
    return;
  }
  const int shift = place & 31;
  const uint64_t low = uint64_t(mantissa) << shift;
  int64_t* digit = sum + (place >> 5);
  digit[0] += int64_t(uint32_t(low));
  digit[1] += int64_t(low >> 32);
  digit[2] += mantissa >> 1 >> (63 - shift);
}

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

// The sum, good to 2^-100 of itself; not a number if the grid could not hold a term.
inline Pair value_of(const int64_t* sum) {
  if (sum[kDigits]) return {NAN, 0};
  int64_t digit[kDigits];
  const auto carry = [&](int64_t sign) {
    __int128 rest = 0;
    for (int i = 0; i < kDigits; ++i) {
      rest += static_cast<__int128>(sum[i]) * sign;
      digit[i] = int64_t(rest & 0xffffffff);
      rest >>= 32;
    }
    return rest < 0;
  };
  const bool negative = carry(1);
  if (negative) carry(-1);
  Pair total;
  for (int i = kDigits; i-- > 0;) {
    if (!digit[i]) continue;
    const uint64_t bits = uint64_t(1023 + kLowest + 32 * i) << 52;
    double weight;
    std::memcpy(&weight, &bits, 8);
    total = total + Pair{double(digit[i]) * weight, 0};
  }
  return negative ? Pair{-total.hi, -total.lo} : total;
}

}  // namespace normwise
