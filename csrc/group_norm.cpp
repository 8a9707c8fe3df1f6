// group_norm, and with a group for each channel instance_norm: every group of channels of a sample has its own
// statistics.
#include "channels.h"

namespace normwise {
namespace {

using Three = std::tuple<Tensor, Tensor, Tensor>;

struct Result {
  Tensor y;
  MaybeTensor mean, rstd;
};

void check_groups(const Tensor& x, int64_t groups) {
  STD_TORCH_CHECK(groups > 0 && x.size(1) % groups == 0, "group_norm: num_groups must divide the ", x.size(1),
                  " channels; got ", groups, "; choose a divisor.");
}

// y, and what backward needs if `save`.
Result forward(const Tensor& input, int64_t groups, const MaybeTensor& weight, const MaybeTensor& bias, double eps,
               const MaybeTensor& mask, std::optional<ScalarType> out_dtype, bool save) {
  check_channels(input, eps, weight, bias, mask);
  check_groups(input, groups);
  const Tensor x = widened(input, computed(input, out_dtype));
  const Channels in(x);
  const View& v = in.view;
  const Mask valid(mask, v);
  Result r{fresh_like(in.x), {}, {}};
  if (save) r.mean = empty({x.size(0), groups}, ScalarType::Double);
  if (save) r.rstd = empty({x.size(0), groups}, ScalarType::Double);
  const Parameter<double> w(weight), b(bias);
  with_type(x, [&](auto tag) {
    using T = decltype(tag);
    const T* xs = data<T>(in.x);
    const int64_t width = v.c / groups;
    const double *ws = w.data(), *bs = b.data();
    double *const means = save ? out<double>(*r.mean) : nullptr, *const rstds = save ? out<double>(*r.rstd) : nullptr;
    const Forward<T> transform{xs, out<T>(r.y)};
    Affine<T> a(v, false);
    const auto set = [&](int64_t g, const Part& p) {
      const double var = p.var();
      const Statistics<T> of(p.mean(), 1 / std::sqrt(var + eps), var);
      if (save) means[g] = of.mean, rstds[g] = of.rstd;
      const int64_t first = g % groups * width;
      for (int64_t c = 0; c < width; ++c)
        a.forward(g * width + c, of, of.rstd * at(ws, first + c, 1), at(bs, first + c, 0));
    };
    if (v.interleaved) {
      auto parts = channel_parts(xs, v, valid, eps);
      parallel(v.n * groups, 16 * width, [&](int64_t begin, int64_t end) {
        for (int64_t g = begin; g < end; ++g) {
          Part all;
          for (int64_t i = g * width; i < (g + 1) * width; ++i)
            parts.each(i / v.c, i % v.c, [&](const Part& p) { all += p; });
          set(g, all);
        }
      });
      return parallel(lines_of(v), 3 * v.c, [&](int64_t begin, int64_t end) { transform(v, a, valid, begin, end); });
    }
    // A group lies in one piece, and stays in the cache between its sums and their use.
    parallel(v.n * groups, 3 * width * v.s, [&](int64_t begin, int64_t end) {
      for (int64_t g = begin; g < end; ++g) {
        Part all;
        if (valid)
          for (int64_t i = g * width; i < (g + 1) * width; ++i)
            all += part_of(xs + i * v.s, v.s, true, eps, valid.as<Wide<T>>(g / groups).data());
        else
          all = part_of(xs + g * width * v.s, width * v.s, true, eps);
        set(g, all);
        transform(v, a, valid, g * width, (g + 1) * width);
      }
    });
  });
  r.y = widened(laid_out(r.y, x, in.copied), out_dtype);
  return r;
}

Tensor group_norm(const Tensor& x, int64_t num_groups, const MaybeTensor& weight, const MaybeTensor& bias, double eps,
                  const MaybeTensor& mask, std::optional<ScalarType> out_dtype) {
  return forward(x, num_groups, weight, bias, eps, mask, out_dtype, false).y;
}

Three group_norm_forward(const Tensor& x, int64_t num_groups, const MaybeTensor& weight, const MaybeTensor& bias,
                         double eps, const MaybeTensor& mask, std::optional<ScalarType> out_dtype) {
  const Result r = forward(x, num_groups, weight, bias, eps, mask, out_dtype, true);
  return {r.y, *r.mean, *r.rstd};
}

Three group_norm_backward(const Tensor& grad, const Tensor& input, const Tensor& mean, const Tensor& rstd,
                          int64_t groups, double eps, const MaybeTensor& mask, const MaybeTensor& weight,
                          std::optional<ScalarType> bias_dtype, std::vector<bool> wanted) {
  check_groups(input, groups);
  const Tensor x = widened(input, grad.scalar_type());  // y may be wider than x
  const Channels in(x);
  const Tensor dy = in.in_order(grad);
  const View& v = in.view;
  const Mask valid(mask, v);
  const Parameter<double> m(mean), r(rstd), w(weight);
  const bool want_dw = wanted[1] && weight, want_db = wanted[2] && bias_dtype;
  std::vector<double> dweight(v.c), dbias(v.c);
  Tensor dx = wanted[0] ? fresh_like(in.x) : nothing(x);
  with_type(x, [&](auto tag) {
    using T = decltype(tag);
    const int64_t width = v.c / groups;
    const double *ms = m.data(), *rs = r.data(), *ws = w.data();
    const T* xs = data<T>(in.x);
    const Gradient<T> gradient{{data<T>(dy)}, xs, wanted[0] ? out<T>(dx) : nullptr};
    Affine<T> centered(v, false), a(v, false);
    const GradientSum<T> sum(gradient.dy, xs, v, centered, valid);
    Array<GradientSums> sums(v.channels());
    const auto statistics = [&](int64_t g) {
      return Statistics<T>(ms[g], rs[g], std::max(0.0, 1 / (rs[g] * rs[g]) - eps));
    };
    const auto center = [&](int64_t g) {
      const auto of = statistics(g);
      for (int64_t i = g * width; i < (g + 1) * width; ++i) centered.center(i, of);
    };
    // From the sums of the values' differences from hi to those from the mean, times rstd; and what dx needs.
    const auto set = [&](int64_t g) {
      const auto of = statistics(g);
      const double count = std::max(1.0, double(width) * (valid ? valid.count(g / groups) : double(v.s)));
      const double lo = of.lo() * of.unit(), scale = of.rstd / of.unit();
      const double* const weights = ws ? ws + g % groups * width : nullptr;
      double s1 = 0, s2 = 0;
      for (int64_t c = 0; c < width; ++c) {
        GradientSums& s = sums[g * width + c];
        s.dyc = v.s ? (s.dyc - s.dy * lo) * scale : 0;
        s1 += at(weights, c, 1) * s.dy;
        s2 += at(weights, c, 1) * s.dyc;
      }
      s1 *= of.rstd / count, s2 *= of.rstd * of.rstd / count;
      for (int64_t c = 0; c < width; ++c) a.backward(g * width + c, of, of.rstd * at(weights, c, 1), s2, s1);
    };
    if (v.interleaved) {
      for (int64_t g = 0; g < v.n * groups; ++g) center(g);
      const auto chunks = sum.all();
      parallel(v.n * groups, 32 * width, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin * width; i < end * width; ++i)
          chunks.each(i / v.c, i % v.c, [&](const GradientSums& s) { sums[i] += s; });
        for (int64_t g = begin; g < end; ++g) set(g);
      });
      if (wanted[0])
        parallel(lines_of(v), 3 * v.c, [&](int64_t begin, int64_t end) { gradient(v, a, valid, begin, end); });
    } else {
      parallel(v.n * groups, 3 * width * v.s, [&](int64_t begin, int64_t end) {
        for (int64_t g = begin; g < end; ++g) {
          center(g);
          sum.of_lines(g * width, (g + 1) * width, sums.data());
          set(g);
          if (wanted[0]) gradient(v, a, valid, g * width, (g + 1) * width);
        }
      });
    }
    for (int64_t n = 0; n < v.n; ++n)
      for (int64_t c = 0; c < v.c; ++c) dweight[c] += sums[n * v.c + c].dyc, dbias[c] += sums[n * v.c + c].dy;
  });
  if (wanted[0]) dx = widened(laid_out(dx, x, in.copied), input.scalar_type());
  return {dx, want_dw ? rounded(dweight, weight->scalar_type()) : nothing(x),
          want_db ? rounded(dbias, *bias_dtype) : nothing(x)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(normwise, CPU, m) {
  m.impl("group_norm", TORCH_BOX(&group_norm));
  m.impl("group_norm_forward", TORCH_BOX(&group_norm_forward));
  m.impl("group_norm_backward", TORCH_BOX(&group_norm_backward));
}

}  // namespace normwise
