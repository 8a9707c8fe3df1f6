// The loops that group_norm, instance_norm and batch_norm share. They see x as (N, C, S), in either order of memory:
// planar (S innermost, NCHW) or interleaved (C innermost, NHWC).
#pragma once

#include <atomic>
#include <vector>

#include "exact_sum.h"
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

// What keeps an operator over channels within its arguments' memory.
inline void check_channels(const Tensor& x, double eps, const MaybeTensor& weight, const MaybeTensor& bias,
                           const MaybeTensor& mask) {
  check_input(x, eps);
  const Sizes sizes = x.sizes();
  STD_TORCH_CHECK(sizes.size() >= 2, "normwise: x must have the axes (N, C, ...).");
  check_parameter(sizes.slice(1, 1), weight);
  check_parameter(sizes.slice(1, 1), bias);
  if (!mask) return;
  const Sizes valid = mask->sizes();
  STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Bool && mask->is_cpu() && !valid.empty() && valid[0] == sizes[0] &&
                      (valid.size() == 1 || valid.slice(1) == sizes.slice(2)),
                  "normwise: mask must be boolean, (N) or (N, ...), on the CPU.");
}

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
  // Call f for all samples and chunks, with the parts of their channels.
  template <class F>
  void each_row(const F& f) const {
    for (size_t from = 0; from < parts.size(); from += channels) f(parts.data() + from);
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
    if (v.s <= kShort && !mask) {
      for (int64_t i = begin; i < end; i += 8)
        short_parts(x + i * v.s, v.s, std::min<int64_t>(8, end - i), eps, &r.parts[i]);
      return;
    }
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
  void forward(int64_t i, const Statistics<T>& of, double s, double o) { set(i, of, s, o - of.lo() * s, o, 0); }
  void backward(int64_t i, const Statistics<T>& of, double s, double b, double o) {
    set(i, of, s, o - of.lo() * b, o, b);
  }
  // For the sums of the gradients: of dy * (c * scale).
  void center(int64_t i, const Statistics<T>& of) { set(i, of, of.unit(), 0, 0, 0); }

 private:
  void set(int64_t i, const Statistics<T>& of, double s, double o, double exact_o, double b) {
    const size_t k = i;
    hi[k] = of.hi, scale[k] = A(s), offset[k] = A(o), slope[k] = A(b);
    if (sizeof(A) == 8) return;
    extreme[k] = of.extreme;
    if (!of.extreme) return;
    exact[k] = {of.mean, s, exact_o, b};
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
      each_overlapping_vector<L>(v.c, [=](int64_t c, auto m) NORMWISE_INLINE {
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
      each_overlapping_vector<L>(v.s, [=](int64_t s, auto m) NORMWISE_INLINE {
        V r = vector(p, j + s, m);
        if (keep) r = unless_negative_or_zero(load_up_to(keep + s, m), r);
        store_up_to(out + j + s, r, m);
      });
    }
}

// f(first, last) for channels whose parts are merged side by side: they lie side by side.
constexpr int64_t kMerged = Terms::kSide;
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

// Sums over each sample and channel, of dy and of dy * c, with c = (x - hi) * unit.
struct GradientSums {
  double dy = 0, dyc = 0;

  void operator+=(const GradientSums& b) { dy += b.dy, dyc += b.dyc; }
};

// How they are taken, with the hi and unit (its scale) of an Affine.
template <class T>
class GradientSum {
 public:
  using A = Wide<T>;
  using V = Vec<A>;

  GradientSum(const Upstream<T>& dy, const T* x, const View& v, const Affine<T>& a, const Mask& mask)
      : dy_(dy), x_(x), v_(v), a_(a), mask_(mask) {}

  // Of every sample and channel; then(begin, end) follows the sums of some lines, while these are in the cache.
  template <class Then>
  ByChannel<GradientSums> all(const Then& then) const {
    if (v_.interleaved)
      return by_chunk<GradientSums>(v_, [&](int64_t n, int64_t row, int64_t rows, GradientSums* to) {
        of_rows(n, row, rows, to);
        then(n * v_.s + row, n * v_.s + row + rows);
      });
    ByChannel<GradientSums> r(v_);
    parallel(v_.channels(), 2 * v_.s, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i += 8) {
        of_lines(i, std::min(i + 8, end), r.parts.data());
        then(i, std::min(i + 8, end));
      }
    });
    return r;
  }
  ByChannel<GradientSums> all() const {
    return all([](int64_t, int64_t) {});
  }

  // Of the planar channels from `begin` to `end`.
  void of_lines(int64_t begin, int64_t end, GradientSums* to) const {
    if (v_.s <= kShort && !mask_) {
      for (int64_t i = begin; i < end; i += 8) of_short_lines(i, std::min<int64_t>(8, end - i), to + i);
      return;
    }
    std::vector<A> kept;
    for (int64_t i = begin; i < end; ++i) {
      if (mask_ && (i == begin || i % v_.c == 0)) kept = mask_.template as<A>(i / v_.c);
      to[i] = of_line(i, mask_ ? kept.data() : nullptr);
    }
  }

 private:
  GradientSums of_line(int64_t i, const A* const kept) const {
    const int64_t k = a_.index(i), j = i * v_.s;
    if (a_.any_extreme && a_.extreme[k]) return exactly(j, v_.s, 1, k, kept);
    const V hi = V::all(a_.hi[k]), unit = V::all(a_.scale[k]);
    const auto factors = [=, dy = dy_, x = x_](int64_t s, auto m) NORMWISE_INLINE {
      const V d = dy(j + s, m), c = first_up_to(load_up_to(x + j + s, m) - hi, m) * unit;
      if (!kept) return Factors<A>{d, c};
      const V keep = load_up_to(kept + s, m);
      return Factors<A>{unless_negative_or_zero(keep, d), unless_negative_or_zero(keep, c)};
    };
    GradientSums r;
    sum_line<true, A>(v_.s, factors, r.dy, r.dyc);
    return r;
  }

  void of_short_lines(int64_t first_line, int64_t lines, GradientSums* to) const {
    double one[8], two[8];
    V hi[8], unit[8];
    for (int64_t k = 0; k < lines; ++k) {
      const int64_t at = a_.index(first_line + k);
      hi[k] = V::all(a_.hi[at]), unit[k] = V::all(a_.scale[at]);
    }
    const auto factors = [&, dy = dy_, x = x_, size = v_.s](int64_t k, int64_t s, auto m) NORMWISE_INLINE {
      const int64_t j = (first_line + k) * size + s;
      return Factors<A>{dy(j, m), first_up_to(load_up_to(x + j, m) - hi[k], m) * unit[k]};
    };
    sum_short_lines<A>(v_.s, lines, factors, one, two);
    for (int64_t k = 0; k < lines; ++k) {
      const int64_t at = a_.index(first_line + k);
      const bool extreme = a_.any_extreme && a_.extreme[at];
      to[k] = extreme ? exactly<A>((first_line + k) * v_.s, v_.s, 1, at, nullptr) : GradientSums{one[k], two[k]};
    }
  }

  // Of interleaved rows of sample n, for all channels.
  void of_rows(int64_t n, int64_t first_row, int64_t rows, GradientSums* to) const {
    const int64_t c = v_.c, from = (n * v_.s + first_row) * c, k = a_.shared ? 0 : n * c;
    const bool* const valid = mask_ ? mask_.of(n) + first_row : nullptr;
    const A *const hi = a_.hi.data() + k, *const unit = a_.scale.data() + k;
    std::vector<double> sums(2 * c);
    const auto factors = [=, dy = dy_, x = x_](int64_t row, int64_t at, auto m) NORMWISE_INLINE {
      const int64_t j = from + row * c + at;
      return Factors<A>{dy(j, m), (load_up_to(x + j, m) - load_up_to(hi + at, m)) * load_up_to(unit + at, m)};
    };
    sum_columns<A>(rows, valid, c, factors, sums.data(), sums.data() + c);
    for (int64_t i = 0; i < c; ++i) to[i] = {sums[i], sums[c + i]};
    for (int64_t i = 0; a_.any_extreme && i < c; ++i)
      if (a_.extreme[k + i]) to[i] = exactly(from + i, rows, c, k + i, valid);
  }

  // Of `count` values from j, `stride` apart, in double. `kept` says which take part, null for all.
  template <class Kept>
  GradientSums exactly(int64_t j, int64_t count, int64_t stride, int64_t k, const Kept* kept) const {
    const double hi = a_.hi[k], unit = a_.exact[k].scale;
    GradientSums r;
    for (int64_t i = 0; i < count; ++i, j += stride)
      if (!kept || kept[i] > 0) r += {dy_.one(j), dy_.one(j) * ((double(get(x_ + j)) - hi) * unit)};
    return r;
  }

  const Upstream<T>& dy_;
  const T* x_;
  const View& v_;
  const Affine<T>& a_;
  const Mask& mask_;
};

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
    each_overlapping_vector<Vec<Wide<T>>::lanes>(
        (end - begin) * length_of(v), [up = dy, to = dresidual, from](int64_t j, auto m)
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
