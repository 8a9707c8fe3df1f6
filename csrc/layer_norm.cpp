// layer_norm and rms_norm: every row of `cols` values has its own statistics.
#include "moments.h"
#include "tensor.h"

namespace normwise {
namespace {

// y = ((x - hi) - lo) * rstd * weight + bias
template <class T>
void write_row(const T* x, const Wide<T>* weight, const Wide<T>* bias, T* y, int64_t cols, const Moments<T>& m) {
  using A = Wide<T>;
  using V = Vec<A>;
  if (m.extreme) {
    for (int64_t j = 0; j < cols; ++j) {
      const double c = (double(get(x + j)) - m.mean) * m.exact_rstd * (weight ? double(weight[j]) : 1);
      put(y + j, A(c + (bias ? double(bias[j]) : 0)));
    }
    return;
  }
  const V hi = V::all(m.hi), lo = V::all(m.lo), rstd = V::all(m.rstd);
  const auto at = [&](const V& v, const auto& w, const auto& b) {
    V c = ((v - hi) - lo) * rstd;
    if (weight) c = c * w();
    return bias ? c + b() : c;
  };
  int64_t j = 0;
  for (; j + V::lanes <= cols; j += V::lanes)
    store(y + j, at(load(x + j), [&] { return load(weight + j); }, [&] { return load(bias + j); }));
  if (const int n = int(cols - j))
    store(y + j, at(load(x + j, n), [&] { return load(weight + j, n); }, [&] { return load(bias + j, n); }), n);
}

struct Forward {
  Tensor y, mean, rstd;
};

template <bool Save>
Forward forward(const Tensor& input, int64_t k, const MaybeTensor& weight, const MaybeTensor& bias, double eps,
                bool centred, std::optional<ScalarType> out_dtype) {
  const Tensor typed = widened(input, computed(input, out_dtype)), x = packed(typed);
  std::vector<int64_t> kept(x.sizes().begin(), x.sizes().end() - k);
  int64_t cols = 1;
  for (int64_t i = x.dim() - k; i < x.dim(); ++i) cols *= x.size(i);
  const int64_t rows = cols ? x.numel() / cols : 0;
  Forward r{torch::stable::empty_like(x), {}, {}};
  if (Save) {
    if (centred) r.mean = empty(x, kept, ScalarType::Double);
    r.rstd = empty(x, kept, ScalarType::Double);
  }
  with_type(x, [&](auto tag) {
    using T = decltype(tag);
    using A = Wide<T>;
    const MaybeTensor w = parameter<A>(weight), b = parameter<A>(bias);
    const T* xs = data<T>(x);
    const A *ws = data<A>(w), *bs = data<A>(b);
    T* ys = out<T>(r.y);
    double *means = Save && centred ? out<double>(r.mean) : nullptr, *rstds = Save ? out<double>(r.rstd) : nullptr;
    parallel(rows, cols, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const Moments<T> m = moments(xs + i * cols, cols, centred, eps);
        if (means) means[i] = m.mean;
        if (rstds) rstds[i] = m.exact_rstd;
        write_row(xs + i * cols, ws, bs, ys + i * cols, cols, m);
      }
    });
  });
  r.y = widened(laid_out(r.y, typed, !typed.is_contiguous()), out_dtype);
  return r;
}

Tensor layer_norm(Tensor x, std::vector<int64_t> normalized_shape, MaybeTensor weight, MaybeTensor bias, double eps,
                  std::optional<ScalarType> out_dtype) {
  return forward<false>(x, int64_t(normalized_shape.size()), weight, bias, eps, true, out_dtype).y;
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_forward(Tensor x, std::vector<int64_t> normalized_shape,
                                                      MaybeTensor weight, MaybeTensor bias, double eps,
                                                      std::optional<ScalarType> out_dtype) {
  auto r = forward<true>(x, int64_t(normalized_shape.size()), weight, bias, eps, true, out_dtype);
  return {r.y, r.mean, r.rstd};
}

Tensor rms_norm(Tensor x, std::vector<int64_t> normalized_shape, MaybeTensor weight, double eps,
                std::optional<ScalarType> out_dtype) {
  return forward<false>(x, int64_t(normalized_shape.size()), weight, {}, eps, false, out_dtype).y;
}

std::tuple<Tensor, Tensor> rms_norm_forward(Tensor x, std::vector<int64_t> normalized_shape, MaybeTensor weight,
                                            double eps, std::optional<ScalarType> out_dtype) {
  auto r = forward<true>(x, int64_t(normalized_shape.size()), weight, {}, eps, false, out_dtype);
  return {r.y, r.rstd};
}

constexpr int64_t kRowBlock = 16;  // rows summed in A before their sums move to double

// dx of one row, and its part of dweight and dbias.
template <class T>
struct RowBackward {
  using A = Wide<T>;
  using V = Vec<A>;
  const A* weight;
  bool centred, want_dx;
  A *dweight, *dbias;  // sums over the rows of a block, or null

  void operator()(const T* dy, const T* x, T* dx, int64_t cols, double mean, double rstd) const {
    if (sizeof(A) == 4 && is_extreme(mean, rstd)) return in_double(dy, x, dx, cols, mean, rstd);
    const V hi = V::all(high<T>(mean)), lo = V::all(A(mean - double(high<T>(mean)))), r = V::all(A(rstd));
    double s1 = 0, s2 = 0;
    for (int64_t begin = 0; begin < cols; begin += kBlock) {
      const int64_t end = std::min(begin + kBlock, cols);
      V one[2] = {V::all(0), V::all(0)}, two[2] = {V::all(0), V::all(0)};
      int64_t j = begin;
      for (int k = 0; j < end; j += V::lanes, k ^= 1) {
        const int n = int(std::min<int64_t>(V::lanes, end - j));
        const bool full = n == V::lanes;
        const V d = full ? load(dy + j) : load(dy + j, n);
        const V raw = ((full ? load(x + j) : load(x + j, n)) - hi) - lo;
        const V xhat = (full ? raw : first(raw, n)) * r;
        const V dxhat = d * xhat;
        if (dweight) accumulate(dweight + j, dxhat, full, n);
        if (dbias) accumulate(dbias + j, d, full, n);
        if (!want_dx) continue;
        const V w = !weight ? V::all(1) : full ? load(weight + j) : load(weight + j, n);
        one[k] = one[k] + d * w;
        two[k] = two[k] + dxhat * w;
      }
      s1 += sum(one[0] + one[1]);
      s2 += sum(two[0] + two[1]);
    }
    if (!want_dx) return;
    const V a = V::all(centred ? A(s1 / double(cols)) : A(0)), b = V::all(A(s2 / double(cols)));
    for (int64_t j = 0; j < cols; j += V::lanes) {
      const int n = int(std::min<int64_t>(V::lanes, cols - j));
      const bool full = n == V::lanes;
      const V d = full ? load(dy + j) : load(dy + j, n);
      const V xhat = (((full ? load(x + j) : load(x + j, n)) - hi) - lo) * r;
      const V w = !weight ? V::all(1) : full ? load(weight + j) : load(weight + j, n);
      const V v = ((d * w - a) - xhat * b) * r;
      full ? store(dx + j, v) : store(dx + j, v, n);
    }
  }

  static void accumulate(A* to, const V& v, bool full, int n) {
    if (full)
      store(to, load(to) + v);
    else
      store(to, load(to, n) + v, n);
  }

  void in_double(const T* dy, const T* x, T* dx, int64_t cols, double mean, double rstd) const {
    double s1 = 0, s2 = 0;
    for (int64_t j = 0; j < cols; ++j) {
      const double d = get(dy + j), w = weight ? weight[j] : 1, xhat = (double(get(x + j)) - mean) * rstd;
      if (dweight) dweight[j] += A(d * xhat);
      if (dbias) dbias[j] += A(d);
      s1 += d * w;
      s2 += d * w * xhat;
    }
    if (!want_dx) return;
    s1 = centred ? s1 / double(cols) : 0;
    s2 /= double(cols);
    for (int64_t j = 0; j < cols; ++j) {
      const double w = weight ? weight[j] : 1, xhat = (double(get(x + j)) - mean) * rstd;
      put(dx + j, A((double(get(dy + j)) * w - s1 - xhat * s2) * rstd));
    }
  }
};

template <class P>
void round_to(P* to, const double* from, int64_t n) {
  for (int64_t i = 0; i < n; ++i) put(to + i, Wide<P>(from[i]));
}

struct Backward {
  Tensor dx, dweight, dbias;
};

Backward backward(const Tensor& grad, const Tensor& input, const MaybeTensor& mean, const Tensor& rstd, int64_t k,
                  const MaybeTensor& weight, std::optional<ScalarType> bias_type, std::vector<bool> wanted) {
  const Tensor typed = widened(input, grad.scalar_type());  // y may be wider than x
  const Tensor x = packed(typed), dy = packed(grad);
  int64_t cols = 1;
  std::vector<int64_t> shape;
  for (int64_t i = x.dim() - k; i < x.dim(); ++i) cols *= x.size(i), shape.push_back(x.size(i));
  const int64_t rows = cols ? x.numel() / cols : 0;
  const bool want_dx = wanted[0], want_dw = wanted[1] && weight, want_db = wanted[2] && bias_type;
  Backward r{want_dx ? torch::stable::empty_like(x) : nothing(x),
             want_dw ? empty(x, shape, weight->scalar_type()) : nothing(x),
             want_db ? empty(x, shape, *bias_type) : nothing(x)};
  // A fixed number of chunks of rows, whatever the number of threads; each is summed in order, then all of them.
  const int64_t blocks = (rows + kRowBlock - 1) / kRowBlock;
  const int64_t limit = std::max<int64_t>(1, std::min<int64_t>(64, (1 << 20) / std::max<int64_t>(cols, 1)));
  const int64_t per_chunk = std::max<int64_t>(1, (blocks + limit - 1) / limit);
  const int64_t chunks = (blocks + per_chunk - 1) / per_chunk;
  const bool sums = want_dw || want_db;
  std::vector<double> total(sums ? 2 * chunks * cols : 0, 0.0);
  with_type(x, [&](auto tag) {
    using T = decltype(tag);
    using A = Wide<T>;
    const MaybeTensor w = parameter<A>(weight);
    const T *xs = data<T>(x), *dys = data<T>(dy);
    T* dxs = want_dx ? out<T>(r.dx) : nullptr;
    const double *means = data<double>(mean), *rstds = data<double>(rstd);
    const auto run = [&](int64_t first_row, int64_t last_row, A* dw, A* db) {
      const RowBackward<T> row{data<A>(w), bool(mean), want_dx, dw, db};
      for (int64_t i = first_row; i < last_row; ++i)
        row(dys + i * cols, xs + i * cols, dxs + i * cols, cols, means ? means[i] : 0, rstds[i]);
    };
    if (!sums) return parallel(rows, 2 * cols, [&](int64_t b, int64_t e) { run(b, e, nullptr, nullptr); });
    parallel(chunks, 2 * cols * per_chunk * kRowBlock, [&](int64_t begin, int64_t end) {
      std::vector<A> block(2 * cols);
      for (int64_t c = begin; c < end; ++c) {
        double* sum = total.data() + 2 * c * cols;
        for (int64_t i = c * per_chunk; i < std::min((c + 1) * per_chunk, blocks); ++i) {
          std::fill(block.begin(), block.end(), A(0));
          run(i * kRowBlock, std::min((i + 1) * kRowBlock, rows), want_dw ? block.data() : nullptr,
              want_db ? block.data() + cols : nullptr);
          for (int64_t j = 0; j < 2 * cols; ++j) sum[j] += block[j];
        }
      }
    });
  });
  if (want_dx) r.dx = widened(laid_out(r.dx, typed, !typed.is_contiguous()), input.scalar_type());
  if (sums) {
    total.resize(std::max<size_t>(total.size(), 2 * cols), 0.0);
    for (int64_t c = 1; c < chunks; ++c)
      for (int64_t j = 0; j < 2 * cols; ++j) total[j] += total[2 * c * cols + j];
    if (want_dw) with_type(r.dweight, [&](auto t) { round_to(out<decltype(t)>(r.dweight), total.data(), cols); });
    if (want_db) with_type(r.dbias, [&](auto t) { round_to(out<decltype(t)>(r.dbias), total.data() + cols, cols); });
  }
  return r;
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_backward(Tensor dy, Tensor x, Tensor mean, Tensor rstd,
                                                       std::vector<int64_t> normalized_shape, MaybeTensor weight,
                                                       std::optional<ScalarType> bias_dtype,
                                                       std::vector<bool> output_mask) {
  auto r = backward(dy, x, mean, rstd, int64_t(normalized_shape.size()), weight, bias_dtype, output_mask);
  return {r.dx, r.dweight, r.dbias};
}

std::tuple<Tensor, Tensor> rms_norm_backward(Tensor dy, Tensor x, Tensor rstd, std::vector<int64_t> normalized_shape,
                                             MaybeTensor weight, std::vector<bool> output_mask) {
  output_mask.push_back(false);
  auto r = backward(dy, x, {}, rstd, int64_t(normalized_shape.size()), weight, {}, output_mask);
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
}

}  // namespace normwise
