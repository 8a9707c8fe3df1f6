// The loops that group_norm, instance_norm and batch_norm share. They see x as (N, C, S), in either order of memory:
// planar (S innermost, NCHW) or interleaved (C innermost, NHWC).
#pragma once

#include <atomic>
#include <vector>

#include "moments.h"
#include "tensor.h"

namespace normwise {

struct View {
  int64_t n, c, s;
  bool interleaved;
  bool one_sample = false;  // made of many

  int64_t channels() const { return n * c; }
  int64_t values() const { return n * c * s; }
};

// A copy without the gaps between samples, so that a sample's sums have the same order with and without its neighbours.
inline Tensor packed_channels_last(const Tensor& x) {
  std::vector<int64_t> strides(x.dim(), 1);
  int64_t expected = x.size(1);
  for (int64_t i = x.dim() - 1; i >= 2; --i) strides[i] = expected, expected *= x.size(i);
  strides[0] = expected;
  return copy_with(x, strides);
}

// x as (N, C, S) in memory that the loops can walk: as it lies, or copied.
struct Channels {
  Tensor x;
  View view{};
  bool copied = false;

  explicit Channels(const Tensor& input) : x(input) {
    const int64_t n = x.size(0), c = x.size(1), s = n && c ? x.numel() / (n * c) : 0;
    const bool last = channels_last();
    copied = !x.is_contiguous() && !last;
    if (copied) x = c > 1 && x.stride(1) == 1 ? packed_channels_last(x) : torch::stable::contiguous(x);
    view = {n, c, s, last || s == 1 || (copied && x.stride(1) == 1)};
  }

  Tensor in_order(const Tensor& t) const { return in_order_of(x, t); }
  MaybeTensor in_order(const MaybeTensor& t) const { return t ? MaybeTensor(in_order(*t)) : t; }

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

// Which positions take part: (N, S), or everything.
class Mask {
 public:
  Mask(const MaybeTensor& mask, const View& v) : s_(v.s) {
    if (!mask) return;
    const Tensor given = packed(*mask);
    const int64_t each = given.numel() ? v.n * v.s / given.numel() : 1;  // positions that share an entry
    valid_.resize(v.n * v.s);
    for (int64_t i = 0; i < v.n * v.s; ++i) valid_[i] = data<bool>(given)[i / each];
  }
  explicit operator bool() const { return !valid_.empty(); }
  // The entries of a sample, null if all take part.
  const bool* of(int64_t n) const {
    return valid_.empty() ? nullptr : reinterpret_cast<const bool*>(valid_.data()) + n * s_;
  }
  double count(int64_t n) const { return double(std::count(of(n), of(n) + s_, true)); }
  double count() const { return double(std::count(valid_.begin(), valid_.end(), 1)); }
  // The same in the type of the values, for vectors; empty if all take part.
  template <class A>
  std::vector<A> as(int64_t n) const {
    return valid_.empty() ? std::vector<A>{} : std::vector<A>(of(n), of(n) + s_);
  }

 private:
  int64_t s_;
  std::vector<char> valid_;
};

constexpr int64_t kRun = 128;  // values of a planar run, whose sums are taken in A

// A result for each sample and channel, of type R that += can merge. Long interleaved channels come in several chunks.
template <class R>
struct ByChannel {
  int64_t channels, chunks;
  Array<R> parts;

  ByChannel(const View& v, int64_t chunks_of_rows = 1)
      : channels(v.c), chunks(chunks_of_rows), parts(v.channels() * chunks) {}
  // Call f for the chunks of channel c of sample n.
  template <class F>
  void each(int64_t n, int64_t c, const F& f) const {
    for (int64_t k = n * chunks; k < (n + 1) * chunks; ++k) f(parts[k * channels + c]);
  }
  // Call f(part, channel - first) for all samples and chunks of some channels, as they lie in memory.
  template <class F>
  void each_of(int64_t first, int64_t last, const F& f) const {
    for (size_t from = 0; from < parts.size(); from += channels)
      for (int64_t c = first; c < last; ++c) f(parts[from + c], c - first);
  }
};

// Rows of a chunk, which one task sums in order: many enough to be worth it, few enough to leave work for all threads.
inline int64_t chunk_rows(const View& v) {
  return std::clamp<int64_t>((v.s / 16 + 7) / 8 * 8, v.one_sample ? 64 : 512, 1024);
}

// Results from make(sample, first row, rows, to) for every chunk of interleaved rows.
template <class R, class Make>
ByChannel<R> by_chunk(const View& v, const Make& make) {
  const int64_t size = chunk_rows(v), chunks = (v.s + size - 1) / size;
  ByChannel<R> r(v, chunks);
  parallel(v.n * chunks, 2 * std::min(v.s, size) * v.c, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i % chunks * size;
      make(i / chunks, row, std::min(size, v.s - row), r.parts.data() + i * v.c);
    }
  });
  return r;
}

// The sums of every sample and channel.
template <class T>
ByChannel<Part> channel_parts(const T* x, const View& v, const Mask& mask, double eps) {
  if (v.interleaved)
    return by_chunk<Part>(v, [&](int64_t n, int64_t row, int64_t rows, Part* to) {
      const bool* valid = mask.of(n);
      column_parts(x + (n * v.s + row) * v.c, rows, v.c, v.c, true, valid ? valid + row : nullptr, eps, to);
    });
  ByChannel<Part> r(v);
  parallel(v.channels(), v.s, [&](int64_t begin, int64_t end) {
    std::vector<Wide<T>> kept;
    for (int64_t i = begin; i < end; ++i) {
      if (mask && (i == begin || i % v.c == 0)) kept = mask.as<Wide<T>>(i / v.c);
      r.parts[i] = part_of(x + i * v.s, v.s, true, eps, mask ? kept.data() : nullptr);
    }
  });
  return r;
}

// How the values of a channel are transformed, for each sample or for all alike. With c = x - hi,
// forward: c * scale + offset; backward: dy * scale - c * slope - offset.
template <class T>
struct Affine {
  using A = Wide<T>;
  struct Exact {
    double mean, scale, offset, slope;
  };
  int64_t c;
  bool shared;
  Array<A> hi, scale, offset, slope;
  Array<Exact> exact;  // the same in double, with c = x - mean, where A cannot hold the statistics
  Array<char> extreme;
  std::atomic<bool> any_extreme = false;

  Affine(const View& v, bool one_for_all) : c(v.c), shared(one_for_all) {
    const int64_t n = shared ? v.c : v.channels();
    for (auto* array : {&hi, &scale, &offset, &slope}) array->resize(n);
    if (sizeof(A) == 4) exact.resize(n), extreme.resize(n);
  }
  int64_t index(int64_t channel) const { return shared ? channel % c : channel; }

  // The arguments belong to c = x - mean; what the mean has beside hi goes into the offset.
  void forward(int64_t i, double mean, double var, double rstd, double s, double o) {
    set(i, mean, var, rstd, s, o, 0, -s);
  }
  void backward(int64_t i, double mean, double var, double rstd, double s, double b, double o) {
    set(i, mean, var, rstd, s, o, b, -b);
  }

 private:
  void set(int64_t i, double mean, double var, double rstd, double s, double o, double b, double shift) {
    const size_t k = i;
    hi[k] = high<T>(mean, std::sqrt(var));
    scale[k] = A(s);
    offset[k] = A(o + (mean - double(hi[k])) * shift);
    slope[k] = A(b);
    if (sizeof(A) == 8) return;
    const bool lost = var > 0 && var < 1e-70;  // dy * c would be too small for a float
    extreme[k] = lost || is_extreme<T>(mean, rstd);
    if (!extreme[k]) return;
    exact[k] = {mean, s, o, b};
    any_extreme.store(true, std::memory_order_relaxed);
  }
};

// out[j] = vector(parameters, j, m) for m values from j, for the lines from `begin` to `end`: planar channels or
// interleaved rows. scalar(exact parameters, j) gives one value where A cannot hold the statistics. Where the mask says
// no it is zero.
template <class T, class Vector, class Scalar>
void lines(T* const out, const View& view, const Affine<T>& a, const Mask& mask, int64_t begin, int64_t end,
           const Vector vector, const Scalar scalar) {
  using A = Wide<T>;
  using V = Vec<A>;
  constexpr int L = V::lanes;
  struct Parameters {
    V hi, scale, offset, slope;
  };
  const View v = view;
  const A *const hi = a.hi.data(), *const scale = a.scale.data(), *const offset = a.offset.data(),
                 *const slope = a.slope.data();
  const bool extremes = a.any_extreme, masked = bool(mask), shared = a.shared;
  std::vector<A> kept;
  if (v.interleaved)
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = i / v.s, j = i * v.c, k = shared ? 0 : n * v.c;
      if (masked && !mask.of(n)[i % v.s]) {
        std::fill_n(out + j, v.c, T{});
        continue;
      }
      each_vector<L>(v.c, [=](int64_t c, auto m) NORMWISE_INLINE {
        const Parameters p{load_up_to(hi + k + c, m), load_up_to(scale + k + c, m), load_up_to(offset + k + c, m),
                           load_up_to(slope + k + c, m)};
        store_up_to(out + j + c, vector(p, j + c, m), m);
      });
      for (int64_t c = 0; extremes && c < v.c; ++c)
        if (a.extreme[k + c]) put(out + j + c, A(scalar(a.exact[k + c], j + c)));
    }
  else
    for (int64_t i = begin, k = a.index(begin); i < end; ++i, k = shared && k + 1 == v.c ? 0 : k + 1) {
      const int64_t j = i * v.s;
      if (masked && (i == begin || i % v.c == 0)) kept = mask.as<A>(i / v.c);
      if (extremes && a.extreme[k]) {
        for (int64_t s = 0; s < v.s; ++s) put(out + j + s, A(!masked || kept[s] > 0 ? scalar(a.exact[k], j + s) : 0));
        continue;
      }
      const Parameters p{V::all(hi[k]), V::all(scale[k]), V::all(offset[k]), V::all(slope[k])};
      const A* const keep = masked ? kept.data() : nullptr;
      each_vector<L>(v.s, [=](int64_t s, auto m) NORMWISE_INLINE {
        V r = vector(p, j + s, m);
        if (keep) r = unless_negative_or_zero(load_up_to(keep + s, m), r);
        store_up_to(out + j + s, r, m);
      });
    }
}

// f(first, last) for channels whose parts are merged side by side: they lie side by side.
constexpr int64_t kMerged = 8;
template <class F>
void each_merged(int64_t channels, int64_t parts_each, const F& f) {
  parallel((channels + kMerged - 1) / kMerged, 64 * kMerged * parts_each, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) f(b * kMerged, std::min((b + 1) * kMerged, channels));
  });
}

inline int64_t lines_of(const View& v) { return v.interleaved ? v.n * v.s : v.channels(); }
inline int64_t length_of(const View& v) { return v.interleaved ? v.c : v.s; }

// y = c * scale + offset, plus a residual, without what is negative: for the lines from `begin` to `end`.
template <class T>
struct Forward {
  const T* x;
  T* y;
  const T* residual = nullptr;
  bool relu = false;

  void operator()(const View& v, const Affine<T>& a, const Mask& mask, int64_t begin, int64_t end) const {
    const T *const in = x, *const added = residual;
    const auto plain = [in](const auto& p, int64_t j, auto m)
                           NORMWISE_INLINE { return fma(load_up_to(in + j, m) - p.hi, p.scale, p.offset); };
    const auto exact = [in](const auto& p, int64_t j) { return (double(get(in + j)) - p.mean) * p.scale + p.offset; };
    if (!relu) return lines(y, v, a, mask, begin, end, plain, exact);
    lines(
        y, v, a, mask, begin, end,
        [=](const auto& p, int64_t j, auto m) NORMWISE_INLINE {
          const auto r = plain(p, j, m), sum = added ? r + load_up_to(added + j, m) : r;
          return unless_negative_or_zero(sum, sum);
        },
        [=](const auto& p, int64_t j) {
          const double r = exact(p, j) + (added ? double(get(added + j)) : 0);
          return r <= 0 ? 0 : r;
        });
  }
};

// dy as it arrives at the norm: through a relu, if y tells where that was open.
template <class T>
struct Upstream {
  const T* dy;
  const T* y = nullptr;

  template <class M>
  NORMWISE_INLINE Vec<Wide<T>> operator()(int64_t j, M m) const {
    const auto d = load_up_to(dy + j, m);
    return y ? unless_negative_or_zero(load_up_to(y + j, m), d) : d;
  }
  double one(int64_t j) const { return y && get(y + j) <= 0 ? 0 : double(get(dy + j)); }
};

// Sums over each sample and channel, of dy and of dy * c with c = x - hi.
struct GradientSums {
  double dy = 0, dyc = 0;

  void operator+=(const GradientSums& b) { dy += b.dy, dyc += b.dyc; }
};

// The sums of the planar channel i.
template <class T>
GradientSums line_sums(const Upstream<T> dy, const T* const x, const View& v, int64_t i, double hi, bool extreme,
                       const Wide<T>* kept) {
  using A = Wide<T>;
  using V = Vec<A>;
  constexpr int L = V::lanes;
  constexpr std::integral_constant<int, L> full;
  GradientSums r;
  const int64_t j = i * v.s;
  if (extreme) {
    for (int64_t s = 0; s < v.s; ++s)
      if (!kept || kept[s] > 0) r += {dy.one(j + s), dy.one(j + s) * (double(get(x + j + s)) - hi)};
    return r;
  }
  const V h = V::all(A(hi));
  for (int64_t begin = 0; begin < v.s; begin += kRun) {
    const int64_t end = std::min(begin + kRun, v.s);
    V one[2] = {V::all(0), V::all(0)}, two[2] = {V::all(0), V::all(0)};
    for (int64_t s = begin; s < end;)
      for (int k = 0; k < 2 && s < end; ++k, s += L) {
        const int m = int(std::min<int64_t>(L, end - s));
        V d = m == L ? dy(j + s, full) : dy(j + s, m);
        V c = (m == L ? load(x + j + s) : load(x + j + s, m)) - h;
        if (kept) {
          const V keep = load(kept + s, m);
          d = unless_negative_or_zero(keep, d), c = unless_negative_or_zero(keep, c);
        }
        one[k] = one[k] + d;  // lanes from m on are zero
        two[k] = fma(d, m == L ? c : first(c, m), two[k]);
      }
    r += {sum(one[0] + one[1]), sum(two[0] + two[1])};
  }
  return r;
}

// The sums of interleaved rows, for all channels.
template <class T>
void row_sums(const Upstream<T> dy, const T* const x, int64_t first_row, int64_t rows, const bool* valid,
              const Wide<T>* const hi, int64_t c, GradientSums* to) {
  using V = Vec<Wide<T>>;
  constexpr int L = V::lanes;
  std::vector<double> sums(2 * c);
  double *const one = sums.data(), *const two = one + c;
  each_eight(x + first_row * c, rows, c, valid, [=](const T* const* row, auto k) {
    each_vector<L>(c, [=](int64_t at, auto m) NORMWISE_INLINE {
      const V h = load_up_to(hi + at, m);
      V d[decltype(k)::value], product = V::all(0);
      for (int i = 0; i < k; ++i) {
        d[i] = dy(row[i] - x + at, m);
        product = fma(d[i], load_up_to(row[i] + at, m) - h, product);
      }
      add_to(one + at, tree_of(d), m);
      add_to(two + at, product, m);
    });
  });
  for (int64_t i = 0; i < c; ++i) to[i] = {one[i], two[i]};
}

template <class T>
ByChannel<GradientSums> gradient_sums(const Upstream<T>& dy, const T* x, const View& v, const Affine<T>& a,
                                      const Mask& mask) {
  const auto exactly = [&](int64_t i, int64_t first_row, int64_t rows) {  // one interleaved channel of sample i / c
    GradientSums r;
    for (int64_t s = first_row; s < first_row + rows; ++s)
      if (!mask || mask.of(i / v.c)[s]) {
        const int64_t j = (i / v.c * v.s + s) * v.c + i % v.c;
        r += {dy.one(j), dy.one(j) * (double(get(x + j)) - double(a.hi[a.index(i)]))};
      }
    return r;
  };
  if (v.interleaved)
    return by_chunk<GradientSums>(v, [&](int64_t n, int64_t row, int64_t rows, GradientSums* to) {
      const bool* valid = mask.of(n);
      row_sums(dy, x, n * v.s + row, rows, valid ? valid + row : nullptr, &a.hi[(a.shared ? 0 : n * v.c)], v.c, to);
      if (a.any_extreme)
        for (int64_t c = 0; c < v.c; ++c)
          if (a.extreme[a.index(n * v.c + c)]) to[c] = exactly(n * v.c + c, row, rows);
    });
  ByChannel<GradientSums> r(v);
  parallel(v.channels(), 2 * v.s, [&](int64_t begin, int64_t end) {
    std::vector<Wide<T>> kept;
    for (int64_t i = begin; i < end; ++i) {
      const size_t k = a.index(i);
      if (mask && (i == begin || i % v.c == 0)) kept = mask.as<Wide<T>>(i / v.c);
      r.parts[i] = line_sums(dy, x, v, i, double(a.hi[k]), a.any_extreme && a.extreme[k], mask ? kept.data() : nullptr);
    }
  });
  return r;
}

// dx = dy * scale - c * slope - offset, for the lines from `begin` to `end`.
template <class T>
struct Gradient {
  Upstream<T> dy;
  const T* x;
  T* dx;
  T* dresidual = nullptr;
  bool fixed = false;  // the statistics are constants: dx = dy * scale

  void operator()(const View& v, const Affine<T>& a, const Mask& mask, int64_t begin, int64_t end) const {
    if (fixed)
      lines(
          dx, v, a, mask, begin, end,
          [up = dy](const auto& p, int64_t j, auto m) NORMWISE_INLINE { return up(j, m) * p.scale; },
          [up = dy](const auto& p, int64_t j) { return up.one(j) * p.scale; });
    else
      lines(
          dx, v, a, mask, begin, end,
          [up = dy, in = x](const auto& p, int64_t j, auto m)
              NORMWISE_INLINE { return (up(j, m) * p.scale - p.offset) - (load_up_to(in + j, m) - p.hi) * p.slope; },
          [up = dy, in = x](const auto& p, int64_t j) {
            return up.one(j) * p.scale - p.offset - (double(get(in + j)) - p.mean) * p.slope;
          });
    if (dresidual) pass_residual(v, begin, end);
  }

 private:
  void pass_residual(const View& v, int64_t begin, int64_t end) const {
    const int64_t from = begin * length_of(v);
    each_vector<Vec<Wide<T>>::lanes>((end - begin) * length_of(v),
                                     [up = dy, to = dresidual, from](int64_t j, auto m)
                                         NORMWISE_INLINE { store_up_to(to + from + j, up(from + j, m), m); });
  }
};

template <class P>
inline double at(const P* p, int64_t i, double otherwise) {
  return p ? double(p[i]) : otherwise;
}

inline Tensor rounded(const std::vector<double>& values, ScalarType type) {
  Tensor t = empty({int64_t(values.size())}, type);
  with_type(t, [&](auto tag) {
    using P = decltype(tag);
    for (size_t i = 0; i < values.size(); ++i) put(out<P>(t) + i, Wide<P>(values[i]));
  });
  return t;
}

}  // namespace normwise
