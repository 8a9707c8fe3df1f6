// batch_norm: every channel has its own statistics, over all samples, or those that it is given.
#include "channels.h"

namespace normwise {
namespace {

using Three = std::tuple<Tensor, Tensor, Tensor>;

template <class T>
Tensor transformed(const Channels& in, const Tensor& input, const double* mean, const double* var, double eps,
                   const MaybeTensor& weight, const MaybeTensor& bias, const Mask& mask) {
  const MaybeTensor w = parameter<double>(weight), b = parameter<double>(bias);
  Affine<T> a(in.view.c);
  for (int64_t c = 0; c < in.view.c; ++c) {
    const double rstd = 1 / std::sqrt(var[c] + eps);
    a.center(c, mean[c], rstd);
    a.set(c, rstd * at(data<double>(w), c, 1), at(data<double>(b), c, 0));
  }
  Tensor y = in.like();
  transform(data<T>(in.x), out<T>(y), in.view, a, mask);
  return laid_out(y, input, in.copied);
}

Tensor batch_norm(Tensor x, Tensor running_mean, Tensor running_var, MaybeTensor weight, MaybeTensor bias, double eps,
                  MaybeTensor mask) {
  const Channels in(x, true);
  const MaybeTensor mean = parameter<double>(running_mean), var = parameter<double>(running_var);
  return with_type(x, [&](auto tag) {
    return transformed<decltype(tag)>(in, x, data<double>(mean), data<double>(var), eps, weight, bias,
                                      Mask(mask, in.view));
  });
}

Three batch_norm_forward(Tensor x, MaybeTensor weight, MaybeTensor bias, double eps, MaybeTensor mask) {
  const Channels in(x, true);
  const View& v = in.view;
  Tensor mean = empty(x, {v.c}, ScalarType::Double), var = empty(x, {v.c}, ScalarType::Double);
  return with_type(x, [&](auto tag) -> Three {
    using T = decltype(tag);
    const Mask valid(mask, v);
    const T* xs = data<T>(in.x);
    const auto parts = mask ? masked_parts(xs, v, valid) : channel_parts(xs, v, eps);
    for (int64_t c = 0; c < v.c; ++c) {
      Part all;
      for (int64_t n = 0; n < v.n; ++n) all.merge(parts[n * v.c + c]);
      out<double>(mean)[c] = all.mean;
      out<double>(var)[c] = all.count ? all.m2 / all.count : 0;
    }
    return {transformed<T>(in, x, data<double>(mean), data<double>(var), eps, weight, bias, valid), mean, var};
  });
}

Three batch_norm_backward(Tensor grad, Tensor x, Tensor mean_, Tensor var_, double eps, bool training, MaybeTensor mask,
                          MaybeTensor weight, std::optional<ScalarType> bias_dtype, std::vector<bool> wanted) {
  const Channels in(x, true);
  const Tensor dy = in.in_order(grad);
  const View& v = in.view;
  const Mask valid(mask, v);
  const MaybeTensor m = parameter<double>(mean_), s = parameter<double>(var_), w = parameter<double>(weight);
  const bool want_dw = wanted[1] && weight, want_db = wanted[2] && bias_dtype;
  std::vector<double> dweight(v.c), dbias(v.c);
  Tensor dx = wanted[0] ? in.like() : nothing(x);
  with_type(x, [&](auto tag) {
    using T = decltype(tag);
    Affine<T> a(v.c);
    std::vector<double> rstd(v.c);
    for (int64_t c = 0; c < v.c; ++c) {
      rstd[c] = 1 / std::sqrt(data<double>(s)[c] + eps);
      a.center(c, data<double>(m)[c], rstd[c]);
    }
    std::vector<GradientSums> sums(v.channels());
    if (training || want_dw || want_db) sums = gradient_sums(data<T>(dy), data<T>(in.x), v, a, valid);
    const double count = std::max(1.0, valid.valid ? valid.count(v) : double(v.n * v.s));
    for (int64_t c = 0; c < v.c; ++c) {
      GradientSums all;
      for (int64_t n = 0; n < v.n; ++n) all += sums[n * v.c + c];
      const double rest = training ? all.c / count : data<double>(m)[c] - double(a.hi[c]);  // what the mean has beside hi
      const double dyx = (all.dyc - all.dy * rest) * rstd[c];
      dweight[c] = dyx;
      dbias[c] = all.dy;
      const double alpha = rstd[c] * at(data<double>(w), c, 1);
      const double beta = training ? alpha * rstd[c] * dyx / count : 0;
      a.set(c, alpha, training ? alpha * all.dy / count - rest * beta : 0, beta);
    }
    if (wanted[0]) gradient(data<T>(dy), data<T>(in.x), out<T>(dx), v, a, valid);
  });
  if (wanted[0]) dx = laid_out(dx, x, in.copied);
  return {dx, want_dw ? rounded(dweight, x, weight->scalar_type()) : nothing(x),
          want_db ? rounded(dbias, x, *bias_dtype) : nothing(x)};
}

// running = (1 - momentum) * running + momentum * batch, for statistics of shape (C) or (N, C), averaged over N.
void update_running_(Tensor running_mean, Tensor running_var, MaybeTensor num_batches_tracked, Tensor mean, Tensor var,
                     int64_t count, std::optional<double> momentum, MaybeTensor mask) {
  const int64_t channels = running_mean.numel(), rows = channels ? mean.numel() / channels : 0;
  double factor = momentum.value_or(0);
  if (num_batches_tracked) {
    STD_TORCH_CHECK(num_batches_tracked->scalar_type() == ScalarType::Long,
                    "batch_norm: num_batches_tracked must be int64; it is not; convert it with .long().");
    const int64_t steps = ++*out<int64_t>(*num_batches_tracked);
    if (!momentum) factor = 1.0 / double(steps);
  }
  const MaybeTensor valid = mask ? MaybeTensor(packed(*mask)) : mask, m = parameter<double>(mean), v = parameter<double>(var);
  std::vector<double> n(rows, double(count));
  if (valid && rows) {
    const int64_t each = valid->numel() / rows;
    for (int64_t r = 0; r < rows; ++r) {
      int64_t in = 0;
      for (int64_t k = 0; k < each; ++k) in += data<bool>(valid)[r * each + k];
      n[r] = each ? double(in) * double(count) / double(each) : 0;
    }
  }
  const auto move = [&](const Tensor& running, const double* batch, bool is_var) {
    with_type(running, [&](auto tag) {
      using P = decltype(tag);
      const double limit = largest<P>();
      for (int64_t c = 0; c < channels; ++c) {
        double total = 0;
        int64_t informed = 0;
        for (int64_t r = 0; r < rows; ++r) {
          if (!(n[r] > (is_var ? 1 : 0))) continue;
          const double value = batch[r * channels + c] * (is_var ? n[r] / (n[r] - 1) : 1);
          total += value;
          ++informed;
        }
        if (!informed) continue;
        const double average = std::min(total / double(informed), limit);
        P* to = out<P>(running) + c * running.stride(0);
        put(to, Wide<P>((1 - factor) * double(get(to)) + factor * (std::isnan(total) ? total : average)));
      }
    });
  };
  move(running_mean, data<double>(m), false);
  move(running_var, data<double>(v), true);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(normwise, CPU, m) {
  m.impl("batch_norm", TORCH_BOX(&batch_norm));
  m.impl("batch_norm_forward", TORCH_BOX(&batch_norm_forward));
  m.impl("update_running_", TORCH_BOX(&update_running_));
  m.impl("batch_norm_backward", TORCH_BOX(&batch_norm_backward));
}

}  // namespace normwise
