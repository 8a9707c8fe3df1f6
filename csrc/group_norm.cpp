// group_norm, and with a group for each channel instance_norm: every group of channels of a sample has its own statistics.
#include "channels.h"

namespace normwise {
namespace {

using Three = std::tuple<Tensor, Tensor, Tensor>;

// The statistics of every group of every sample.
template <class T>
std::vector<Part> group_parts(const T* x, const View& v, int64_t groups, double eps, const Mask& mask) {
  const int64_t width = v.c / groups;
  if (!v.interleaved && !mask.valid) return channel_parts(x, View{v.n, groups, width * v.s, false}, eps);  // a group is contiguous
  const auto parts = mask.valid ? masked_parts(x, v, mask) : channel_parts(x, v, eps);
  std::vector<Part> merged(v.n * groups);
  for (int64_t i = 0; i < v.channels(); ++i) merged[i / width].merge(parts[i]);
  return merged;
}

Three forward(const Tensor& input, int64_t groups, const MaybeTensor& weight, const MaybeTensor& bias, double eps,
              const MaybeTensor& mask, std::optional<ScalarType> out_dtype) {
  const Tensor x = widened(input, computed(input, out_dtype));
  const Channels in(x, false);
  const View& v = in.view;
  const Mask valid(mask, v);
  Tensor y = in.like(), mean = empty(x, {x.size(0), groups}, ScalarType::Double),
         rstd = empty(x, {x.size(0), groups}, ScalarType::Double);
  const MaybeTensor w = parameter<double>(weight), b = parameter<double>(bias);
  with_type(x, [&](auto tag) {
    using T = decltype(tag);
    const auto parts = group_parts(data<T>(in.x), v, groups, eps, valid);
    Affine<T> a(v.channels());
    for (int64_t g = 0; g < v.n * groups; ++g) {
      const double r = 1 / std::sqrt((parts[g].count ? parts[g].m2 / parts[g].count : 0) + eps);
      out<double>(mean)[g] = parts[g].mean;
      out<double>(rstd)[g] = r;
      for (int64_t i = g * (v.c / groups); i < (g + 1) * (v.c / groups); ++i) {
        a.center(i, parts[g].mean, r);
        a.set(i, r * at(data<double>(w), i % v.c, 1), at(data<double>(b), i % v.c, 0));
      }
    }
    transform(data<T>(in.x), out<T>(y), v, a, valid);
  });
  return {widened(laid_out(y, x, in.copied), out_dtype), mean, rstd};
}

Tensor group_norm(Tensor x, int64_t num_groups, MaybeTensor weight, MaybeTensor bias, double eps, MaybeTensor mask,
                  std::optional<ScalarType> out_dtype) {
  return std::get<0>(forward(x, num_groups, weight, bias, eps, mask, out_dtype));
}

Three group_norm_forward(Tensor x, int64_t num_groups, MaybeTensor weight, MaybeTensor bias, double eps,
                         MaybeTensor mask, std::optional<ScalarType> out_dtype) {
  return forward(x, num_groups, weight, bias, eps, mask, out_dtype);
}

Three group_norm_backward(Tensor grad, Tensor input, Tensor mean, Tensor rstd, int64_t groups, MaybeTensor mask,
                          MaybeTensor weight, std::optional<ScalarType> bias_dtype, std::vector<bool> wanted) {
  const Tensor x = widened(input, grad.scalar_type());  // y may be wider than x
  const Channels in(x, false);
  const Tensor dy = in.in_order(grad);
  const View& v = in.view;
  const Mask valid(mask, v);
  const MaybeTensor w = parameter<double>(weight);
  const bool want_dw = wanted[1] && weight, want_db = wanted[2] && bias_dtype;
  std::vector<double> dweight(v.c), dbias(v.c);
  Tensor dx = wanted[0] ? in.like() : nothing(x);
  with_type(x, [&](auto tag) {
    using T = decltype(tag);
    const int64_t width = groups ? v.c / groups : 0;
    const double* rs = data<double>(rstd);
    Affine<T> a(v.channels());
    for (int64_t i = 0; i < v.channels(); ++i) a.center(i, data<double>(mean)[i / width], rs[i / width]);
    const auto sums = gradient_sums(data<T>(dy), data<T>(in.x), v, a, valid);
    for (int64_t g = 0; g < v.n * groups; ++g) {
      const double count = std::max(1.0, double(width) * (valid.valid ? valid.count(v, g / groups) : double(v.s)));
      double rest = 0, s1 = 0, s2 = 0;
      for (int64_t i = g * width; i < (g + 1) * width; ++i) rest += sums[i].c / count;
      for (int64_t i = g * width; i < (g + 1) * width; ++i) {
        const double dyx = (sums[i].dyc - sums[i].dy * rest) * rs[g], wi = at(data<double>(w), i % v.c, 1);
        dweight[i % v.c] += dyx;
        dbias[i % v.c] += sums[i].dy;
        s1 += wi * sums[i].dy;
        s2 += wi * dyx;
      }
      const double beta = rs[g] * rs[g] * s2 / count;
      for (int64_t i = g * width; i < (g + 1) * width; ++i)
        a.set(i, rs[g] * at(data<double>(w), i % v.c, 1), rs[g] * s1 / count - rest * beta, beta);
    }
    if (wanted[0]) gradient(data<T>(dy), data<T>(in.x), out<T>(dx), v, a, valid);
  });
  if (wanted[0]) dx = widened(laid_out(dx, x, in.copied), input.scalar_type());
  return {dx, want_dw ? rounded(dweight, x, weight->scalar_type()) : nothing(x),
          want_db ? rounded(dbias, x, *bias_dtype) : nothing(x)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(normwise, CPU, m) {
  m.impl("group_norm", TORCH_BOX(&group_norm));
  m.impl("group_norm_forward", TORCH_BOX(&group_norm_forward));
  m.impl("group_norm_backward", TORCH_BOX(&group_norm_backward));
}

}  // namespace normwise
