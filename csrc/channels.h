// The loops that group_norm, instance_norm and batch_norm share. They see x as (N, C, S), in either order of memory:
// planar (S innermost, NCHW) or interleaved (C innermost, NHWC). Statistics are taken for each sample and channel and
// merged in double, over the channels of a group or over the batch; the loops over the values are the same for all.
#pragma once

#include <vector>

#include "moments.h"
#include "tensor.h"

namespace normwise {

struct View {
  int64_t n, c, s;
  bool interleaved;
  bool shared = false;  // one parameter a channel serves all samples

  int64_t channels() const { return n * c; }
  int64_t parameter(int64_t channel) const { return shared ? channel % c : channel; }
};

// Statistics of a set of values that can be merged.
struct Part {
  double count = 0, mean = 0, m2 = 0;

  void merge(const Part& b) {
    if (!b.count) return;
    const double all = count + b.count, delta = b.mean - mean;
    mean += delta * (b.count / all);
    m2 += b.m2 + delta * delta * (count / all * b.count);
    count = all;
  }
};

// What the values of one sample and channel are transformed with: ((x - hi) - lo) * scale + offset. In A for the vector
// loops, in double for statistics that A cannot hold.
template <class T>
struct Affine {
  using A = Wide<T>;
  std::vector<A> hi, lo, scale, offset, beta;
  std::vector<double> mean, exact_scale, exact_offset, exact_beta;
  std::vector<char> extreme;  // statistics that A cannot hold
  bool any_extreme = false;

  explicit Affine(int64_t n)
      : hi(n), lo(n), scale(n), offset(n), beta(n), mean(n), exact_scale(n), exact_offset(n), exact_beta(n), extreme(n) {}

  void center(int64_t i, double m, double rstd) {
    mean[i] = m;
    hi[i] = high<T>(m);
    lo[i] = A(m - double(hi[i]));
    extreme[i] = sizeof(A) == 4 && is_extreme(m, rstd);
    any_extreme |= extreme[i];
  }
  void set(int64_t i, double s, double o, double b = 0) {
    exact_scale[i] = s, exact_offset[i] = o, exact_beta[i] = b;
    scale[i] = A(s), offset[i] = A(o), beta[i] = A(b);
  }
};

constexpr int64_t kRun = 128;     // values of a planar run, and
constexpr int64_t kRows = 8;      // rows of an interleaved block: their sums are taken in A, in two streams
constexpr int64_t kChunk = 1024;  // rows that one task sums in order, in double

inline int64_t chunks_of(const View& v) { return (v.s + kChunk - 1) / kChunk; }

// Mean and sum of squared deviations of one channel, in double: for values that A cannot square, and for a channel whose
// first rows say little about the others.
template <class T>
inline Part exact_part(const T* x, int64_t rows, int64_t stride) {
  Part p{double(rows), 0, 0};
  double rest = 0;
  for (int64_t i = 0; i < rows; ++i) p.mean += double(get(x + i * stride));
  p.mean /= double(rows);
  for (int64_t i = 0; i < rows; ++i) {
    const double d = double(get(x + i * stride)) - p.mean;
    rest += d;
    p.m2 += d * d;
  }
  p.mean += rest / double(rows);
  return p;
}

// The same for N vectors of neighbouring channels at once, m channels in all, over rows at distance `stride`.
template <int N, class T>
inline void chunk_moments(const T* x, int64_t rows, int64_t stride, int m, bool tiny, Part* parts) {
  using A = Wide<T>;
  using V = Vec<A>;
  constexpr int L = V::lanes;
  const bool full = m == N * L;
  const auto at = [&](int64_t i, int k) { return full ? load(x + i * stride + k * L) : load(x + i * stride, m); };
  A hi[N * L], lane[N * L];
  double s[N * L] = {}, q[N * L] = {};
  V h[N], one[2][N], two[2][N];
  const int64_t ahead = std::min<int64_t>(rows, 64);
  for (int k = 0; k < N; ++k) {
    h[k] = at(0, k);
    one[0][k] = one[1][k] = V::all(0);
  }
  for (int64_t i = 0; i < ahead; ++i)
    for (int k = 0; k < N; ++k) one[i & 1][k] = one[i & 1][k] + (at(i, k) - h[k]);
  for (int k = 0; k < N; ++k) store(hi + k * L, h[k]), store(lane + k * L, one[0][k] + one[1][k]);
  for (int c = 0; c < N * L; ++c) hi[c] = high<T>(double(hi[c]) + double(lane[c]) / double(ahead));
  for (int k = 0; k < N; ++k) h[k] = load(hi + k * L);
  for (int64_t begin = 0; begin < rows; begin += 8 * kRows) {  // squares do not cancel: longer runs will do
    const int64_t end = std::min(begin + 8 * kRows, rows);
    for (int k = 0; k < N; ++k) one[0][k] = one[1][k] = two[0][k] = two[1][k] = V::all(0);
    const auto add = [&](int64_t i, int stream) {
      for (int k = 0; k < N; ++k) {
        const V d = at(i, k) - h[k];
        one[stream][k] = one[stream][k] + d;
        two[stream][k] = two[stream][k] + d * d;
      }
    };
    int64_t i = begin;
    for (; i + 2 <= end; i += 2) add(i, 0), add(i + 1, 1);
    if (i < end) add(i, 0);
    for (int k = 0; k < N; ++k) store(lane + k * L, one[0][k] + one[1][k]);
    for (int c = 0; c < N * L; ++c) s[c] += double(lane[c]);
    for (int k = 0; k < N; ++k) store(lane + k * L, two[0][k] + two[1][k]);
    for (int c = 0; c < N * L; ++c) q[c] += double(lane[c]);
  }
  for (int c = 0; c < m; ++c) {
    const double rest = s[c] / double(rows), var = q[c] / double(rows) - rest * rest;
    const bool in_range = sizeof(A) == 8 || (var < 1e30 && !(tiny && var < 1e-30));
    if (in_range && is_near(rest, var))
      parts[c] = {double(rows), double(hi[c]) + rest, var * double(rows)};
    else
      parts[c] = exact_part(x + c, rows, stride);
  }
}

// A Part for each sample and channel.
template <class T>
std::vector<Part> channel_parts(const T* x, const View& v, double eps) {
  std::vector<Part> parts(v.channels());
  const bool tiny = eps < 1e-18;
  if (!v.interleaved) {
    parallel(v.channels(), v.s, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const auto m = moments(x + i * v.s, v.s, true, eps);
        parts[i] = {double(v.s), m.mean, m.var * double(v.s)};
      }
    });
    return parts;
  }
  constexpr int L = Vec<Wide<T>>::lanes;
  const int64_t chunks = chunks_of(v);
  std::vector<Part> partial(chunks > 1 ? v.n * chunks * v.c : 0);
  Part* to = chunks > 1 ? partial.data() : parts.data();
  parallel(v.n * chunks, std::min(v.s, kChunk) * v.c, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i % chunks * kChunk, rows = std::min(kChunk, v.s - row);
      const T* chunk = x + (i / chunks * v.s + row) * v.c;
      int64_t c = 0;
      for (; c + 4 * L <= v.c; c += 4 * L) chunk_moments<4>(chunk + c, rows, v.c, 4 * L, tiny, to + i * v.c + c);
      for (; c < v.c; c += L)
        chunk_moments<1>(chunk + c, rows, v.c, int(std::min<int64_t>(L, v.c - c)), tiny, to + i * v.c + c);
    }
  });
  if (chunks > 1)
    for (int64_t n = 0; n < v.n; ++n)
      for (int64_t k = 0; k < chunks; ++k)
        for (int64_t c = 0; c < v.c; ++c) parts[n * v.c + c].merge(partial[(n * chunks + k) * v.c + c]);
  return parts;
}

// Walk all values a vector at a time. prepare(parameter) loads the parameters of a vector, once for a planar channel;
// step(prepared, j, m) computes the m values at j.
template <class T, class Prepare, class Step>
void each_vector(const View& v, const Prepare& prepare, const Step& step) {
  constexpr int L = Vec<Wide<T>>::lanes;
  if (!v.interleaved) {
    parallel(v.channels(), 2 * v.s, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t k = v.parameter(i), last = (i + 1) * v.s;
        const auto p = prepare([k](const auto& array) { return Vec<Wide<T>>::all(array[k]); });
        int64_t j = i * v.s;
        for (; j + L <= last; j += L) step(p, j, L);
        if (j < last) step(p, j, int(last - j));
      }
    });
    return;
  }
  parallel(v.n * v.s, 2 * v.c, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const int64_t k = v.shared ? 0 : r / v.s * v.c, j = r * v.c;
      int64_t c = 0;
      for (; c + L <= v.c; c += L) step(prepare([&](const auto& array) { return load(array.data() + k + c); }), j + c, L);
      if (const int m = int(v.c - c))
        step(prepare([&](const auto& array) { return load(array.data() + k + c, m); }), j + c, m);
    }
  });
}

// Which positions take part; null for all.
struct Mask {
  Tensor kept;
  const bool* valid = nullptr;
  int64_t each = 1;  // positions that share an entry, where the mask has one for each sample

  Mask(const MaybeTensor& mask, const View& v) {
    if (!mask) return;
    kept = packed(*mask);
    valid = data<bool>(kept);
    each = kept.numel() ? v.n * v.s / kept.numel() : 1;
  }
  bool operator()(const View& v, int64_t n, int64_t s) const { return valid[(n * v.s + s) / each]; }
  // Valid positions of one sample, and of all.
  double count(const View& v, int64_t n) const {
    double in = 0;
    for (int64_t s = 0; s < v.s; ++s) in += (*this)(v, n, s);
    return in;
  }
  double count(const View& v) const {
    double in = 0;
    for (int64_t n = 0; n < v.n; ++n) in += count(v, n);
    return in;
  }
};

// With a mask every loop goes value by value, in double.
template <class T>
std::vector<Part> masked_parts(const T* x, const View& v, const Mask& mask) {
  std::vector<Part> parts(v.channels());
  parallel(v.channels(), 8 * v.s, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = i / v.c, first_j = v.interleaved ? n * v.s * v.c + i % v.c : i * v.s, step = v.interleaved ? v.c : 1;
      Part& p = parts[i];
      for (int64_t s = 0; s < v.s; ++s)
        if (mask(v, n, s)) ++p.count, p.mean += double(get(x + first_j + s * step));
      if (p.count) p.mean /= p.count;
      double rest = 0;
      for (int64_t s = 0; s < v.s; ++s)
        if (mask(v, n, s)) {
          const double d = double(get(x + first_j + s * step)) - p.mean;
          rest += d;
          p.m2 += d * d;
        }
      if (p.count) p.mean += rest / p.count;
    }
  });
  return parts;
}

// One value at a time, in double: every channel where there is a mask, else those with extreme statistics.
// f(j, i, k, in): the value, its sample and channel, its parameters, and whether it is valid.
template <class T, class F>
void each_value(const View& v, const Affine<T>& a, const Mask& mask, const F& f) {
  if (!mask.valid && !a.any_extreme) return;
  parallel(v.channels(), 8 * v.s, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t k = v.parameter(i);
      if (!mask.valid && !a.extreme[k]) continue;
      int64_t j = v.interleaved ? i / v.c * v.s * v.c + i % v.c : i * v.s;
      for (int64_t s = 0; s < v.s; ++s, j += v.interleaved ? v.c : 1) f(j, i, k, !mask.valid || mask(v, i / v.c, s));
    }
  });
}

template <class T>
void transform(const T* x, T* y, const View& v, const Affine<T>& a, const Mask& mask) {
  using V = Vec<Wide<T>>;
  struct Parameters {
    V hi, lo, scale, offset;
  };
  each_vector<T>(
      v, [&](const auto& of) { return Parameters{of(a.hi), of(a.lo), of(a.scale), of(a.offset)}; },
      [&](const Parameters& p, int64_t j, int m) {
        const bool full = m == V::lanes;
        const V r = (((full ? load(x + j) : load(x + j, m)) - p.hi) - p.lo) * p.scale + p.offset;
        full ? store(y + j, r) : store(y + j, r, m);
      });
  each_value(v, a, mask, [&](int64_t j, int64_t, int64_t k, bool in) {
    put(y + j, Wide<T>(in ? (double(get(x + j)) - a.mean[k]) * a.exact_scale[k] + a.exact_offset[k] : 0));
  });
}

// Sums over each sample and channel: of dy, of dy * c and of c, with c = x - hi, which is exact where x is close to hi.
struct GradientSums {
  double dy = 0, dyc = 0, c = 0;

  void operator+=(const GradientSums& b) { dy += b.dy, dyc += b.dyc, c += b.c; }
};

// The sums of N vectors of neighbouring channels, m channels in all, over rows at distance `stride`.
template <int N, class T>
inline void chunk_sums(const T* dy, const T* x, int64_t rows, int64_t stride, int m, const Wide<T>* hi, GradientSums* to) {
  using A = Wide<T>;
  using V = Vec<A>;
  constexpr int L = V::lanes;
  const bool full = m == N * L;
  V h[N], d1[2][N], d2[2][N], d3[2][N];
  A lane[N * L];
  double sums[3][N * L] = {};
  for (int k = 0; k < N; ++k) h[k] = full ? load(hi + k * L) : load(hi, m);
  for (int64_t begin = 0; begin < rows; begin += kRows) {
    const int64_t end = std::min(begin + kRows, rows);
    for (int k = 0; k < N; ++k)
      for (int t = 0; t < 2; ++t) d1[t][k] = d2[t][k] = d3[t][k] = V::all(0);
    const auto add = [&](int64_t i, int t) {
      for (int k = 0; k < N; ++k) {
        const V d = full ? load(dy + i * stride + k * L) : load(dy + i * stride, m);
        const V c = (full ? load(x + i * stride + k * L) : load(x + i * stride, m)) - h[k];
        d1[t][k] = d1[t][k] + d;
        d2[t][k] = d2[t][k] + d * c;
        d3[t][k] = d3[t][k] + c;
      }
    };
    int64_t i = begin;
    for (; i + 2 <= end; i += 2) add(i, 0), add(i + 1, 1);
    if (i < end) add(i, 0);
    int which = 0;
    for (auto* d : {&d1, &d2, &d3}) {
      for (int k = 0; k < N; ++k) store(lane + k * L, (*d)[0][k] + (*d)[1][k]);
      for (int c = 0; c < N * L; ++c) sums[which][c] += double(lane[c]);
      ++which;
    }
  }
  for (int c = 0; c < m; ++c) to[c] = {sums[0][c], sums[1][c], sums[2][c]};
}

// Move the lanes of a sum to double.
template <class A>
inline void add_lanes(double* to, const Vec<A>& v) {
  A lane[Vec<A>::lanes];
  store(lane, v);
  for (int k = 0; k < Vec<A>::lanes; ++k) to[k] += double(lane[k]);
}

template <class T>
void vector_sums(const T* dy, const T* x, const View& v, const Affine<T>& a, std::vector<GradientSums>& sums) {
  using A = Wide<T>;
  using V = Vec<A>;
  constexpr int L = V::lanes;
  if (!v.interleaved) {
    parallel(v.channels(), 2 * v.s, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const V hi = V::all(a.hi[v.parameter(i)]);
        double s1[L] = {}, s2[L] = {}, s3[L] = {};
        for (int64_t begin_j = 0; begin_j < v.s; begin_j += kRun) {
          const int64_t last = std::min(begin_j + kRun, v.s);
          V d1[2], d2[2], d3[2];
          for (int k = 0; k < 2; ++k) d1[k] = d2[k] = d3[k] = V::all(0);
          int k = 0;
          for (int64_t j = begin_j; j < last; j += L, k ^= 1) {
            const int m = int(std::min<int64_t>(L, last - j));
            const T *px = x + i * v.s + j, *pd = dy + i * v.s + j;
            const V d = m == L ? load(pd) : load(pd, m);
            const V c = m == L ? load(px) - hi : first(load(px, m) - hi, m);
            d1[k] = d1[k] + d;
            d2[k] = d2[k] + d * c;
            d3[k] = d3[k] + c;
          }
          add_lanes(s1, d1[0] + d1[1]), add_lanes(s2, d2[0] + d2[1]), add_lanes(s3, d3[0] + d3[1]);
        }
        for (int k = 0; k < L; ++k) sums[i] += {s1[k], s2[k], s3[k]};
      }
    });
    return;
  }
  const int64_t chunks = chunks_of(v);
  std::vector<GradientSums> partial(v.n * chunks * v.c);
  parallel(v.n * chunks, 2 * std::min(v.s, kChunk) * v.c, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = i / chunks, row = i % chunks * kChunk, rows = std::min(kChunk, v.s - row);
      const int64_t j = (n * v.s + row) * v.c, k = v.parameter(n * v.c);
      int64_t c = 0;
      for (; c + 2 * L <= v.c; c += 2 * L)
        chunk_sums<2>(dy + j + c, x + j + c, rows, v.c, 2 * L, a.hi.data() + k + c, partial.data() + i * v.c + c);
      for (; c < v.c; c += L)
        chunk_sums<1>(dy + j + c, x + j + c, rows, v.c, int(std::min<int64_t>(L, v.c - c)), a.hi.data() + k + c,
                      partial.data() + i * v.c + c);
    }
  });
  for (int64_t n = 0; n < v.n; ++n)
    for (int64_t k = 0; k < chunks; ++k)
      for (int64_t c = 0; c < v.c; ++c) sums[n * v.c + c] += partial[(n * chunks + k) * v.c + c];
}

template <class T>
std::vector<GradientSums> gradient_sums(const T* dy, const T* x, const View& v, const Affine<T>& a, const Mask& mask) {
  std::vector<GradientSums> sums(v.channels());
  if (!mask.valid) vector_sums(dy, x, v, a, sums);
  if (a.any_extreme)
    for (int64_t i = 0; i < v.channels(); ++i)
      if (a.extreme[v.parameter(i)]) sums[i] = {};
  each_value(v, a, mask, [&](int64_t j, int64_t i, int64_t k, bool in) {
    if (!in) return;
    const double d = get(dy + j), c = double(get(x + j)) - double(a.hi[k]);
    sums[i] += {d, d * c, c};
  });
  return sums;
}

// dx = dy * scale - c * beta - offset, with c = x - hi.
template <class T>
void gradient(const T* dy, const T* x, T* dx, const View& v, const Affine<T>& a, const Mask& mask) {
  using V = Vec<Wide<T>>;
  struct Parameters {
    V hi, scale, offset, beta;
  };
  each_vector<T>(
      v, [&](const auto& of) { return Parameters{of(a.hi), of(a.scale), of(a.offset), of(a.beta)}; },
      [&](const Parameters& p, int64_t j, int m) {
        const bool full = m == V::lanes;
        const V c = (full ? load(x + j) : load(x + j, m)) - p.hi;
        const V r = ((full ? load(dy + j) : load(dy + j, m)) * p.scale - p.offset) - c * p.beta;
        full ? store(dx + j, r) : store(dx + j, r, m);
      });
  each_value(v, a, mask, [&](int64_t j, int64_t, int64_t k, bool in) {
    const double c = double(get(x + j)) - double(a.hi[k]);
    put(dx + j, Wide<T>(in ? double(get(dy + j)) * a.exact_scale[k] - a.exact_offset[k] - c * a.exact_beta[k] : 0));
  });
}

// x as (N, C, S) in memory that the loops can walk: as it lies, or copied.
struct Channels {
  Tensor x;
  View view;
  bool copied;

  Channels(const Tensor& input, bool across_samples) : x(input), view{}, copied(false) {
    const int64_t n = x.size(0), c = x.size(1), s = n && c ? x.numel() / (n * c) : 0;
    const bool last = channels_last();
    if (!x.is_contiguous() && !last) x = torch::stable::contiguous(x), copied = true;
    const bool interleaved = last || s == 1;
    view = interleaved && across_samples ? View{1, c, n * s, true, true} : View{n, c, s, interleaved, across_samples};
  }

  // A tensor with the shape of x, in its order of memory.
  Tensor like() const { return torch::stable::empty_like(x); }
  Tensor in_order(const Tensor& t) const {
    const auto a = t.strides(), b = x.strides();
    if (std::equal(a.begin(), a.end(), b.begin(), b.end())) return t;
    Tensor r = like();
    torch::stable::copy_(r, t);
    return r;
  }
 private:
  bool channels_last() const {
    if (x.dim() < 3 || x.numel() == 0 || x.stride(1) != 1) return false;
    int64_t expected = x.size(1);
    for (int64_t i = x.dim() - 1; i >= 2; --i) {
      if (x.size(i) != 1 && x.stride(i) != expected) return false;
      expected *= x.size(i);
    }
    return x.size(0) == 1 || x.stride(0) == expected;
  }
};

template <class P>
inline double at(const P* p, int64_t i, double otherwise) {
  return p ? double(p[i]) : otherwise;
}

inline Tensor rounded(const std::vector<double>& values, const Tensor& like, ScalarType type) {
  Tensor t = empty(like, {int64_t(values.size())}, type);
  with_type(t, [&](auto tag) {
    using P = decltype(tag);
    for (size_t i = 0; i < values.size(); ++i) put(out<P>(t) + i, Wide<P>(values[i]));
  });
  return t;
}

}  // namespace normwise
