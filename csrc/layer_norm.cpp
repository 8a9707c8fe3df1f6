// layer_norm and rms_norm, and both after an addition: every row of `cols` values has its own statistics.
#include "moments.h"
#include "tensor.h"

namespace normwise {
namespace {

constexpr int64_t kTile = 64;  // columns of a planar tile

// x as rows of `cols` values in memory that the loops can walk: packed, or planar, where the values of a row lie
// `inner` apart and neighbouring rows next to each other, as the channels of an image do.
struct Rows {
  Tensor x;
  int64_t rows, cols = 1, inner = 1;
  bool copied;
  Sizes kept, shape;  // of the axes that number the rows, and of those that are normalized; in the memory of the input

  Rows(const Tensor& input, int64_t k) : x(input), copied(!input.is_contiguous()) {
    const Sizes all = input.sizes();
    kept = all.slice(0, all.size() - size_t(k)), shape = all.slice(all.size() - size_t(k));
    for (const int64_t size : shape) cols *= size;
    rows = cols ? x.numel() / cols : 0;
    if (!copied) return;
    inner = k == 1 ? planes() : 1;
    copied = inner == 1 || (x.size(0) > 1 && x.stride(0) != inner * cols);
    if (inner == 1)
      x = torch::stable::contiguous(x);
    else if (copied)
      x = without_gaps();
  }
  Tensor in_order(const Tensor& t) const { return in_order_of(x, t); }
  int64_t tiles() const { return (inner + kTile - 1) / kTile; }

 private:
  int64_t planes() const {
    if (x.dim() < 3 || x.numel() == 0) return 1;
    int64_t expected = 1;
    for (int64_t i = x.dim() - 2; i > 0; --i) {
      if (x.size(i) != 1 && x.stride(i) != expected) return 1;
      expected *= x.size(i);
    }
    return x.stride(x.dim() - 1) == expected ? expected : 1;
  }
  // A copy in which the samples follow each other.
  Tensor without_gaps() const {
    std::vector<int64_t> strides(x.strides().begin(), x.strides().end());
    strides[0] = inner * cols;
    return copy_with(x, strides);
  }
};

template <class T>
Statistics<T> statistics(const Part& p, bool centred, double eps) {
  const double square = centred ? p.var() : p.count ? p.squares / p.count : 0;
  return {centred ? p.mean() : 0, 1 / std::sqrt(square + eps), square};
}

template <class T>
struct Forward {
  using A = Wide<T>;
  using V = Vec<A>;
  static constexpr int L = V::lanes;
  const A *weight, *bias;
  bool centred;
  double eps;

  double one(const T* x, const Statistics<T>& s, int64_t c) const {
    const double y = (double(get(x)) - s.mean) * s.rstd * (weight ? double(weight[c]) : 1);
    return y + (bias ? double(bias[c]) : 0);
  }

  Statistics<T> row(const T* x, T* y, int64_t cols) const {
    const auto s = statistics<T>(part_of(x, cols, centred, eps), centred, eps);
    if (s.extreme) {
      for (int64_t c = 0; c < cols; ++c) put(y + c, A(one(x + c, s, c)));
      return s;
    }
    const V hi = V::all(s.hi), scale = V::all(s.scale), rest = V::all(s.rest);
    const A *const ws = weight, *const bs = bias;  // locals, which no store can change
    each_overlapping_vector<L>(cols, [=](int64_t c, auto m) NORMWISE_INLINE {
      V v = fma(load_up_to(x + c, m) - hi, scale, rest);
      if (ws) v = v * load_up_to(ws + c, m);
      if (bs) v = v + load_up_to(bs + c, m);
      store_up_to(y + c, v, m);
    });
    return s;
  }

  // Up to kTile rows that lie next to each other, `stride` between their values; their statistics go to `found`.
  void tile(const T* x, T* y, int64_t cols, int64_t stride, int64_t rows, std::vector<Statistics<T>>& found) const {
    std::vector<Part> parts(rows);
    column_parts(x, cols, stride, rows, centred, nullptr, eps, parts.data());
    found.clear();
    A hi[kTile], scale[kTile], rest[kTile];
    for (int64_t r = 0; r < rows; ++r) {
      found.push_back(statistics<T>(parts[r], centred, eps));
      hi[r] = found.back().hi, scale[r] = found.back().scale, rest[r] = found.back().rest;
    }
    for (int64_t c = 0; c < cols; ++c) {
      const V w = V::all(weight ? weight[c] : A(1)), b = V::all(bias ? bias[c] : A(0));
      each_overlapping_vector<L>(rows, [&](int64_t r, auto m) NORMWISE_INLINE {
        V v = fma(load_up_to(x + c * stride + r, m) - load_up_to(hi + r, m), load_up_to(scale + r, m),
                  load_up_to(rest + r, m));
        if (weight) v = v * w;
        if (bias) v = v + b;
        store_up_to(y + c * stride + r, v, m);
      });
    }
    for (int64_t r = 0; r < rows; ++r)
      if (found[r].extreme)
        for (int64_t c = 0; c < cols; ++c) put(y + c * stride + r, A(one(x + c * stride + r, found[r], c)));
  }
};

template <class T>
void add_rows(const T* x, const T* residual, T* h, int64_t n) {
  each_overlapping_vector<Vec<Wide<T>>::lanes>(n, [&](int64_t j, auto m) NORMWISE_INLINE {
    store_up_to(h + j, load_up_to(x + j, m) + load_up_to(residual + j, m), m);
  });
}

struct Result {
  Tensor y;
  MaybeTensor h, mean, rstd;
};

Result forward(const Tensor& input, const MaybeTensor& residual, int64_t k, const MaybeTensor& weight,
               const MaybeTensor& bias, double eps, bool centred, std::optional<ScalarType> out_dtype, bool save);

// The same in two steps, for a y that is wider than h.
Result forward_of_sum(const Tensor& x, const Tensor& residual, int64_t k, const MaybeTensor& weight,
                      const MaybeTensor& bias, double eps, bool centred, std::optional<ScalarType> out_dtype,
                      bool save) {
  const Rows in(x, k);
  const Tensor added = in.in_order(residual), h = fresh_like(in.x);
  with_type(x, [&](auto tag) {
    using T = decltype(tag);
    add_rows(data<T>(in.x), data<T>(added), out<T>(h), in.x.numel());
  });
  Result r = forward(laid_out(h, x, in.copied), {}, k, weight, bias, eps, centred, out_dtype, save);
  r.h = laid_out(h, x, in.copied);
  return r;
}

// y of x, or of h = x + residual; what backward needs if `save`.
Result forward(const Tensor& input, const MaybeTensor& residual, int64_t k, const MaybeTensor& weight,
               const MaybeTensor& bias, double eps, bool centred, std::optional<ScalarType> out_dtype, bool save) {
  const Tensor typed = widened(input, computed(input, out_dtype));
  if (residual && typed.scalar_type() != input.scalar_type())
    return forward_of_sum(input, *residual, k, weight, bias, eps, centred, out_dtype, save);
  const Rows in(typed, k);
  const MaybeTensor added = residual ? MaybeTensor(in.in_order(*residual)) : residual;
  Result r{fresh_like(in.x), {}, {}, {}};
  if (residual) r.h = fresh_like(in.x);
  if (save && centred) r.mean = empty(in.kept, ScalarType::Double);
  if (save) r.rstd = empty(in.kept, ScalarType::Double);
  with_type(in.x, [&](auto tag) {
    using T = decltype(tag);
    const Parameter<Wide<T>> w(weight), b(bias);
    const Forward<T> norm{w.data(), b.data(), centred, eps};
    const T *xs = data<T>(in.x), *adds = data<T>(added);
    T *ys = out<T>(r.y), *hs = residual ? out<T>(*r.h) : nullptr;
    double *means = save && centred ? out<double>(*r.mean) : nullptr, *rstds = save ? out<double>(*r.rstd) : nullptr;
    const auto keep = [&](int64_t i, const Statistics<T>& s) {
      if (means) means[i] = s.mean;
      if (rstds) rstds[i] = s.rstd;
    };
    const int64_t cols = in.cols, inner = in.inner, tiles = in.tiles();
    if (inner == 1)
      return parallel(in.rows, 2 * cols, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const T* x = xs + i * cols;
          if (residual) add_rows(x, adds + i * cols, hs + i * cols, cols), x = hs + i * cols;
          keep(i, norm.row(x, ys + i * cols, cols));
        }
      });
    parallel(in.rows / inner * tiles, 3 * kTile * cols, [&](int64_t begin, int64_t end) {
      std::vector<Statistics<T>> found;
      for (int64_t i = begin; i < end; ++i) {
        const int64_t n = i / tiles, first = i % tiles * kTile, rows = std::min(kTile, inner - first);
        const int64_t at = n * inner * cols + first;
        if (residual)
          for (int64_t c = 0; c < cols; ++c)
            add_rows(xs + at + c * inner, adds + at + c * inner, hs + at + c * inner, rows);
        norm.tile((residual ? hs : xs) + at, ys + at, cols, inner, rows, found);
        for (int64_t s = 0; s < rows; ++s) keep(n * inner + first + s, found[s]);
      }
    });
  });
  if (in.copied) r.y = laid_out(r.y, typed, true);
  if (out_dtype) r.y = widened(r.y, out_dtype);
  if (residual) r.h = laid_out(*r.h, typed, in.copied);
  return r;
}

constexpr int64_t kRowBlock = 16;  // rows whose sums of dweight and dbias are taken in A before they move to double

// dx of rows, and their part of dweight and dbias.
template <class T>
struct Backward {
  using A = Wide<T>;
  using V = Vec<A>;
  static constexpr int L = V::lanes;
  const A* weight;
  bool centred;
  int64_t cols, stride;
  const T *dy, *x, *dh;  // dh is added to dx, if there
  T* dx;                 // or null

  // The packed row i. Its part of dweight and dbias is added to the arrays, if there.
  void row(int64_t i, double mean, double rstd, A* dweight, A* dbias) const {
    const Statistics<T> s(mean, rstd);
    if (s.extreme) return in_double(i * cols, mean, rstd, dweight, dbias);
    const V hi = V::all(s.hi), scale = V::all(s.scale), rest = V::all(s.rest);
    const T *const dys = dy + i * cols, *const xs = x + i * cols, *const dhs = dh ? dh + i * cols : nullptr;
    const A* const ws = weight;  // locals, which no store can change
    double s1 = 0, s2 = 0;
    const auto factors = [=](int64_t c, auto m) NORMWISE_INLINE {
      const V d = load_up_to(dys + c, m), xhat = fma(load_up_to(xs + c, m) - hi, scale, rest);  // d is zero beyond m
      if (dweight) store_up_to(dweight + c, fma(d, xhat, load_up_to(dweight + c, m)), m);
      if (dbias) store_up_to(dbias + c, load_up_to(dbias + c, m) + d, m);
      return Factors<A>{ws ? d * load_up_to(ws + c, m) : d, xhat};
    };
    if (centred)
      sum_line<true, A>(cols, factors, s1, s2);
    else
      sum_line<false, A>(cols, factors, s1, s2);
    if (!dx) return;
    const V a = V::all(A(s1 / double(cols))), b = V::all(A(s2 / double(cols)));
    T* const to = dx + i * cols;
    each_overlapping_vector<L>(cols, [=](int64_t c, auto m) NORMWISE_INLINE {
      const V xhat = fma(load_up_to(xs + c, m) - hi, scale, rest);
      V v = ((load_up_to(dys + c, m) * (ws ? load_up_to(ws + c, m) : V::all(1)) - a) - xhat * b) * scale;
      if (dhs) v = v + load_up_to(dhs + c, m);
      store_up_to(to + c, v, m);
    });
  }

  // `count` planar rows from i, whose first value lies at `first`. Their part of dweight and dbias is added in double.
  void tile(int64_t i, int64_t first, int64_t count, const double* mean, const double* rstd, double* dweight,
            double* dbias) const {
    A hi[kTile] = {}, scale[kTile] = {}, rest[kTile] = {}, a[kTile], b[kTile];
    double s1[kTile] = {}, s2[kTile] = {};
    bool any_extreme = false;
    for (int64_t r = 0; r < count; ++r) {
      const Statistics<T> s(mean ? mean[i + r] : 0, rstd[i + r]);
      if (s.extreme) {  // computed below; here xhat is zero
        any_extreme = true;
        continue;
      }
      hi[r] = s.hi, scale[r] = s.scale, rest[r] = s.rest;
    }
    const auto xhat = [&](int64_t j, int64_t r, auto m) NORMWISE_INLINE {
      return fma(load_up_to(x + j, m) - load_up_to(hi + r, m), load_up_to(scale + r, m), load_up_to(rest + r, m));
    };
    for (int64_t begin = 0; begin < cols; begin += 8) {
      const int rows = int(std::min<int64_t>(8, cols - begin));
      each_vector<L>(count, [&](int64_t r, auto m) NORMWISE_INLINE {
        V one = V::all(0), two = V::all(0);
        for (int k = 0; k < rows; ++k) {
          const int64_t c = begin + k, j = first + c * stride + r;
          const V d = load_up_to(dy + j, m), product = d * xhat(j, r, m), w = V::all(weight ? weight[c] : A(1));
          if (centred) one = fma(d, w, one);
          two = fma(product, w, two);
          if (dweight) dweight[c] += sum(product);
          if (dbias) dbias[c] += sum(d);
        }
        add_to(s1 + r, one, m);
        add_to(s2 + r, two, m);
      });
    }
    if (dx) {
      for (int64_t r = 0; r < count; ++r) a[r] = A(s1[r] / double(cols)), b[r] = A(s2[r] / double(cols));
      for (int64_t c = 0; c < cols; ++c) {
        const V w = V::all(weight ? weight[c] : A(1));
        each_overlapping_vector<L>(count, [&](int64_t r, auto m) NORMWISE_INLINE {
          const int64_t j = first + c * stride + r;
          const V g = load_up_to(dy + j, m) * w - load_up_to(a + r, m);
          V v = (g - xhat(j, r, m) * load_up_to(b + r, m)) * load_up_to(scale + r, m);
          if (dh) v = v + load_up_to(dh + j, m);
          store_up_to(dx + j, v, m);
        });
      }
    }
    for (int64_t r = 0; any_extreme && r < count; ++r) {
      const Statistics<T> s(mean ? mean[i + r] : 0, rstd[i + r]);
      if (s.extreme) in_double<double>(first + r, s.mean, s.rstd, dweight, nullptr);
    }
  }

  // The row whose first value lies at `first`, where A cannot hold the statistics.
  template <class D>
  void in_double(int64_t first, double mean, double rstd, D* dweight, D* dbias) const {
    double s1 = 0, s2 = 0;
    for (int64_t c = 0; c < cols; ++c) {
      const int64_t j = first + c * stride;
      const double d = get(dy + j), w = weight ? weight[c] : 1, xhat = (double(get(x + j)) - mean) * rstd;
      if (dweight) dweight[c] += D(d * xhat);
      if (dbias) dbias[c] += D(d);
      s1 += d * w;
      s2 += d * w * xhat;
    }
    if (!dx) return;
    s1 = centred ? s1 / double(cols) : 0;
    s2 /= double(cols);
    for (int64_t c = 0; c < cols; ++c) {
      const int64_t j = first + c * stride;
      const double w = weight ? weight[c] : 1, xhat = (double(get(x + j)) - mean) * rstd;
      put(dx + j, A((double(get(dy + j)) * w - s1 - xhat * s2) * rstd + (dh ? double(get(dh + j)) : 0)));
    }
  }
};

template <class P>
void round_to(P* to, const double* from, int64_t n) {
  for (int64_t i = 0; i < n; ++i) put(to + i, Wide<P>(from[i]));
}

struct Gradients {
  Tensor dx, dweight, dbias;
};

Gradients backward(const Tensor& grad, const MaybeTensor& dh, const Tensor& input, const MaybeTensor& mean,
                   const Tensor& rstd, int64_t k, const MaybeTensor& weight, std::optional<ScalarType> bias_type,
                   const std::vector<bool>& wanted) {
  const Tensor typed = widened(input, grad.scalar_type());  // y may be wider than x
  const Rows in(typed, k);
  const Tensor dy = in.in_order(grad), saved_rstd = packed(rstd);
  const MaybeTensor saved_mean = mean ? MaybeTensor(packed(*mean)) : mean;
  const MaybeTensor added = dh ? MaybeTensor(in.in_order(widened(*dh, grad.scalar_type()))) : dh;
  const int64_t rows = in.rows, cols = in.cols, tiles = in.tiles();
  const bool want_dx = wanted[0], want_dw = wanted[1] && weight, want_db = wanted[2] && bias_type,
             sums = want_dw || want_db;
  Gradients r{want_dx ? fresh_like(in.x) : nothing(in.x),
              want_dw ? empty(in.shape, weight->scalar_type()) : nothing(in.x),
              want_db ? empty(in.shape, *bias_type) : nothing(in.x)};
  // Blocks of rows, or tiles, in a fixed number of chunks, whatever the number of threads; each chunk is summed in
  // order, then all of them.
  const bool packed_rows = in.inner == 1;
  const int64_t blocks = packed_rows ? (rows + kRowBlock - 1) / kRowBlock : rows / in.inner * tiles;
  const int64_t limit = std::clamp<int64_t>((1 << 20) / std::max<int64_t>(cols, 1), 1, 64);
  const int64_t fewest = std::max<int64_t>(1, kGrain / (kRowBlock * std::max<int64_t>(cols, 1)));
  const int64_t per_chunk = sums ? std::max(fewest, (blocks + limit - 1) / limit) : 1;
  const int64_t chunks = (blocks + per_chunk - 1) / per_chunk;
  Array<double> total(sums ? 2 * std::max<int64_t>(chunks, 1) * cols : 0);
  if (!chunks) std::fill(total.begin(), total.end(), 0.0);
  with_type(in.x, [&](auto tag) {
    using T = decltype(tag);
    using A = Wide<T>;
    const Parameter<A> w(weight);
    const Backward<T> run{w.data(),    bool(mean),    cols,           in.inner,
                          data<T>(dy), data<T>(in.x), data<T>(added), want_dx ? out<T>(r.dx) : nullptr};
    const double *means = data<double>(saved_mean), *rstds = data<double>(saved_rstd);
    parallel(chunks, 3 * per_chunk * (packed_rows ? kRowBlock : kTile) * cols, [&](int64_t begin, int64_t end) {
      std::vector<A> block((packed_rows && sums ? 2 * cols : 0));
      A *dw = want_dw ? block.data() : nullptr, *db = want_db ? block.data() + cols : nullptr;
      for (int64_t c = begin; c < end; ++c) {
        double* sum = sums ? total.data() + 2 * c * cols : nullptr;
        if (sums) std::fill_n(sum, 2 * cols, 0.0);
        for (int64_t b = c * per_chunk; b < std::min((c + 1) * per_chunk, blocks); ++b) {
          if (!packed_rows) {
            const int64_t n = b / tiles, first = b % tiles * kTile;
            run.tile(n * in.inner + first, n * in.inner * cols + first, std::min(kTile, in.inner - first), means, rstds,
                     want_dw ? sum : nullptr, want_db ? sum + cols : nullptr);
            continue;
          }
          std::fill(block.begin(), block.end(), A(0));
          const int64_t last = std::min((b + 1) * kRowBlock, rows);
          for (int64_t i = b * kRowBlock; i < last; ++i) run.row(i, means ? means[i] : 0, rstds[i], dw, db);
          for (size_t j = 0; j < block.size(); ++j) sum[j] += double(block[j]);
        }
      }
    });
  });
  if (want_dx) r.dx = widened(laid_out(r.dx, typed, in.copied), input.scalar_type());
  if (sums)
    parallel(2 * cols, chunks, [&](int64_t begin, int64_t end) {
      for (int64_t c = 1; c < chunks; ++c)
        for (int64_t j = begin; j < end; ++j) total[j] += total[2 * c * cols + j];
    });
  if (want_dw) with_type(r.dweight, [&](auto t) { round_to(out<decltype(t)>(r.dweight), total.data(), cols); });
  if (want_db) with_type(r.dbias, [&](auto t) { round_to(out<decltype(t)>(r.dbias), total.data() + cols, cols); });
  return r;
}

using One = Tensor;
using Two = std::tuple<Tensor, Tensor>;
using Three = std::tuple<Tensor, Tensor, Tensor>;
using Four = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using Shape = std::vector<int64_t>;
using Type = std::optional<ScalarType>;
using Flags = std::vector<bool>;

int64_t axes(const Shape& shape) { return int64_t(shape.size()); }

// The number of axes that are normalized, if the arguments fit.
int64_t checked(const Tensor& x, const Shape& shape, const MaybeTensor& weight, const MaybeTensor& bias, double eps) {
  check_input(x, eps);
  const Sizes sizes = x.sizes(), normalized = shape;
  STD_TORCH_CHECK(
      !shape.empty() && shape.size() <= sizes.size() && sizes.slice(sizes.size() - shape.size()) == normalized,
      "normwise: the last axes of x must be normalized_shape.");
  check_parameter(normalized, weight);
  check_parameter(normalized, bias);
  return axes(shape);
}

One layer_norm(const Tensor& x, const Shape& shape, const MaybeTensor& weight, const MaybeTensor& bias, double eps,
               Type out_dtype) {
  return forward(x, {}, checked(x, shape, weight, bias, eps), weight, bias, eps, true, out_dtype, false).y;
}
Three layer_norm_forward(const Tensor& x, const Shape& shape, const MaybeTensor& weight, const MaybeTensor& bias,
                         double eps, Type out_dtype) {
  auto r = forward(x, {}, checked(x, shape, weight, bias, eps), weight, bias, eps, true, out_dtype, true);
  return {r.y, *r.mean, *r.rstd};
}
Three layer_norm_backward(const Tensor& dy, const Tensor& x, const Tensor& mean, const Tensor& rstd, const Shape& shape,
                          const MaybeTensor& weight, Type bias_dtype, const Flags& output_mask) {
  auto r = backward(dy, {}, x, mean, rstd, axes(shape), weight, bias_dtype, output_mask);
  return {r.dx, r.dweight, r.dbias};
}

One rms_norm(const Tensor& x, const Shape& shape, const MaybeTensor& weight, double eps, Type out_dtype) {
  return forward(x, {}, checked(x, shape, weight, {}, eps), weight, {}, eps, false, out_dtype, false).y;
}
Two rms_norm_forward(const Tensor& x, const Shape& shape, const MaybeTensor& weight, double eps, Type out_dtype) {
  auto r = forward(x, {}, checked(x, shape, weight, {}, eps), weight, {}, eps, false, out_dtype, true);
  return {r.y, *r.rstd};
}
Two rms_norm_backward(const Tensor& dy, const Tensor& x, const Tensor& rstd, const Shape& shape,
                      const MaybeTensor& weight, const Flags& output_mask) {
  auto r = backward(dy, {}, x, {}, rstd, axes(shape), weight, {}, {output_mask[0], output_mask[1], false});
  return {r.dx, r.dweight};
}

Two fused_add_layer_norm(const Tensor& x, const Tensor& residual, const Shape& shape, const MaybeTensor& weight,
                         const MaybeTensor& bias, double eps, Type out_dtype) {
  auto r = forward(x, residual, checked(x, shape, weight, bias, eps), weight, bias, eps, true, out_dtype, false);
  return {r.y, *r.h};
}
Four fused_add_layer_norm_forward(const Tensor& x, const Tensor& residual, const Shape& shape,
                                  const MaybeTensor& weight, const MaybeTensor& bias, double eps, Type out_dtype) {
  auto r = forward(x, residual, checked(x, shape, weight, bias, eps), weight, bias, eps, true, out_dtype, true);
  return {r.y, *r.h, *r.mean, *r.rstd};
}
Three fused_add_layer_norm_backward(const Tensor& dy, const MaybeTensor& dh, const Tensor& h, const Tensor& mean,
                                    const Tensor& rstd, const Shape& shape, const MaybeTensor& weight, Type bias_dtype,
                                    const Flags& output_mask) {
  auto r = backward(dy, dh, h, mean, rstd, axes(shape), weight, bias_dtype, output_mask);
  return {r.dx, r.dweight, r.dbias};
}

Two fused_add_rms_norm(const Tensor& x, const Tensor& residual, const Shape& shape, const MaybeTensor& weight,
                       double eps, Type out_dtype) {
  auto r = forward(x, residual, checked(x, shape, weight, {}, eps), weight, {}, eps, false, out_dtype, false);
  return {r.y, *r.h};
}
Three fused_add_rms_norm_forward(const Tensor& x, const Tensor& residual, const Shape& shape, const MaybeTensor& weight,
                                 double eps, Type out_dtype) {
  auto r = forward(x, residual, checked(x, shape, weight, {}, eps), weight, {}, eps, false, out_dtype, true);
  return {r.y, *r.h, *r.rstd};
}
Two fused_add_rms_norm_backward(const Tensor& dy, const MaybeTensor& dh, const Tensor& h, const Tensor& rstd,
                                const Shape& shape, const MaybeTensor& weight, const Flags& output_mask) {
  auto r = backward(dy, dh, h, {}, rstd, axes(shape), weight, {}, {output_mask[0], output_mask[1], false});
  return {r.dx, r.dweight};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(normwise, CPU, m) {
  m.impl("layer_norm", TORCH_BOX(&layer_norm));
  m.impl("layer_norm_forward", TORCH_BOX(&layer_norm_forward));
  m.impl("layer_norm_backward", TORCH_BOX(&layer_norm_backward));
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("rms_norm_forward", TORCH_BOX(&rms_norm_forward));
  m.impl("rms_norm_backward", TORCH_BOX(&rms_norm_backward));
  m.impl("fused_add_layer_norm", TORCH_BOX(&fused_add_layer_norm));
  m.impl("fused_add_layer_norm_forward", TORCH_BOX(&fused_add_layer_norm_forward));
  m.impl("fused_add_layer_norm_backward", TORCH_BOX(&fused_add_layer_norm_backward));
  m.impl("fused_add_rms_norm", TORCH_BOX(&fused_add_rms_norm));
  m.impl("fused_add_rms_norm_forward", TORCH_BOX(&fused_add_rms_norm_forward));
  m.impl("fused_add_rms_norm_backward", TORCH_BOX(&fused_add_rms_norm_backward));
}

}  // namespace normwise
